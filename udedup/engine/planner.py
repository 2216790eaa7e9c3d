"""What goes where. Pure: nothing here waits or talks to anybody.

The unit of cost is the mapping, so the aim is always long runs: see native/engine/plan.c, whose functions this module
gives a Python shape.
"""

from collections.abc import Iterator

import attrs

from udedup.engine.index import Index, Matches
from udedup.engine.native import CData, ffi, lib
from udedup.engine.wire import COPY_MAX, RUN_BYTES

RUN_MAX: int = lib.UDD_RUN_MAX
NEVER = 1 << 31
"""A minimal run length that no run has."""


def least_run(vmas: int, vma_limit: int) -> int:
    """Pages a run must have: 1 while over half of an agent's mappings are left, then double with every halving."""
    left = vma_limit - vmas
    if left <= 0:
        return NEVER
    least = 1
    while least < RUN_MAX and 2 * least * left <= vma_limit:
        least *= 2
    return least


@attrs.frozen
class Fresh:
    """Pages that get new slots, in this order."""

    array: CData
    """struct udd_fresh[]."""

    count: int

    def copy_ranges(self) -> tuple[CData, int]:
        """As struct udd_range[] for UDD_COPY, and their number."""
        ranges = ffi.new("struct udd_range[]", self.count)
        return ranges, lib.udd_plan_copy(self.array, self.count, ranges)

    def copied(self, valid: CData) -> None:
        """Takes in the answer to that: a bit for each page, uint64_t[UDD_COPY_WORDS]."""
        lib.udd_plan_copied(self.array, self.count, valid)


def fresh_batches(index: Index, matches: Matches, least: int, *, copied: bool) -> Iterator[Fresh]:
    """Matched pages without a slot yet, each digest once, COPY_MAX at a time; decided anew for each batch.

    Pages adjacent in memory follow each other, so slots given in this order are adjacent too. ``copied``: only pages
    whose copy came with their report.
    """
    position = ffi.new("size_t *")
    while True:
        array = ffi.new("struct udd_fresh[]", COPY_MAX)
        count = lib.udd_plan_fresh(index.handle, matches.array, matches.count, least, copied, position, array)
        if count == 0:
            return
        yield Fresh(array, count)


@attrs.frozen(eq=False)
class Targets:
    """Pages and the slots they are to be merged with, of one agent, sorted by address."""

    agent: int
    """Its number."""

    array: CData
    """struct udd_target[]."""

    count: int

    owner: CData
    """Keeps the memory of ``array``."""


def targets_of(index: Index, agent: int, matches: Matches) -> Targets:
    """Of the reported pages themselves, as far as their digest has a slot by now."""
    array = ffi.new("struct udd_target[]", matches.count)
    count = lib.udd_plan_targets(index.handle, agent, matches.array, matches.count, array)
    return Targets(agent, array, count, array)


def by_agent(array: CData, count: int) -> Iterator[Targets]:
    """Splits targets of several agents; sorts ``array``."""
    lib.udd_targets_sort(array, count)
    owner, array = array, array + 0
    while count:
        group = lib.udd_target_group(array, count)
        yield Targets(array[0].agent, array, group, owner)
        array += group
        count -= group


def without_targets(matches: Matches, targets: Targets) -> Matches:
    """Matches of other pages than the targets'. Takes ``matches`` apart."""
    count = lib.udd_matches_without(matches.array, matches.count, targets.array, targets.count)
    return Matches(matches.array, count)


@attrs.frozen
class Runs:
    """Stretches contiguous in memory and in the store, ascending."""

    array: CData
    """struct udd_run[], each of at most RUN_MAX pages."""

    count: int

    deferred: int = 0
    """Pages left out because their run was too short."""

    def segments(self) -> set[int]:
        """Distinct segments they lie in."""
        room = 16
        while True:
            numbers = ffi.new("uint32_t[]", room)
            count = lib.udd_run_segments(self.array, self.count, numbers, room)
            if count <= room:
                return set(numbers[0:count])
            room = count

    def without(self, segments: set[int]) -> "Runs":
        """Those that lie in none of ``segments``."""
        kept = [self.array[i] for i in range(self.count) if self.array[i].segment not in segments]
        return Runs(ffi.new("struct udd_run[]", kept), len(kept), self.deferred)

    def outside(self, agent: int, matches: Matches) -> Matches:
        """An agent's matched pages that are in none of them, as if they matched themselves."""
        array = ffi.new("struct udd_match[]", matches.count)
        left = lib.udd_matches_outside(agent, matches.array, matches.count, self.array, self.count, array)
        return Matches(array, left)

    def joined(self, other: "Runs") -> "Runs":
        """Both, which have no page in common."""
        array = ffi.new("struct udd_run[]", self.count + other.count)
        ffi.memmove(array, self.array, self.count * RUN_BYTES)
        ffi.memmove(array + self.count, other.array, other.count * RUN_BYTES)
        lib.udd_runs_sort(array, self.count + other.count)
        return Runs(array, self.count + other.count, self.deferred + other.deferred)

    def chunks(self, items: int) -> Iterator[tuple[CData, int]]:
        """Parts (struct udd_run *, count) of at most ``items`` runs."""
        for start in range(0, self.count, items):
            yield self.array + start, min(items, self.count - start)


def runs_of(targets: Targets, least: int) -> Runs:
    """Groups targets into runs; stretches of fewer than ``least`` pages are left out."""
    array = ffi.new("struct udd_run[]", targets.count)
    deferred = ffi.new("uint64_t *")
    count = lib.udd_plan_runs(targets.array, targets.count, least, array, deferred)
    return Runs(array, count, deferred[0])
