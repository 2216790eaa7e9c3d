"""The store of one trust domain: sealed memory segments that hold one copy of each shared page.

Slots are written and counted by native/engine/store.c. A segment ends by *retirement*: once few of its slots are still
referred to they are copied into newer segments, agents move their runs over (verifying again), and when nobody refers
to the old one it is closed. The kernel's own reference counts free the memory.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator

from udedup.engine.index import Index
from udedup.engine.native import CData, ffi, lib
from udedup.engine.wire import SEGMENT_BYTES, SEGMENT_SLOTS, check

MFD_NOEXEC_SEAL = 8  # linux/memfd.h
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h
SEGMENT_NAME = "udedup-store"

RETIRE_LIVE_FRACTION = 0.25
"""A full segment with a smaller part of its slots in use is retired."""


class SegmentNumbers:
    """Gives out segment numbers, which are never used twice while the engine lives."""

    def __init__(self) -> None:
        self.newest = 0
        """Highest number given out."""

    def take(self) -> int:
        """The next number."""
        self.newest += 1
        return self.newest


class Segment:
    """One sealed memfd of 16 MiB."""

    def __init__(self, number: int) -> None:
        self.number = number
        writable = os.memfd_create(f"{SEGMENT_NAME}-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
        try:
            os.ftruncate(writable, SEGMENT_BYTES)
            self._memory = mmap.mmap(writable, SEGMENT_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(
                writable,
                fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL,
            )
            self.descriptor = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
            """Read-only: what agents get."""
        finally:
            os.close(writable)
        self.base = ffi.from_buffer(self._memory)
        self.pins = 0
        """Merges under way that refer to it."""
        self.moves: CData | None = None
        """Once it retires: where its slots went, struct udd_move[]."""

    def release_pages(self) -> None:
        """Unmaps its pages from the engine, whose memory they would otherwise count as; they stay in the segment."""
        self._memory.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Gives the engine's hold on it back."""
        ffi.release(self.base)
        self._memory.close()
        os.close(self.descriptor)


class Store:
    """The segments of one domain."""

    def __init__(self, numbers: SegmentNumbers) -> None:
        self._numbers = numbers
        self.handle = ffi.gc(lib.udd_store_create(), lib.udd_store_destroy)
        if self.handle == ffi.NULL:
            raise MemoryError
        self.segments: dict[int, Segment] = {}
        """By number, retiring ones included."""
        self._current: Segment | None = None

    def writable(self) -> Segment:
        """The segment that takes the next slots; a new one if the last is full. Raises OSError."""
        if self._current is not None and self.state(self._current.number)[0] < SEGMENT_SLOTS:
            return self._current
        segment = Segment(self._numbers.take())
        check(lib.udd_store_add_segment(self.handle, segment.number, segment.base), "a new segment")
        if self._current is not None:
            self._current.release_pages()
        self.segments[segment.number] = segment
        self._current = segment
        return segment

    def state(self, number: int) -> tuple[int, int, int]:
        """Slots written, slots referred to, references."""
        state = ffi.new("struct udd_segment_state *")
        check(lib.udd_store_segment(self.handle, number, state), f"segment {number}")
        return state.used, state.live, state.references

    @property
    def live_slots(self) -> int:
        """Store pages in use."""
        return sum(self.state(number)[1] for number in self.segments)

    @property
    def used_slots(self) -> int:
        """Store pages written, dead ones included."""
        return sum(self.state(number)[0] for number in self.segments)

    def sparse(self) -> Iterator[Segment]:
        """Full segments worth retiring."""
        for segment in list(self.segments.values()):
            used, live, _ = self.state(segment.number)
            if segment is not self._current and segment.moves is None and live < RETIRE_LIVE_FRACTION * used:
                yield segment

    def begin_retirement(self, segment: Segment, index: Index) -> None:
        """Copies what is live in ``segment`` to newer ones; from here on nothing new is merged with it."""
        moves = ffi.new("struct udd_move[]", SEGMENT_SLOTS)
        position = ffi.new("uint32_t *")
        used, live, _ = self.state(segment.number)
        while live and position[0] < used:
            target = self.writable()
            check(
                lib.udd_store_move(self.handle, index.handle, segment.number, target.number, position, moves),
                f"moving segment {segment.number}",
            )
        index.forget_segment(segment.number)
        segment.moves = moves
        segment.release_pages()

    def finish_retirement(self) -> list[int]:
        """Closes retiring segments nobody refers to any more; returns their numbers."""
        finished = []
        for segment in list(self.segments.values()):
            if segment.moves is None or segment.pins or self.state(segment.number)[2]:
                continue
            check(lib.udd_store_remove_segment(self.handle, segment.number), f"closing segment {segment.number}")
            del self.segments[segment.number]
            segment.close()
            finished.append(segment.number)
        return finished

    def close(self) -> None:
        """Closes all segments. Agents keep what they have mapped."""
        for segment in self.segments.values():
            segment.close()
        self.segments.clear()
        self._current = None
