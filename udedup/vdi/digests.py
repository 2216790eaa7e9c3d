"""Digests of an image's 4 KiB blocks, in memory that costs only what has been read.

The table says what a block was when it was last digested, perhaps by an engine before this one. It is a hint, never a
promise: whoever merges on the strength of it compares bytes first.
"""

import mmap
from typing import Any, Final

from udedup._native import ffi, lib  # type: ignore[import-not-found, unused-ignore]

BLOCK_BYTES: Final = 4096
DIGEST_BYTES: Final = 16
PAGE_BLOCKS: Final = 256
"""Blocks whose digests make a page of the table, the unit in which they are kept on disk."""
PAGE_BYTES: Final = PAGE_BLOCKS * DIGEST_BYTES
EMPTY_PAGE: Final = bytes(PAGE_BYTES)
DROPPED_MAX: Final = 4096
"""Pages from which digests are dropped one by one: 4 GiB of the disk."""
# <asm-generic/mman.h>; Python's mmap module has it from 3.13 on.
MAP_NORESERVE: Final = 0x4000


class DigestTable:
    """16 bytes per block: the low, then the high half of its 128-bit digest, little endian; both 0 means not known.

    Anonymous memory, touched only where blocks have been read and not reserved beforehand, so that the table of a
    sparse 16 TiB image (64 GiB of addresses) takes a page per 256 blocks read. Raises OSError (ENOMEM) if even the
    addresses are refused.
    """

    def __init__(self, blocks: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.pages = max(-(-blocks // PAGE_BLOCKS), 1)
        self.memory = mmap.mmap(-1, self.pages * PAGE_BYTES, flags=flags)
        # One digest must not cost a huge page, which would stand for 512 MiB of image.
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._words = memoryview(self.memory).cast("Q")
        self._address = ffi.cast("uint64_t *", ffi.from_buffer(self.memory))
        self.unkept: set[int] = set()
        """Pages that have changed since whoever keeps them on disk has taken them out of here."""
        self.dropped: set[int] = set()
        """Those of them from which digests have been dropped."""
        self.emptied = False
        """Whether all have been dropped at once, so that what is kept of them is worthless."""

    def known(self, first: int, count: int) -> bool:
        """Whether the digests of all of blocks [first, first + count) are there.

        Ten times cheaper than computing them. Looks at the low halves only: a digest whose low half is 0 is taken
        for missing and merely computed again.
        """
        return 0 not in self._words[2 * first : 2 * (first + count) : 2].tolist()

    def compute(self, first: int, count: int, data: bytes | memoryview, skip: int) -> None:
        """Digests ``count`` blocks found in ``data`` from byte ``skip`` on and enters them from block ``first`` on."""
        lib.udd_digest_pages(ffi.from_buffer(data) + skip, count, self._address + 2 * first)
        self.fresh(first, count)

    def read(self, file: int, position: int, flags: int, room: Any, offset: int, size: int) -> int:
        """Reads ``size`` bytes of an image, which are at byte ``position`` of the open ``file``, into C's ``room``.

        ``offset`` is where they are in the image, ``flags`` are those of preadv2(2). 1: some of the whole blocks among
        them had no digest and have now, who calls has them kept by :meth:`fresh`; 0: all had. If the kernel didn't
        give all the bytes, a negative errno.
        """
        result: int = lib.udd_read_digested(file, position, flags, room, size, self._address, offset)
        return result

    def fresh(self, first: int, count: int) -> None:
        """The digests of these blocks are new: they are to be kept."""
        self.unkept.update(pages_of(first, count))

    def drop(self, first: int, count: int) -> None:
        """Forgets the digests of blocks [first, first + count), which have been written or discarded.

        If they are very many, all are forgotten: to remember which would take as much as to compute them again.
        """
        pages = pages_of(first, count)
        if len(pages) > DROPPED_MAX:
            self.clear()
            self.emptied = True
            return
        self._words[2 * first : 2 * (first + count)] = memoryview(bytes(count * DIGEST_BYTES)).cast("Q")
        self.unkept.update(pages)
        self.dropped.update(pages)

    def page(self, number: int) -> bytes:
        """A copy of a page: PAGE_BYTES."""
        return self.memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]

    def fill(self, number: int, digests: bytes) -> None:
        """Enters those digests of a page, PAGE_BYTES, that are not known yet."""
        lib.udd_fill_digests(self._address + number * 2 * PAGE_BLOCKS, ffi.from_buffer(digests), PAGE_BLOCKS)

    def clear(self) -> None:
        """Forgets all digests and gives the memory back."""
        self.memory.madvise(mmap.MADV_DONTNEED)
        self.unkept.clear()
        self.dropped.clear()


def pages_of(first: int, count: int) -> range:
    """The pages of the table that have the digests of blocks [first, first + count), at least one block."""
    return range(first // PAGE_BLOCKS, (first + count - 1) // PAGE_BLOCKS + 1)


def merge_digests(page: bytes, other: bytes) -> bytes:
    """``page`` with those digests from ``other`` that it lacks; both PAGE_BYTES."""
    merged = bytearray(page)
    lib.udd_fill_digests(ffi.cast("uint64_t *", ffi.from_buffer(merged)), ffi.from_buffer(other), PAGE_BLOCKS)
    return bytes(merged)
