"""What is put off, for how long, and what is visited once enough of a huge page would merge."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from udedup._native import ffi, lib
from udedup.engine import hugepages
from udedup.engine.hugepages import Areas, HugePages, Verdict
from udedup.engine.index import Matches
from udedup.engine.planner import Targets

PAGE = 4096
HUGE = 512 * PAGE
BASE = 1 << 40


def mask(*pages: int) -> int:
    """A bit for each page."""
    return sum(1 << page for page in pages)


def take(huge: HugePages, matched: Areas, zeros: Areas | None = None, *, split: tuple[int, ...] = ()) -> Verdict:
    """Decides, where every doubtful area but those in ``split`` is a huge page."""
    zeros = zeros or {}
    return huge.settle(matched, zeros, set(huge.doubtful(matched, zeros)) - set(split))


def test_few_pages_are_put_off() -> None:
    huge = HugePages(4)
    assert huge.doubtful({BASE: mask(1, 2, 3)}, {}) == [BASE]
    assert take(huge, {BASE: mask(1, 2, 3)}) == Verdict({BASE: mask(1, 2, 3)}, {})
    assert huge.counted == 3


def test_enough_pages_are_merged_unasked() -> None:
    huge = HugePages(4)
    assert huge.doubtful({BASE: mask(1, 2, 3, 4)}, {}) == []
    assert take(huge, {BASE: mask(1, 2, 3, 4)}) == Verdict({}, {})
    assert huge.counted == 0


def test_pages_add_up_and_those_put_off_come_back() -> None:
    """Hints come one by one; what came before is visited with the one that makes it enough."""
    huge = HugePages(4)
    for page in (7, 300, 500):
        assert take(huge, {BASE: mask(page)}) == Verdict({BASE: mask(page)}, {})
    assert take(huge, {BASE: mask(8)}) == Verdict({}, {BASE: mask(7, 300, 500)})
    assert huge.counted == 0


def test_a_page_counts_once() -> None:
    huge = HugePages(2)
    for _ in range(5):
        assert take(huge, {BASE: mask(7)}).put_off == {BASE: mask(7)}


def test_areas_do_not_mix() -> None:
    huge = HugePages(2)
    verdict = take(huge, {BASE: mask(1), BASE + HUGE: mask(1, 2)})
    assert verdict.put_off == {BASE: mask(1)}
    assert take(huge, {BASE + HUGE: mask(3)}).put_off == {BASE + HUGE: mask(3)}


def test_small_pages_are_merged_at_once() -> None:
    assert take(HugePages(4), {BASE: mask(1)}, split=(BASE,)) == Verdict({}, {})


def test_what_was_put_off_comes_back_when_the_huge_page_is_gone() -> None:
    huge = HugePages(4)
    take(huge, {BASE: mask(1, 2)})
    assert take(huge, {BASE: mask(3)}, split=(BASE,)) == Verdict({}, {BASE: mask(1, 2)})


def test_pages_that_others_match_count() -> None:
    huge = HugePages(4)
    huge.count({BASE: mask(1, 2)})
    assert take(huge, {BASE: mask(3)}).put_off
    assert take(huge, {BASE: mask(4)}) == Verdict({}, {BASE: mask(1, 2, 3)})


def test_zero_pages_count_and_are_visited() -> None:
    """The agent merges them where it finds them, so it has to look again."""
    huge = HugePages(4)
    assert take(huge, {}, {BASE: mask(1, 2)}) == Verdict({BASE: mask(1, 2)}, {})
    assert take(huge, {BASE: mask(3)}, {BASE: mask(1, 4)}) == Verdict({}, {BASE: mask(1, 2, 4)})
    assert take(huge, {}, {BASE: mask(*range(9))}) == Verdict({}, {BASE: mask(*range(9))})


def test_the_visit_ends() -> None:
    """Pages that still won't split their huge page are put off anew, or tried once more, not for ever."""
    huge = HugePages(3)
    take(huge, {BASE: mask(1, 2)})
    revisit = take(huge, {BASE: mask(3, 4, 5)}).revisit
    rounds = 0
    while revisit:
        revisit = take(huge, revisit).revisit
        rounds += 1
    assert rounds <= 2


def test_what_is_not_confirmed_is_forgotten_after_two_rounds() -> None:
    huge = HugePages(4)
    take(huge, {BASE: mask(1, 2)})
    huge.next_round()
    take(huge, {BASE: mask(2)})
    assert huge.counted == 2
    huge.next_round()
    assert huge.counted == 1
    huge.next_round()
    assert huge.counted == 0


def test_the_count_is_bounded_by_the_size_of_the_process() -> None:
    huge = HugePages(4)
    huge.set_resident(10 * 512)
    for i in range(1000):
        assert take(huge, {BASE + i * HUGE: mask(0)}).put_off
    assert huge.counted == huge.limit == 80 + hugepages.SPARE_AREAS


pages = st.sets(st.integers(0, 3 * 512 - 1), min_size=1)


def grouped(numbers: set[int]) -> Areas:
    """By area, the slow way."""
    return {
        BASE + area * HUGE: mask(*(number % 512 for number in numbers if number // 512 == area))
        for area in {number // 512 for number in numbers}
    }


@given(pages)
def test_matches_and_targets_are_grouped(numbers: set[int]) -> None:
    matches = ffi.new("struct udd_match[]", len(numbers))
    targets = ffi.new("struct udd_target[]", len(numbers))
    for i, number in enumerate(sorted(numbers)):
        matches[i].address = targets[i].address = BASE + number * PAGE
    assert hugepages.areas_of(matches, len(numbers)) == grouped(numbers)
    assert hugepages.areas_of(targets, len(numbers)) == grouped(numbers)


@given(pages, st.sets(st.integers(0, 3)))
def test_those_put_off_are_taken_out(numbers: set[int], areas: set[int]) -> None:
    matches = ffi.new("struct udd_match[]", len(numbers))
    targets = ffi.new("struct udd_target[]", len(numbers))
    for i, number in enumerate(sorted(numbers)):
        matches[i].address = targets[i].address = BASE + number * PAGE
        matches[i].other = targets[i].slot = number
    put_off = [BASE + area * HUGE for area in areas]
    kept_matches = hugepages.matches_outside(put_off, Matches(matches, len(numbers)))
    kept_targets = hugepages.targets_outside(put_off, Targets(7, targets, len(numbers), targets))
    expected = [number for number in sorted(numbers) if number // 512 not in areas]
    assert [matches[i].other for i in range(kept_matches.count)] == expected
    assert [targets[i].slot for i in range(kept_targets.count)] == expected
    assert [targets[i].address for i in range(kept_targets.count)] == [BASE + number * PAGE for number in expected]
    assert kept_targets.agent == 7


@given(st.dictionaries(st.integers(0, 3 * 512 - 1), st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1))
def test_whom_those_put_off_match(found: dict[int, tuple[int, int]]) -> None:
    """``found``: page → (agent, its page); agent 0: a store slot."""
    matches = ffi.new("struct udd_match[]", len(found))
    for i, (number, (other, place)) in enumerate(sorted(found.items())):
        matches[i].address, matches[i].other, matches[i].other_address = BASE + number * PAGE, other, place * PAGE
    expected: dict[int, set[int]] = {}
    for number, (other, place) in found.items():
        if number // 512 != 1 and other:
            expected.setdefault(other, set()).add(place * PAGE)
    answer = {
        targets.agent: {targets.array[i].address for i in range(targets.count)}
        for targets in hugepages.candidates_of([BASE, BASE + 2 * HUGE], Matches(matches, len(found)))
    }
    assert answer == expected


@given(st.lists(st.tuples(st.integers(0, 3 * 512 - 1), st.booleans()), min_size=1, unique_by=lambda pair: pair[0]))
def test_zero_pages_are_found_in_any_order(found: list[tuple[int, bool]]) -> None:
    reports = ffi.new("struct udd_report[]", len(found))
    for i, (number, zero) in enumerate(found):
        reports[i].address = BASE + number * PAGE
        reports[i].flags = lib.UDD_REPORT_HINTED | (lib.UDD_REPORT_ZERO if zero else 0)
    assert hugepages.zeros_of(reports, len(found)) == grouped({number for number, zero in found if zero})


@given(pages)
def test_ranges_cover_the_pages(numbers: set[int]) -> None:
    ranges = hugepages.ranges_of(grouped(numbers))
    covered = [address + i * PAGE for address, length in ranges for i in range(length)]
    assert covered == [BASE + number * PAGE for number in sorted(numbers)]
    for (address, length), (following, _) in pairwise(ranges):
        # Stretches are as long as they can be.
        assert following > address + length * PAGE or following % HUGE == 0
