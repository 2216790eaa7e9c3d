"""The store of one trust domain: sealed memory segments that hold one copy of each shared page.

Slots are written and counted by native/engine/store.c. A segment ends by *retirement*: once few of its slots are still
referred to they are copied into newer segments, agents move their runs over (verifying again), and when nobody refers
to the old one it is closed. The kernel's own reference counts free the memory.

Segments of an engine that is gone are taken over where ``udedup.engine.adoption`` finds that safe.
"""

import errno
import fcntl
import mmap
import os
from urllib.parse import quote

import attrs

from udedup.engine.compaction import Fill
from udedup.engine.index import Index
from udedup.engine.native import CData, ffi, lib
from udedup.engine.wire import SEGMENT_BYTES, SEGMENT_SLOTS, check

MFD_NOEXEC_SEAL = 8  # linux/memfd.h
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h
SEGMENT_NAME = "udedup-store"

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
"""Of every segment. Not F_SEAL_SEAL: the next engine, which takes it over, adds F_SEAL_WRITE."""

OWN_SUFFIX = "+own"
"""Behind the prefix, of segments with one agent's parked pages; quoted labels have no plus."""


def segment_prefix(owner: str, label: str) -> str:
    """How the memfds of a domain's segments are named, but for the number: it tells for good whose they are.

    ``owner``: without a hyphen, so that no two domains have the same prefix.
    """
    return f"{SEGMENT_NAME}-{owner}-{quote(label, safe='')}"


NUMBERS_END = 1 << 32
"""What the protocol has room for: 64 PiB of store, a hundred years at KSM's default rate."""


class SegmentNumbers:
    """Gives out segment numbers, which are never used twice while the engine lives.

    Nothing that is kept by segment is the larger for a high number (native/engine/numbered.h).
    """

    def __init__(self) -> None:
        self.newest = 0
        """Highest number given out."""

    def take(self) -> int:
        """The next number. Raises OSError when there is none left."""
        if self.newest + 1 == NUMBERS_END:
            raise OSError(errno.ENOSPC, "all numbers of segments are used up: start the engine anew")
        self.newest += 1
        return self.newest


@attrs.frozen
class Identity:
    """Which memory a descriptor is of, by fstat()."""

    device: int
    inode: int

    @classmethod
    def of(cls, descriptor: int) -> "Identity":
        """Of a memfd: a call that can't block."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino)


@attrs.frozen(eq=False)
class Inherited:
    """A segment of an earlier engine, proven safe."""

    descriptor: int
    """Read-only, our own."""

    digests: CData
    """uint64_t[2 * SEGMENT_SLOTS], of its slots; 0, 0 for those that are all zero."""

    used: int
    """Slots up to the last that is not."""


class Segment:
    """One sealed memfd of 16 MiB."""

    def __init__(
        self, number: int, descriptor: int, memory: mmap.mmap, *, settled_at: float = 0, owner: int = 0
    ) -> None:
        """See :meth:`create` and :meth:`inherit`; takes both over."""
        self.number = number
        self.owner = owner
        """Number of the one agent whose parked pages it has; 0: its pages are shared."""
        self.descriptor = descriptor
        """Read-only: what agents get."""
        self.identity = Identity.of(descriptor)
        self.settled_at = settled_at
        """When those who refer to it are all here (trio.current_time()); it is not retired before."""
        self._memory = memory
        self.base = ffi.from_buffer(memory)
        self.pins = 0
        """Merges under way that refer to it."""
        self.moves: CData | None = None
        """Once it retires: where its slots went, struct udd_move[]."""

    @classmethod
    def create(cls, number: int, prefix: str, owner: int) -> "Segment":
        """An empty one. Raises OSError."""
        writable = os.memfd_create(f"{prefix}-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
        try:
            # Agents of other users can't open it anew for writing, hence not add a seal that would be in the way later.
            os.fchmod(writable, 0o600)
            os.ftruncate(writable, SEGMENT_BYTES)
            memory = mmap.mmap(writable, SEGMENT_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, SEALS)
            descriptor = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
            return cls(number, descriptor, memory, owner=owner)
        finally:
            os.close(writable)

    @classmethod
    def inherit(cls, number: int, inherited: Inherited, *, settled_at: float) -> "Segment":
        """One of an earlier engine. Takes its descriptor over, also if it raises OSError."""
        try:
            memory = mmap.mmap(inherited.descriptor, SEGMENT_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError:
            os.close(inherited.descriptor)
            raise
        return cls(number, inherited.descriptor, memory, settled_at=settled_at)

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

    def __init__(self, numbers: SegmentNumbers, prefix: str) -> None:
        """``prefix``: see :func:`segment_prefix`."""
        self.prefix = prefix
        self._numbers = numbers
        self.handle = ffi.gc(lib.udd_store_create(), lib.udd_store_destroy)
        if self.handle == ffi.NULL:
            raise MemoryError
        self.segments: dict[int, Segment] = {}
        """By number, retiring ones included."""
        self._by_identity: dict[Identity, Segment] = {}
        self._current: dict[tuple[int, int], Segment] = {}
        """Which takes the next slots: by the agent that parks in it (0: nobody, it is shared), and see ``source``."""

    def writable(self, owner: int = 0, source: int = 0) -> Segment:
        """The segment that takes the next slots; a new one if the last is full. Raises OSError.

        ``owner``: of one agent's parked pages; 0: shared ones. ``source``: only such as came from that segment.
        """
        current = self._current.get((owner, source))
        if current is not None and self.state(current.number)[0] < SEGMENT_SLOTS:
            return current
        prefix = self.prefix + OWN_SUFFIX if owner else self.prefix
        segment = Segment.create(self._numbers.take(), prefix, owner)
        check(lib.udd_store_add_segment(self.handle, segment.number, segment.base), "a new segment")
        if owner:
            check(lib.udd_store_own_segment(self.handle, segment.number, owner), "a new segment")
        if current is not None:
            current.release_pages()
        self._keep(segment)
        self._current[owner, source] = segment
        return segment

    def close_own(self, owner: int) -> None:
        """An agent parks no more in the segment it has: it is gone, or has a child that knows the segment."""
        self._current.pop((owner, 0), None)

    def find(self, identity: Identity) -> Segment | None:
        """The segment with this memory."""
        return self._by_identity.get(identity)

    def inherit(self, inherited: Inherited, index: Index, *, settled_at: float) -> Segment:
        """Goes on with a segment of an earlier engine; takes its descriptor over. Raises OSError."""
        number = self._numbers.take()
        segment = Segment.inherit(number, inherited, settled_at=settled_at)
        adopted = lib.udd_store_adopt_segment(
            self.handle, index.handle, number, segment.base, inherited.used, inherited.digests
        )
        if adopted < 0:
            index.forget_segment(number)
            lib.udd_store_remove_segment(self.handle, number)
            segment.close()
        check(adopted, "a segment of an earlier engine")
        self._keep(segment)
        return segment

    def _keep(self, segment: Segment) -> None:
        self.segments[segment.number] = segment
        self._by_identity[segment.identity] = segment

    def state(self, number: int) -> tuple[int, int, int]:
        """Slots written, slots referred to, references."""
        state = ffi.new("struct udd_segment_state *")
        check(lib.udd_store_segment(self.handle, number, state), f"segment {number}")
        return state.used, state.live, state.references

    @property
    def live_slots(self) -> int:
        """Store pages in use."""
        return sum(self.state(number)[1] for number in self.segments)

    def dead_slots(self, owner: int) -> int:
        """Of an agent's own segments: slots not in use that nobody is about to give back yet."""
        states = [self.state(segment.number) for segment in self.segments.values() if segment.owner == owner]
        return sum(used - live for used, live, _ in states)

    @property
    def parked_slots(self) -> int:
        """Of them: with parked pages."""
        return sum(self.state(segment.number)[1] for segment in self.segments.values() if segment.owner)

    @property
    def used_slots(self) -> int:
        """Store pages written, dead ones included."""
        return sum(self.state(number)[0] for number in self.segments)

    def fills(self, now: float) -> list[Fill]:
        """Of all segments that may be retired."""
        growing = {segment.number for segment in self._current.values()}
        return [
            Fill(
                segment.number,
                *self.state(segment.number),
                growing=segment.number in growing,
                own=segment.owner != 0,
            )
            for segment in self.segments.values()
            if segment.moves is None and now >= segment.settled_at
        ]

    def begin_retirement(self, segment: Segment, index: Index) -> None:
        """From here on nothing new is merged with ``segment``."""
        self._current = {key: current for key, current in self._current.items() if current is not segment}
        index.forget_segment(segment.number)
        segment.moves = ffi.new("struct udd_move[]", SEGMENT_SLOTS)

    def continue_retirement(self, segment: Segment, index: Index, *, apart: bool) -> None:
        """Finds or makes another place for what is live in ``segment`` and has none yet. Raises OSError.

        Not only once: who was away may come back with references. ``apart``: its pages stay among themselves.
        """
        position = ffi.new("uint32_t *")
        used, live, _ = self.state(segment.number)
        while live and position[0] < used:
            target = self.writable(segment.owner, segment.number if apart else 0)
            check(
                lib.udd_store_move(self.handle, index.handle, segment.number, target.number, position, segment.moves),
                f"moving segment {segment.number}",
            )
        segment.release_pages()

    def finish_retirement(self) -> list[int]:
        """Closes retiring segments nobody refers to any more; returns their numbers."""
        finished = []
        for segment in list(self.segments.values()):
            if segment.moves is None or segment.pins or self.state(segment.number)[2]:
                continue
            check(lib.udd_store_remove_segment(self.handle, segment.number), f"closing segment {segment.number}")
            del self.segments[segment.number]
            del self._by_identity[segment.identity]
            self._current.pop((segment.owner, segment.number), None)
            segment.close()
            finished.append(segment.number)
        return finished

    def close(self) -> None:
        """Closes all segments. Agents keep what they have mapped."""
        # Shelves may outlive it.
        lib.udd_store_close(self.handle)
        for segment in self.segments.values():
            segment.close()
        self.segments.clear()
        self._by_identity.clear()
        self._current.clear()
