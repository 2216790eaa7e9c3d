"""Linear programs, small ones: the dual simplex method on a dense tableau, in plain Python.

For some ten rows and some hundred columns, which takes a hundredth of a second; libraries for it are as large as all
that udedup needs besides.
"""

from collections.abc import Sequence
from typing import Final

import attrs

TINY: Final = 1e-11
"""What counts as zero; coefficients should be about 1."""

STEPS_MAX: Final = 2000


class InfeasibleError(Exception):
    """Nothing fulfils all conditions."""


@attrs.frozen
class Solution:
    """Where the least value is."""

    values: list[float]
    """Of the variables."""

    prices: list[float]
    """Of the conditions, none negative: how much the least value falls if a limit grows by 1."""


def minimize(costs: Sequence[float], rows: Sequence[Sequence[float]], limits: Sequence[float]) -> Solution:
    """Finds variables, none negative, for which each row's sum of products is not above its limit and ``costs``' least.

    No cost may be negative. Raises InfeasibleError. Rounding may leave the least value a little off: who needs a
    bound that holds makes it of the prices.
    """
    count = len(costs)
    # Each row says what a variable is, its own limit minus a sum of products of the variables that are zero now.
    table = [[*row, limit] for row, limit in zip(rows, limits, strict=True)]
    reduced = [*costs, 0.0]
    zero = list(range(count))
    basic = list(range(count, count + len(table)))
    for _ in range(STEPS_MAX):
        leaving = min(range(len(table)), key=lambda index: table[index][count])
        row = table[leaving]
        if row[count] > -TINY:
            break
        falling = [column for column in range(count) if row[column] < -TINY]
        if not falling:
            raise InfeasibleError
        entering = min(falling, key=lambda column: (reduced[column] / -row[column], row[column]))
        _exchange(table, reduced, leaving, entering)
        zero[entering], basic[leaving] = basic[leaving], zero[entering]
    else:
        raise InfeasibleError
    values = [0.0] * (count + len(table))
    prices = [0.0] * (count + len(table))
    for index, variable in enumerate(basic):
        values[variable] = max(table[index][count], 0.0)
    for column, variable in enumerate(zero):
        prices[variable] = max(reduced[column], 0.0)
    return Solution(values[:count], prices[count:])


def _exchange(table: list[list[float]], reduced: list[float], leaving: int, entering: int) -> None:
    """The variable of column ``entering`` and that of row ``leaving`` change places."""
    pivot = table[leaving][entering]
    turned = [value / pivot for value in table[leaving]]
    turned[entering] = 1 / pivot
    for index, row in enumerate(table):
        factor = row[entering]
        if index != leaving and factor:
            table[index] = _less(row, factor, turned)
            table[index][entering] = -factor / pivot
    table[leaving] = turned
    factor = reduced[entering]
    reduced[:] = _less(reduced, factor, turned)
    reduced[entering] = -factor / pivot


def _less(row: list[float], factor: float, other: list[float]) -> list[float]:
    return [value - factor * subtracted for value, subtracted in zip(row, other, strict=True)]
