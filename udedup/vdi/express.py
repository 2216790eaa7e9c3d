"""Reads that C answers by itself, because Python has answered one like it: see native/engine/express.c.

An :class:`ExpressImage` is what C must know of an image for that; it learns it from reads that Python answers. What
can change under it is forgotten at once: whoever reads next asks Python again.
"""

import mmap
from typing import TYPE_CHECKING, Any, Final

from udedup._native import ffi, lib  # type: ignore[import-not-found, unused-ignore]
from udedup.vdi.digests import MAP_NORESERVE

if TYPE_CHECKING:
    from udedup.vdi.formats.raw import RawFile

UNKNOWN: Final = -1
"""Instead of flags: how the file is to be read."""
PLACE_BYTES: Final = 8
PLACES_MAX: Final = 1 << 32
"""Of a map: 32 GiB of addresses. Larger ones, of very small clusters, are left to Python."""


class ExpressImage:
    """One image, for C."""

    def __init__(self, size: int, digests: object, piece_bits: int | None) -> None:
        """``size`` in bytes; ``digests``: see :class:`DigestTable`; ``piece_bits``: see :class:`Layer`.

        Raises OSError if there are no addresses for the map.
        """
        self._bits = piece_bits or 0
        places = -(-size >> self._bits)
        self._usable = piece_bits is not None and (not piece_bits or places <= PLACES_MAX)
        self._mask = (1 << self._bits) - 1
        self._map: memoryview | None = None
        self._memory: mmap.mmap | None = None
        self._keep = ffi.from_buffer(digests)
        self.struct = ffi.new("struct udd_express_image *")
        self.struct.size, self.struct.flags, self.struct.cluster_bits = size, UNKNOWN, self._bits
        self.struct.digests = ffi.cast("uint64_t *", self._keep)
        if self._usable and self._bits:
            # Takes memory where something was read only: 8 bytes for each cluster of the image's format.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            self._memory = mmap.mmap(-1, max(places, 1) * PLACE_BYTES, flags=flags)
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
            self._map = memoryview(self._memory).cast("Q")
            self.struct.map = ffi.cast("uint64_t *", ffi.from_buffer(self._memory))

    def found(self, file: "RawFile", position: int, flags: int, offset: int) -> None:
        """The bytes at ``offset`` of the disk have been read from ``position`` of a file, always the same one."""
        if not self._usable:
            return
        struct = self.struct
        struct.file, struct.flags = file.descriptor, flags
        if self._map is not None:
            self._map[offset >> self._bits] = position - (offset & self._mask) + 1

    def doubt(self) -> None:
        """The file may have to be read in another way."""
        self.struct.flags = UNKNOWN

    def forget(self) -> None:
        """The bytes may be elsewhere."""
        self.doubt()
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)


def enter(file: int, image: ExpressImage, shelf: Any = ffi.NULL, watch: Any = ffi.NULL) -> None:
    """Has C answer reads of an open file. What it is given must live until it leaves."""
    lib.udd_express_enter(file, image.struct, shelf, watch)
