"""Bounds hold as often as they say, whatever the memory is like; the linear programs behind them are solved."""

import itertools
import random
from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np
import pytest

from udedup.engine.native import lib
from udedup.estimate.bounds import CONFIDENCE, Sample, bound
from udedup.estimate.simplex import InfeasibleError, minimize

SEEDS = 20
MEMORIES = {
    "nothing equal": {1: 30_000},
    "pairs": {2: 15_000},
    "one content": {30_000: 1},
    "two contents": {1: 1, 29_999: 1},
    "as in guests": {1: 15_000, 3: 1000, 4: 1000, 20: 400},
    "close together": {2: 3000, 3: 3000, 4: 3000},
    "often and never": {1: 10_000, 12: 1000, 13: 600},
}
"""Numbers of contents by how many frames have them."""


def take(memory: Mapping[int, int], zero: int, part: float, seed: int) -> Sample:
    """A sample of a memory."""
    chances = np.random.default_rng(seed)
    seen = [0] * (lib.UDD_ESTIMATE_TIMES + 1)
    others = 0
    for frames, contents in memory.items():
        for found in chances.binomial(frames, part, contents).tolist():
            seen[min(found, len(seen) - 1)] += 1
            others += found
    total = zero + sum(frames * contents for frames, contents in memory.items())
    return Sample(part, total, int(chances.binomial(zero, part)), others, [0, *seen[1:]])


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("part", [0.05, 0.3])
def test_the_truth_is_between_the_bounds(name: str, part: float) -> None:
    memory = MEMORIES[name]
    zero = 4000
    truth = zero + sum((frames - 1) * contents for frames, contents in memory.items())
    missed = 0
    for seed in range(SEEDS):
        sample = take(memory, zero, part, seed)
        found = bound(sample)
        assert 0 <= found.least <= found.most <= sample.frames
        missed += not found.least <= truth <= found.most
        # Not true of every sample, but bounds that said nothing would be right as well.
        assert found.most - found.least < 0.75 * sample.frames
    # Chernoff's bound is far from tight: five in a hundred are allowed, hardly any is expected.
    assert missed <= (1 - CONFIDENCE) * SEEDS


def test_more_is_known_of_more() -> None:
    """The error falls as the memory grows and as the sample does."""

    def width(times: int, part: float) -> float:
        memory = {frames: contents * times for frames, contents in {1: 1500, 2: 300, 20: 40}.items()}
        sample = take(memory, 400 * times, part, 1)
        found = bound(sample)
        return (found.most - found.least) / sample.frames

    assert width(100, 0.1) < 0.5 * width(4, 0.1)
    assert width(20, 0.4) < 0.3 * width(20, 0.05)
    assert width(20, 0.9) < width(20, 0.4)


def test_nothing_seen() -> None:
    empty = [0] * (lib.UDD_ESTIMATE_TIMES + 1)
    found = bound(Sample(0.05, 0, 0, 0, empty))
    assert (found.least, found.most) == (0, 0)
    found = bound(Sample(0.01, 10, 0, 0, empty))
    assert found.least == pytest.approx(0, abs=1e-6)
    assert found.most == pytest.approx(10)


def test_a_sample_that_is_hardly_possible_has_bounds_too() -> None:
    seen = [0] * (lib.UDD_ESTIMATE_TIMES + 1)
    seen[1] = 2000
    found = bound(Sample(0.05, 10_000, 0, 2000, seen))
    assert 0 <= found.least <= found.most <= 10_000


def by_corners(costs: list[int], rows: list[list[int]], limits: list[int]) -> Fraction | None:
    """The least value of a program with two variables: exactly, in one of the corners; None: there is no corner."""
    lines = [*zip(rows, limits, strict=True), ([-1, 0], 0), ([0, -1], 0)]
    best = None
    for ((a, b), e), ((c, d), f) in itertools.combinations(lines, 2):
        det = a * d - b * c
        if not det:
            continue
        x, y = Fraction(e * d - b * f, det), Fraction(a * f - e * c, det)
        if all(p * x + q * y <= limit for (p, q), limit in lines):
            value = costs[0] * x + costs[1] * y
            best = value if best is None else min(best, value)
    return best


def product(one: Iterable[float], other: Iterable[float]) -> float:
    return sum(first * second for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_linear_programs(seed: int) -> None:
    numbers = random.Random(seed)
    infeasible = 0
    for _ in range(100):
        costs = [numbers.randint(0, 5) for _ in range(2)]
        rows = [[numbers.randint(-4, 4) for _ in range(2)] for _ in range(numbers.randint(1, 5))]
        limits = [numbers.randint(-6, 6) for _ in rows]
        wanted = by_corners(costs, rows, limits)
        if wanted is None:
            infeasible += 1
            with pytest.raises(InfeasibleError):
                minimize(costs, rows, limits)
            continue
        found = minimize(costs, rows, limits)
        assert sum(cost * value for cost, value in zip(costs, found.values, strict=True)) == pytest.approx(
            float(wanted)
        )
        for row, limit in zip(rows, limits, strict=True):
            assert sum(factor * value for factor, value in zip(row, found.values, strict=True)) <= limit + 1e-9
        # The prices prove it: no variables do better.
        columns = zip(*rows, strict=True)
        priced = [cost + product(found.prices, column) for cost, column in zip(costs, columns, strict=True)]
        assert min(priced) >= -1e-9
        assert -product(found.prices, limits) == pytest.approx(float(wanted))
    assert 0 < infeasible < 100
