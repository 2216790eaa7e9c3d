"""The two tests find what differs, are silent about what does not, and give the probabilities they promise."""

import random

import pytest
from sidechannel.distributions import compare


def times(seed: int, count: int, shift: float = 0, spread: float = 10) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(100 + shift, spread) for _ in range(count)]


def test_equal_sets_are_not_told_apart() -> None:
    found = compare(times(1, 5000), times(2, 5000))
    assert found.p > 1e-3
    assert abs(found.auc - 0.5) < 0.02


def test_a_shift_shows() -> None:
    found = compare(times(1, 5000, shift=2), times(2, 5000))
    assert found.auc_p < 1e-12
    assert found.auc > 0.53


def test_another_spread_shows_though_the_middle_is_the_same() -> None:
    found = compare(times(1, 5000, spread=20), times(2, 5000))
    assert found.distance_p < 1e-12
    assert found.p < 1e-12


def test_whole_separation() -> None:
    found = compare([3.0] * 100, [1.0] * 100)
    assert (found.auc, found.distance) == (1.0, 1.0)
    assert found.p < 1e-20


def test_ties() -> None:
    """A clock's steps: equal times count half."""
    assert compare([1.0] * 100, [1.0] * 50).p == 1.0
    assert compare([1.0, 2.0, 2.0], [1.0, 2.0, 2.0]).auc == 0.5
    found = compare([1.0] * 400 + [2.0] * 100, [1.0] * 100 + [2.0] * 400)
    assert found.auc == pytest.approx(0.2)
    assert found.distance == pytest.approx(0.6)


def test_chance_is_as_rare_as_promised() -> None:
    """Of many comparisons of equal sets a tenth has p below 0.1, by either test."""
    found = [compare(times(2 * i, 200), times(2 * i + 1, 200)) for i in range(500)]
    assert 0.06 < sum(each.auc_p < 0.1 for each in found) / 500 < 0.14
    assert 0.04 < sum(each.distance_p < 0.1 for each in found) / 500 < 0.14
