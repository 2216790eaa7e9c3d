"""When a transparent huge page is worth splitting. Pure: nothing here waits or talks to anybody.

Merging one page out of a huge page splits it: the kernel takes 0.3 to 0.6 ms for that, and the process has 512 small
pages then where it had one entry in its page table and one in the TLB. So pages that match are put off until enough of
their huge page does, all-zero pages (which huge pages abound with) included. What khugepaged's ``max_ptes_shared`` and
``max_ptes_none`` say of collapsing, this says of splitting; KSM splits always.

Pages are counted by the 2 MiB *area* they lie in, as they come: a linear scan reports those of one area together, hints
one by one. What is counted is forgotten two rounds later unless it is confirmed, like candidates in the index. A page
put off by mistake, because the huge page is none any more, comes with the next round.
"""

from collections.abc import Iterable, Iterator

import attrs

from udedup.engine.index import Matches
from udedup.engine.native import CData, ffi, lib
from udedup.engine.planner import Targets, by_agent
from udedup.engine.wire import PAGE

AREAS_PER_PAGE = 1 / 64
"""Areas an agent may have counted per resident page: not all are as full as a huge page."""

SPARE_AREAS = 16
"""Areas that any agent may have counted, however small it is."""

Areas = dict[int, int]
"""Address of an area → bit mask of its pages."""


def areas_of(items: CData, count: int) -> Areas:
    """Of a struct udd_match[] or udd_target[]."""
    areas = ffi.new("struct udd_huge_area[]", count)
    return _collect(areas, lib.udd_huge_areas(items, _size(items), count, areas))


def zeros_of(reports: CData, count: int) -> Areas:
    """Of the zero pages that an agent found in huge pages, among a struct udd_report[]."""
    areas = ffi.new("struct udd_huge_area[]", count)
    return _collect(areas, lib.udd_huge_zeros(reports, count, areas))


def matches_outside(areas: Iterable[int], matches: Matches) -> Matches:
    """Those in none of ``areas``. Takes ``matches`` apart."""
    return Matches(matches.array, _outside(areas, matches.array, matches.count))


def targets_outside(areas: Iterable[int], targets: Targets) -> Targets:
    """Those in none of ``areas``. Takes ``targets`` apart."""
    return attrs.evolve(targets, count=_outside(areas, targets.array, targets.count))


def candidates_of(areas: Iterable[int], matches: Matches) -> Iterator[Targets]:
    """The other pages that matches in ``areas`` matched, agent by agent; they have no slot yet."""
    ascending = sorted(areas)
    targets = ffi.new("struct udd_target[]", matches.count)
    count = lib.udd_huge_others(matches.array, matches.count, ascending, len(ascending), targets)
    return by_agent(targets, count)


def _collect(areas: CData, count: int) -> Areas:
    found: Areas = {}
    for i in range(count):
        address = areas[i].address
        found[address] = found.get(address, 0) | int.from_bytes(ffi.buffer(areas[i].pages), "little")
    return found


def _outside(areas: Iterable[int], items: CData, count: int) -> int:
    ascending = sorted(areas)
    return int(lib.udd_huge_without(items, _size(items), count, ascending, len(ascending)))


def _size(items: CData) -> int:
    return int(ffi.sizeof(ffi.typeof(items).item))


def ranges_of(areas: Areas) -> list[tuple[int, int]]:
    """(address, pages) of all stretches, each in one area, ascending."""
    ranges = []
    for address, mask in sorted(areas.items()):
        page = 0
        while mask:
            gap = (mask & -mask).bit_length() - 1
            mask >>= gap
            length = (~mask & (mask + 1)).bit_length() - 1
            mask >>= length
            ranges.append((address + (page + gap) * PAGE, length))
            page += gap + length
    return ranges


@attrs.frozen
class Verdict:
    """What becomes of pages that would merge."""

    put_off: Areas
    """These are not to be merged for now."""

    revisit: Areas
    """These were put off before, or are zero: now they are to be visited, and zero pages merged wherever they lie."""


@attrs.define
class _Count:
    recent: int = 0
    """Pages counted since the round began, a bit for each."""

    older: int = 0
    """Pages counted in the round before."""

    @property
    def pages(self) -> int:
        return self.recent | self.older


class HugePages:
    """The count of one agent: which pages of its huge pages would merge, if there were enough of them."""

    def __init__(self, threshold: int) -> None:
        """``threshold``: least number of pages to split a huge page for; 0 or 1: any."""
        self.threshold = threshold
        self.limit = SPARE_AREAS
        """Most areas to count."""
        self._counts: dict[int, _Count] = {}

    def set_resident(self, pages: int) -> None:
        """How large the agent's process is."""
        self.limit = int(pages * AREAS_PER_PAGE) + SPARE_AREAS

    @property
    def splits_always(self) -> bool:
        """Whether there is nothing to count."""
        return self.threshold <= 1

    @property
    def counted(self) -> int:
        """Pages, now."""
        return sum(count.pages.bit_count() for count in self._counts.values())

    def doubtful(self, matched: Areas, zeros: Areas) -> list[int]:
        """Areas with too few pages so far, ascending: it matters whether they lie in a huge page."""
        return sorted(
            address
            for address in matched.keys() | zeros.keys()
            if self._together(address, matched, zeros).bit_count() < self.threshold
        )

    def _together(self, address: int, matched: Areas, zeros: Areas) -> int:
        count = self._counts.get(address)
        return (0 if count is None else count.pages) | matched.get(address, 0) | zeros.get(address, 0)

    def settle(self, matched: Areas, zeros: Areas, huge: set[int]) -> Verdict:
        """Decides on pages that match, and zero ones; ``huge``: those of the doubtful areas that are a huge page."""
        verdict = Verdict({}, {})
        for address in matched.keys() | zeros.keys():
            pages = matched.get(address, 0) | zeros.get(address, 0)
            if address in huge:
                verdict.put_off[address] = pages
                continue
            rest = self._together(address, {}, zeros) & ~matched.get(address, 0)
            self._counts.pop(address, None)
            if rest:
                verdict.revisit[address] = rest
        self.count(verdict.put_off)
        return verdict

    def count(self, areas: Areas) -> None:
        """Counts pages that would merge, as far as there is room.

        Also those that somebody else's pages match, and that were put off there: two processes with the same pages may
        each have come first with some of them.
        """
        for address, pages in areas.items():
            count = self._counts.get(address)
            if count is None:
                if len(self._counts) >= self.limit:
                    continue
                count = self._counts[address] = _Count()
            count.recent |= pages

    def next_round(self) -> None:
        """The linear scan reached the end of memory: what was not confirmed since the last time is forgotten."""
        kept = {}
        for address, count in self._counts.items():
            if count.recent:
                kept[address] = _Count(0, count.recent)
        self._counts = kept
