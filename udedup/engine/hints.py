"""The hint stack: pages with new content, the newest of each agent first, and as many of each as of the others.

A thin cover over native/engine/hints.c, which says how it works.
"""

import mmap
import time
from collections.abc import Iterator

import attrs

from udedup.engine.native import CData, ffi, lib
from udedup.engine.wire import PAGE, check


@attrs.frozen
class Hinted:
    """Popped hints of one agent, sorted by address, a page each."""

    agent: int
    """Its number."""

    array: CData
    """struct udd_hinted[]."""

    count: int

    owner: CData
    """Keeps the memory of ``array``."""

    def split(self) -> tuple[CData, int, CData, int]:
        """Known digests as struct udd_report[], their number; the rest as struct udd_range[], their number."""
        reports = ffi.new("struct udd_report[]", self.count)
        ranges = ffi.new("struct udd_range[]", self.count)
        report_count, range_count = ffi.new("size_t *"), ffi.new("size_t *")
        lib.udd_hinted_split(self.array, self.count, reports, report_count, ranges, range_count)
        return reports, report_count[0], ranges, range_count[0]


@attrs.frozen
class Drained:
    """What came out of a ring."""

    hints: int
    """Records taken."""

    dropped: int
    """Records lost: overwritten or malformed."""

    armed: bool
    """Whether one more doorbell may come."""

    more: bool
    """Whether something is left, or came in meanwhile."""


class HintRing:
    """The reading end of one agent's place hints."""

    def __init__(self, ring: CData) -> None:
        self.ring = ring
        self.reader = ffi.new("struct udd_hint_reader *")

    @property
    def waiting(self) -> bool:
        """Whether there is something to drain."""
        return bool(lib.udd_hints_waiting(self.ring, self.reader))


class HintStack:
    """Bounded; the newest hint comes out first, the oldest of who has most falls off."""

    def __init__(self, slots: int) -> None:
        self._handle = ffi.gc(lib.udd_hints_create(slots), lib.udd_hints_destroy)
        if self._handle == ffi.NULL:
            raise MemoryError
        # By inode: C has their addresses.
        self._digests: dict[int, CData] = {}

    def __len__(self) -> int:
        """Pages that can be popped."""
        return int(lib.udd_hints_depth(self._handle))

    @property
    def overwritten(self) -> int:
        """Pages that fell off, cumulative."""
        return int(lib.udd_hints_overwritten(self._handle))

    def add_image(self, inode: int, digests: mmap.mmap, size: int) -> None:
        """Makes hints on an image of the mount meet the digests of its blocks; ``size`` in bytes."""
        if size < PAGE:
            return
        view = ffi.from_buffer(digests)
        check(
            lib.udd_hints_add_image(self._handle, inode, ffi.cast("uint64_t *", view), size // PAGE),
            "an image's digests",
        )
        self._digests[inode] = view

    def remove_image(self, inode: int) -> None:
        """Undoes :meth:`add_image`; hints on the image lose their digests."""
        lib.udd_hints_remove_image(self._handle, inode)
        self._digests.pop(inode, None)

    def read(self, agent: int, inode: int, block: int, blocks: int) -> int:
        """Blocks of an image were just read, perhaps in page faults: hints on where ``agent`` has them mapped.

        Returns their number.
        """
        pushed: int = lib.udd_hints_read(self._handle, agent, inode, block, blocks, time.monotonic_ns())
        return pushed

    def drain(self, agent: int, ring: HintRing, *, pages: int, arm: bool) -> Drained:
        """Takes in up to ``pages`` pages of an agent's ring; ``arm``: have it ring for the next hint.

        Raises AgentError if the ring lies.
        """
        counts = ffi.new("struct udd_drain_counts *")
        more = check(
            lib.udd_hints_drain(self._handle, agent, ring.ring, ring.reader, pages, arm, counts),
            "the head of its hint ring",
        )
        return Drained(counts.hints, counts.dropped, bool(counts.armed), bool(more))

    def pop(self, pages: int) -> Iterator[Hinted]:
        """Takes up to ``pages`` pages, as many of each agent as of the others and its newest, grouped by agent."""
        popped = ffi.new("struct udd_hinted[]", min(pages, len(self)))
        left = lib.udd_hints_pop(self._handle, len(popped), popped)
        array = popped + 0
        while left:
            count = lib.udd_hinted_group(array, left)
            yield Hinted(array[0].agent, array, count, popped)
            array += count
            left -= count

    def hold(self, agent: int, hold: bool) -> None:
        """Pops nothing of an agent for now, or does so again."""
        check(lib.udd_hints_hold(self._handle, agent, hold), "a place for an agent's hints")

    def forget_agent(self, agent: int) -> None:
        """Removes an agent's hints."""
        lib.udd_hints_forget_agent(self._handle, agent)

    def clear(self) -> int:
        """Removes all hints and gives their memory back; returns how many pages they were of."""
        return int(lib.udd_hints_clear(self._handle))
