"""Which segments are retired, and when."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udedup.engine import compaction
from udedup.engine.compaction import Compaction, Fill


def full(number: int, live: int, *, references: int | None = None, growing: bool = False) -> Fill:
    return Fill(number, 4096, live, 2 * live if references is None else references, growing)


def test_a_full_segment_that_is_mostly_dead_goes_at_once() -> None:
    assert Compaction().choose([full(1, 1000), full(2, 4096), full(3, 0, growing=True)], 0) == [1]


def test_a_store_that_is_in_use_is_left_alone() -> None:
    fills = [full(1, 2100), full(2, 4096), full(3, 4000)]
    chooser = Compaction()
    assert [chooser.choose(fills, now) for now in range(100)] == [[]] * 100


def test_a_thin_store_is_compacted_after_a_while_and_the_emptiest_go_first() -> None:
    fills = [full(1, 3900), full(2, 2000), full(3, 1500), full(4, 3000)]
    chooser = Compaction()
    assert chooser.choose(fills, 0) == []
    assert chooser.choose(fills, 9.9) == []
    assert chooser.choose(fills, 10) == [3, 2]
    assert chooser.choose(fills, 11) == []  # the next step has to wait as long


def test_who_is_in_use_again_meanwhile_has_all_the_time_once_more() -> None:
    thin, good = [full(1, 2000)], [full(1, 4000)]
    chooser = Compaction()
    assert chooser.choose(thin, 0) == []
    assert chooser.choose(good, 8) == []
    assert chooser.choose(thin, 11) == []
    assert chooser.choose(thin, 21) == [1]


def test_there_is_no_patience_if_none_is_asked_for() -> None:
    assert Compaction().choose([full(1, 2000)], 0, patience=0) == [1]


def test_the_growing_one_is_judged_only_when_it_grows_no_more() -> None:
    chooser = Compaction()
    for now in range(0, 100, 2):
        assert chooser.choose([Fill(1, now + 100, 0, 0, growing=True)], now) == []
    assert [chooser.choose([Fill(1, 198, 0, 0, growing=True)], now) for now in (100, 102, 112)] == [[], [], [1]]


def test_a_few_dead_pages_are_nothing_but_where_nothing_lives_all_goes() -> None:
    chooser = Compaction()
    small = [Fill(1, 60, 10, 20, growing=True)]
    assert [chooser.choose(small, now) for now in range(0, 60, 2)] == [[]] * 30
    dead = [Fill(1, 60, 0, 0, growing=True)]
    assert [number for now in range(60, 90, 2) for number in chooser.choose(dead, now)][:1] == [1]


def test_a_step_is_bounded() -> None:
    fills = [full(number, 2000, references=20_000) for number in range(1, 9)]
    assert compaction.step(fills) == [1]
    assert compaction.step([full(1, 2000, references=1_000_000), full(2, 2000)]) == [1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4096), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_enough_is_in_use_in_the_end(lives: list[int], dice: random.Random) -> None:
    """What is retired moves to a new segment, as in the store; the rest stays."""
    fills = [full(number, live) for number, live in enumerate(lives)]
    chooser, number = Compaction(), len(lives)
    for now in range(200):
        chosen = chooser.choose(fills, now, patience=dice.choice([0, 2]))
        moved = sum(fill.live for fill in fills if fill.number in chosen)
        fills = [fill for fill in fills if fill.number not in chosen]
        while moved:
            number += 1
            part = min(moved, 4096)
            fills.append(Fill(number, part, part, 2 * part, growing=moved == part))
            moved -= part
    used, live = sum(fill.used for fill in fills), sum(fill.live for fill in fills)
    assert live == sum(lives)
    assert live >= 0.7 * used or used - live < compaction.DEAD_LEAST


@pytest.mark.parametrize("live", [0, 1])
def test_an_empty_segment_that_is_full_no_more_counts_for_nothing(live: int) -> None:
    assert compaction.step([Fill(1, 0, 0, 0), Fill(2, 100, live, live)]) == [2]
