"""Blocks of an image that can be had from the store: verified once, served from memory from then on.

A thin cover over native/engine/shelf.c, which says why a digest is not enough and what a shelf relies on instead.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from weakref import WeakSet

import attrs

from udedup._native import ffi, lib  # type: ignore[import-not-found, unused-ignore]

SETTLE_SECONDS: Final = 2.0
"""How old a file's last change must be: the coarsest clock that file systems keep it by."""

BITS_MAX: Final = 64
"""Blocks that C answers for at once."""


class Watch:
    """The files that an image is read from, by their descriptors, which stay the caller's."""

    def __init__(self, descriptors: Sequence[int], settle_seconds: float = SETTLE_SECONDS) -> None:
        self.shelves: WeakSet[Shelf] = WeakSet()
        """That rely on it."""
        self.served = 0
        """Blocks that readers were given off them."""
        self.handle = ffi.gc(
            lib.udd_watch_create(list(descriptors), len(descriptors), int(settle_seconds * 1e9)), lib.udd_watch_destroy
        )
        if self.handle == ffi.NULL:
            raise MemoryError

    @property
    def epoch(self) -> int:
        """While it stays the same, the files do (0: that can't be told). Asks the kernel, but no disk and no server.

        Sees what is written by system calls; to a file that another program has mapped shared and writes to, only the
        first write after each write-back. A block device's writes don't show: its number is 0.
        """
        return int(lib.udd_watch_epoch(self.handle))

    def drop(self, first: int, count: int) -> None:
        """We ourselves give blocks [first, first + count) other content: no shelf has them any more.

        That is no new epoch. Who puts blocks on a shelf sees to it that they have not been written since they were
        read.
        """
        for shelf in self.shelves:
            shelf.drop(first, count)


@attrs.define
class ShelfCounters:
    """Blocks, cumulative, over all shelves that are given the same."""

    served: int = 0
    """Given to readers out of the store."""

    entered: int = 0
    """Found equal, byte for byte, to the store page with their digest."""

    differing: int = 0
    """Found to differ from the store page with their digest: somebody in the domain has made that page up."""


class Taken(NamedTuple):
    """What a shelf has of a read."""

    epoch: int
    """Of the image, in which it is what the image has."""

    data: memoryview | None
    """All of it, in place: valid until control is given up. None: it was put into the caller's room, but for …"""

    gaps: tuple[tuple[int, int], ...] = ()
    """… these bytes, [start, end) from the beginning of the read."""


class Shelf:
    """The blocks of one image that one trust domain's store has. All methods are for the loop's thread."""

    def __init__(
        self, watch: Watch, blocks: int, digests: object, *, store: Any, index: Any, counters: ShelfCounters
    ) -> None:
        """``digests``: of the image's blocks; ``store`` and ``index``: C's, of the domain. Raises MemoryError."""
        self.handle = ffi.gc(lib.udd_shelf_create(store, blocks), lib.udd_shelf_destroy)
        if self.handle == ffi.NULL:
            raise MemoryError
        self.watch = watch
        watch.shelves.add(self)
        self._digests = ffi.from_buffer("uint64_t[]", digests)
        self._index = index
        self._taken = ffi.new("struct udd_taken *")
        self._counts = ffi.new("struct udd_put_counts *")
        self._counters = counters

    def take(self, offset: int, size: int, room: Any) -> Taken | None:
        """What there is of a read of ``size`` bytes (at most 1 MiB) at byte ``offset``; None: nothing worth having.

        ``room``: C's address of ``size`` bytes, for what does not lie in one piece.
        """
        gaps = lib.udd_shelf_take(self.handle, self.watch.handle, offset, size, room, self._taken)
        if gaps < 0:
            return None
        taken = self._taken
        if not gaps:
            self.count_served(-(-size // lib.UDD_PAGE_SIZE))
            return Taken(taken.epoch, memoryview(ffi.buffer(taken.data, size)))
        left = tuple((taken.gaps[i].start, taken.gaps[i].end) for i in range(gaps))
        self.count_served((size - sum(end - start for start, end in left)) // lib.UDD_PAGE_SIZE)
        return Taken(taken.epoch, None, left)

    def count_served(self, blocks: int) -> None:
        """So many blocks were given to readers off it."""
        self._counters.served += blocks
        self.watch.served += blocks

    def there(self, first: int, count: int) -> int:
        """A bit for each of the blocks [first, first + count) that is there."""
        return join_bits(first, count, lambda start, part: lib.udd_shelf_there(self.handle, start, part))

    def nominees(self, first: int, count: int) -> int:
        """Likewise, also of those that may be there once they are compared."""
        return join_bits(
            first,
            count,
            lambda start, part: lib.udd_shelf_nominees(self.handle, self._index, self._digests, start, part),
        )

    def put(self, first: int, count: int, data: bytes | memoryview, skip: int, epoch: int) -> int:
        """Compares ``count`` blocks, from ``first`` on, with the store and enters those that it has.

        Their bytes are in ``data`` from byte ``skip`` on, and were read after the watch had given ``epoch``. Returns
        how many of them are on the shelf now.
        """
        counts = self._counts
        counts.entered = counts.differing = 0
        there = lib.udd_shelf_put(
            self.handle,
            self.watch.handle,
            epoch,
            self._index,
            self._digests,
            first,
            count,
            ffi.from_buffer(data) + skip,
            counts,
        )
        self._counters.entered += counts.entered
        self._counters.differing += counts.differing
        return int(there)

    def drop(self, first: int, count: int) -> None:
        """Takes blocks [first, first + count) off."""
        lib.udd_shelf_drop(self.handle, first, count)


def join_bits(first: int, count: int, ask: Callable[[int, int], int]) -> int:
    """What ``ask(start, part)`` says of all parts of the blocks [first, first + count), as one number."""
    parts = range(0, count, BITS_MAX)
    return sum(ask(first + start, min(BITS_MAX, count - start)) << start for start in parts)
