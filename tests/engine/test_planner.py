"""Plans against what they promise: every page at most once, contiguous runs, none too short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udedup._native import ffi, lib
from udedup.engine import planner
from udedup.engine.index import Index, Matches
from udedup.engine.planner import NEVER, Targets

PAGE = 4096


def targets_from(places: dict[int, tuple[int, int]], agent: int = 1) -> Targets:
    """From page → (segment, slot)."""
    array = ffi.new("struct udd_target[]", len(places) or 1)
    for i, (page, (segment, slot)) in enumerate(sorted(places.items())):
        array[i].address, array[i].agent, array[i].segment, array[i].slot = page * PAGE, agent, segment, slot
    return Targets(agent, array, len(places), array)


def stretches(places: dict[int, tuple[int, int]]) -> list[list[int]]:
    """Maximal lists of pages that follow each other in memory and in the store."""
    found: list[list[int]] = []
    for page in sorted(places):
        segment, slot = places[page]
        if found and found[-1][-1] == page - 1 and places[page - 1] == (segment, slot - 1):
            found[-1].append(page)
        else:
            found.append([page])
    return found


@given(
    places=st.dictionaries(st.integers(0, 300), st.tuples(st.integers(1, 2), st.integers(0, 5))).map(
        # Slots mostly follow pages, so that there are runs.
        lambda chosen: {page: (segment, page + shift // 5) for page, (segment, shift) in chosen.items()}
    ),
    least=st.integers(1, 6),
)
def test_runs(places: dict[int, tuple[int, int]], least: int) -> None:
    runs = planner.runs_of(targets_from(places), least)
    kept = [stretch for stretch in stretches(places) if len(stretch) >= least]
    assert runs.deferred == len(places) - sum(map(len, kept))
    covered: dict[int, tuple[int, int]] = {}
    lengths = []
    for i in range(runs.count):
        run = runs.array[i]
        assert 1 <= run.pages <= lib.UDD_RUN_MAX
        lengths.append(run.pages)
        covered |= {run.address // PAGE + n: (run.segment, run.slot + n) for n in range(run.pages)}
    assert sum(lengths) == len(covered)
    assert covered == {page: places[page] for stretch in kept for page in stretch}
    assert runs.count == sum(-(-len(stretch) // lib.UDD_RUN_MAX) for stretch in kept)
    assert runs.segments() == {segment for segment, _ in covered.values()}


def test_a_long_stretch_is_cut_not_left_out() -> None:
    """The rest of a stretch of 65 pages is one page, and still part of a long stretch."""
    runs = planner.runs_of(targets_from({page: (1, page) for page in range(65)}), 16)
    assert [runs.array[i].pages for i in range(runs.count)] == [64, 1]


def test_a_page_asked_for_twice_counts_once() -> None:
    array = ffi.new("struct udd_target[3]")
    for i, (page, slot) in enumerate([(1, 10), (1, 20), (2, 30)]):
        array[i].address, array[i].agent, array[i].segment, array[i].slot = page * PAGE, 1, 1, slot
    runs = planner.runs_of(Targets(1, array, 3, array), 1)
    assert [(runs.array[i].address // PAGE, runs.array[i].slot) for i in range(runs.count)] == [(1, 10), (2, 30)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50)), max_size=60))
def test_by_agent(pages: list[tuple[int, int]]) -> None:
    array = ffi.new("struct udd_target[]", len(pages) or 1)
    for i, (agent, page) in enumerate(pages):
        array[i].agent, array[i].address = agent, page * PAGE
    seen = []
    for targets in planner.by_agent(array, len(pages)):
        assert all(targets.array[i].agent == targets.agent for i in range(targets.count))
        seen += [(targets.agent, targets.array[i].address // PAGE) for i in range(targets.count)]
    assert seen == sorted(pages)


@given(limit=st.integers(1, 100_000), left=st.floats(0, 1))
def test_least_run(limit: int, left: float) -> None:
    vmas = limit - int(left * limit)
    least = planner.least_run(vmas, limit)
    if vmas >= limit:
        assert least == NEVER
    else:
        assert 1 <= least <= lib.UDD_RUN_MAX
        assert least == lib.UDD_RUN_MAX or 2 * least * (limit - vmas) > limit


def test_least_run_grows() -> None:
    lengths = [planner.least_run(vmas, 64000) for vmas in (0, 31000, 33000, 49000, 57000, 63000, 63999, 64000, 70000)]
    assert lengths == [1, 1, 2, 4, 8, 64, 64, NEVER, NEVER]


def matches_from(pages: dict[int, int], shared: set[int]) -> Matches:
    """Candidate matches of page → content, contents in ``shared`` have a slot."""
    array = ffi.new("struct udd_match[]", len(pages) or 1)
    for i, (page, content) in enumerate(sorted(pages.items())):
        array[i].address = page * PAGE
        array[i].digest = (content, 1)
        array[i].other = 0 if content in shared else 2
    return Matches(array, len(pages))


@given(
    pages=st.dictionaries(st.integers(0, 400), st.integers(1, 60), max_size=300),
    shared=st.sets(st.integers(1, 60), max_size=20),
    least=st.integers(1, 4),
)
def test_fresh_pages(pages: dict[int, int], shared: set[int], least: int) -> None:
    """Each content that waits for a slot gets one, in address order, unless it occurs in short stretches only."""
    index = Index()
    for content in shared:
        lib.udd_index_publish(index.handle, (content, 1), 1, content)
    waiting = sorted(page for page, content in pages.items() if content not in shared)
    long_enough: list[int] = []
    stretch: list[int] = []
    for page in [*waiting, None]:
        if stretch and page != stretch[-1] + 1:
            long_enough += stretch if len(stretch) >= least else []
            stretch = []
        if page is not None:
            stretch.append(page)
    expected: list[int] = []
    for page in long_enough:
        if pages[page] not in [pages[earlier] for earlier in expected]:
            expected.append(page)

    planned: list[int] = []
    for fresh in planner.fresh_batches(index, matches_from(pages, shared), least, copied=False):
        assert 1 <= fresh.count <= lib.UDD_COPY_MAX
        ranges, range_count = fresh.copy_ranges()
        batch = [fresh.array[i].address // PAGE for i in range(fresh.count)]
        spread = [ranges[i].address // PAGE + n for i in range(range_count) for n in range(ranges[i].pages)]
        assert spread == batch
        for i in range(fresh.count):
            lib.udd_index_publish(index.handle, fresh.array[i].digest, 2, len(planned) + i)
        planned += batch
    assert planned == expected


def test_fresh_batches_are_cut_at_the_copy_area() -> None:
    index = Index()
    matches = matches_from({page: page + 1 for page in range(2 * lib.UDD_COPY_MAX + 44)}, set())
    sizes = []
    for fresh in planner.fresh_batches(index, matches, 4, copied=False):
        sizes.append(fresh.count)
        for i in range(fresh.count):
            lib.udd_index_publish(index.handle, fresh.array[i].digest, 1, i)
    assert sizes == [lib.UDD_COPY_MAX, lib.UDD_COPY_MAX, 44]


def test_fresh_pages_whose_copies_came_with_their_reports() -> None:
    """Those without wait for the second turn, which asks for copies of what has no slot by then."""
    index = Index()
    matches = matches_from({page: page + 1 for page in range(30)}, set())
    for page in range(0, 30, 3):
        matches.array[page].copy = 100 + page
    (first,) = planner.fresh_batches(index, matches, 4, copied=True)
    assert [first.array[i].copy for i in range(first.count)] == list(range(100, 130, 3))
    for i in range(first.count):
        lib.udd_index_publish(index.handle, first.array[i].digest, 1, i)
    (second,) = planner.fresh_batches(index, matches, 4, copied=False)
    assert [second.array[i].address // PAGE for i in range(second.count)] == [n for n in range(30) if n % 3]
    assert not any(second.array[i].copy for i in range(second.count))
    second.copied([0b101, *[0] * (lib.UDD_COPY_WORDS - 1)])
    assert [second.array[i].copy for i in range(4)] == [1, 0, 3, 0]


@pytest.mark.parametrize("published", [True, False])
def test_targets(published: bool) -> None:
    index = Index()
    if published:
        lib.udd_index_publish(index.handle, (5, 1), 3, 77)
    targets = planner.targets_of(index, 9, matches_from({10: 5}, set()))
    if published:
        target = targets.array[0]
        assert (target.address, target.agent, target.segment, target.slot) == (10 * PAGE, 9, 3, 77)
    assert targets.count == published


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_without_targets(reported: set[int], offered: set[int]) -> None:
    matches = matches_from(dict.fromkeys(reported, 1), set())
    left = planner.without_targets(matches, targets_from(dict.fromkeys(offered, (1, 1))))
    assert [left.array[i].address // PAGE for i in range(left.count)] == sorted(reported - offered)
