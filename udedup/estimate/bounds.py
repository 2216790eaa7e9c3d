"""What a sample of page frames says of all: between which bounds the number of different contents is.

Each frame is in the sample by chance, independently of the others. A content that m frames have is then found j times
with the binomial probability B(j; m, part), so that the numbers of contents found once, twice, … are sums of
independent chances, and each is near its mean by Chernoff's bound. Whatever the memory is like, the numbers of
contents that 1, 2, 3 … frames have must agree with that, for all j at a time with the probability wanted; the least and
greatest number of different contents that any such memory has are two linear programs (the method of Valiant and
Valiant, STOC 2011, with bounds for what they leave as an order of magnitude).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from udedup.estimate.simplex import InfeasibleError, minimize

CONFIDENCE: Final = 0.95
"""Probability that the truth is between the bounds."""

SINGLY: Final = 40
GROWTH: Final = 1.1
"""Numbers of frames with one content that the programs are made for: each up to SINGLY, then in steps of so much."""

FINE_SINGLY: Final = 200
FINE_GROWTH: Final = 1.02
"""The same of those for which their results are checked."""

BISECTIONS: Final = 60


@attrs.frozen
class Sample:
    """What was found."""

    part: float
    """Probability of a frame to be in the sample, above 0 and below 1."""

    frames: int
    """All there are."""

    zero: int
    """Frames in the sample that are all zero."""

    others: int
    """The other frames in the sample."""

    seen: Sequence[int]
    """Number of other contents by how often they were found; the last: so often or more. The first has no meaning."""


@attrs.frozen
class Bounds:
    """Between which numbers of frames that sharing would save the truth is."""

    least: float
    most: float
    shares: list[float]
    """The part that is saved of a frame whose content was found so often, by how often, by a memory in the middle."""


@attrs.frozen
class _Interval:
    """Of a mean."""

    low: float
    high: float


@attrs.frozen
class _Multiplicity:
    """What to expect of a content that so many frames have."""

    frames: int
    chances: list[float]
    """Probability that it is found j times, by j; the last: so often or more."""


def bound(sample: Sample) -> Bounds:
    """Takes some hundredths of a second."""
    if not sample.frames:
        return Bounds(0.0, 0.0, [0.0] * len(sample.seen))
    coarse = list(_multiplicities(sample, SINGLY, GROWTH))
    fine = list(_multiplicities(sample, FINE_SINGLY, FINE_GROWTH))
    exponent = math.log(2 * len(sample.seen) / (1 - CONFIDENCE))
    while True:
        try:
            return _bound(sample, coarse, fine, exponent)
        except InfeasibleError:
            # The sample is one of the few that are too far off.
            exponent *= 2


def _bound(sample: Sample, coarse: list[_Multiplicity], fine: list[_Multiplicity], exponent: float) -> Bounds:
    """As :func:`bound`, for means whose intervals are left with a probability of exp(-exponent) at either end.

    The variables are the parts of the memory that belong to contents of so many frames; the last one is the part that
    is zero.
    """
    mean = sample.part * sample.frames
    rows, limits = [], []
    for times in range(1, len(sample.seen)):
        found = _interval(sample.seen[times], exponent)
        row = [each.chances[times] / each.frames / sample.part for each in coarse]
        rows += [[*row, 0.0], [-value for value in row] + [0.0]]
        limits += [found.high / mean, -found.low / mean]
    zero = _interval(sample.zero, exponent)
    nothing = [0.0] * len(coarse)
    rows += [[*nothing, 1.0], [*nothing, -1.0], [1.0] * (len(nothing) + 1), [-1.0] * (len(nothing) + 1)]
    limits += [min(zero.high / mean, 1.0), -min(zero.low / mean, 1.0), 1.0, -1.0]
    kept = [*(1 / each.frames for each in coarse), 0.0]
    saved = [1 - value for value in kept]
    least, most = minimize(saved, rows, limits), minimize(kept, rows, limits)
    middle = [(one + other) / 2 for one, other in zip(least.values, most.values, strict=True)]
    # What is in the sample is certain.
    contents = sum(sample.seen[1:])
    return Bounds(
        max(
            _proven(sample, fine, least.prices, limits, kept=False) * sample.frames,
            sample.zero + sample.others - contents,
        ),
        min((1 - _proven(sample, fine, most.prices, limits, kept=True)) * sample.frames, sample.frames - contents),
        _shares(coarse, middle, len(sample.seen)),
    )


def _proven(
    sample: Sample, fine: list[_Multiplicity], prices: list[float], limits: list[float], *, kept: bool
) -> float:
    """The least part of the memory that is kept, or saved, proved by the prices of a program's conditions.

    By weak duality that holds for any prices that are not negative: however they were found, and for numbers of
    frames that the program left out, too, as far as they are looked at here.
    """
    *found, zero, _ = (prices[index] - prices[index + 1] for index in range(0, len(prices), 2))
    # The conditions' last pair says that all parts are 1 in sum: what is proved of each part is proved of all.
    least = (0.0 if kept else 1.0) + zero
    for each in fine:
        cost = 1 / each.frames if kept else 1 - 1 / each.frames
        priced = sum(price * chance for price, chance in zip(found, each.chances[1:], strict=True))
        least = min(least, cost + priced / each.frames / sample.part)
    others = sum(price * limit for price, limit in zip(prices[:-2], limits[:-2], strict=True))
    return min(max(least - others, 0.0), 1.0)


def _shares(coarse: list[_Multiplicity], parts: list[float], count: int) -> list[float]:
    shares = [0.0]
    for times in range(1, count):
        contents = [part / each.frames * each.chances[times] for part, each in zip(parts, coarse, strict=False)]
        saved = [value * (1 - 1 / each.frames) for value, each in zip(contents, coarse, strict=True)]
        shares.append(sum(saved) / sum(contents) if sum(contents) > 0 else 1 - 1 / times)
    return shares


def _multiplicities(sample: Sample, singly: int, growth: float) -> Iterator[_Multiplicity]:
    """Numbers of frames that can have one content, each up to ``singly`` and then in steps of ``growth``."""
    number = 1
    while number < sample.frames:
        yield _Multiplicity(number, chances(sample.part, number, len(sample.seen)))
        number = number + 1 if number < singly else math.ceil(number * growth)
    yield _Multiplicity(sample.frames, chances(sample.part, sample.frames, len(sample.seen)))


def chances(part: float, frames: int, count: int) -> list[float]:
    """How probable it is that a content of so many frames is found j times, by j below ``count``; the last: or more."""
    inside, outside = math.log(part), math.log1p(-part)
    found = [0.0] * count
    for times in range(min(count - 1, frames + 1)):
        ways = math.lgamma(frames + 1) - math.lgamma(times + 1) - math.lgamma(frames - times + 1)
        found[times] = math.exp(ways + times * inside + (frames - times) * outside)
    found[-1] = max(1 - sum(found), 0.0)
    return found


def _interval(found: int, exponent: float) -> _Interval:
    """Where the mean of a number is, a sum of independent chances that was ``found``.

    Chernoff: a sum whose mean is m is found to be x or further from m with at most exp(x - m - x ln(x / m)).
    """

    def unlikely(mean: float) -> bool:
        return mean - found + (found * math.log(found / mean) if found else 0.0) > exponent

    def edge(inner: float, outer: float) -> float:
        for _ in range(BISECTIONS):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if unlikely(middle) else (middle, outer)
        return outer

    far = found + exponent + math.sqrt(exponent * (exponent + 2 * found)) + 1
    return _Interval(edge(found, 0.0) if found else 0.0, edge(found, far))
