"""VirtualBox's VDI, version 1.1: fixed, dynamic and differencing.

A map of 32-bit numbers says which block of the file each block of the disk is, or that there is none: then the parent
shows, if there is one. The layout is told in QEMU's block/vdi.c and VirtualBox's VDICore.h.
"""

import struct
import uuid
from typing import Final

import attrs

from udedup.errors import UdedupError
from udedup.vdi.formats.layer import ZEROS, Extent, Layer
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.formats.tables import PAGE_BYTES, TableCache

SIGNATURE: Final = b"\x7f\x10\xda\xbe"
SIGNATURE_OFFSET: Final = 0x40
HEADER_BYTES: Final = 512
VERSION: Final = 0x0001_0001

DYNAMIC: Final = 1
FIXED: Final = 2
DIFFERENCING: Final = 4

FREE: Final = 0xFFFF_FFFF
ZERO: Final = 0xFFFF_FFFE
BLOCK_BYTES: Final = range(1 << 12, (1 << 28) + 1)


@attrs.frozen
class Header:
    """What the first 512 bytes say."""

    size: int
    """Bytes of the disk."""
    kind: int
    """DYNAMIC, FIXED or DIFFERENCING."""
    map_offset: int
    """Bytes from the start of the file."""
    data_offset: int
    """Of the first block, likewise."""
    block: int
    """Bytes of disk in a block, a power of two."""
    extra: int
    """Bytes before them in each block of the file."""
    identity: uuid.UUID
    """Of this image."""
    modified: uuid.UUID
    """Changes with what is in it."""
    parent: uuid.UUID
    """Identity of the parent; zeros if there is none."""
    parent_modified: uuid.UUID
    """What ``modified`` of the parent was when this image was made."""


def parse_header(raw: bytes, subject: str) -> Header:
    """Reads a header. Raises UdedupError, which begins with ``subject``, for what can't be true or is not known."""
    if len(raw) < HEADER_BYTES:
        raise UdedupError(f"{subject}: is cut off in its VDI header")
    signature, version, _, kind = struct.unpack_from("<4sIII", raw, SIGNATURE_OFFSET)
    if signature != SIGNATURE:
        raise UdedupError(f"{subject}: is not VDI")
    if version != VERSION:
        raise UdedupError(f"{subject}: is VDI of version {version >> 16}.{version & 0xFFFF}; only 1.1 is known")
    if kind not in (DYNAMIC, FIXED, DIFFERENCING):
        raise UdedupError(f"{subject}: is VDI of type {kind}; fixed, dynamic and differencing ones are known")
    map_offset, data_offset = struct.unpack_from("<II", raw, 0x154)
    size, block, extra, blocks = struct.unpack_from("<QIII", raw, 0x170)
    if not 0 < size < 1 << 62:
        raise UdedupError(f"{subject}: its header gives a disk of {size} bytes, which can't be served")
    if block not in BLOCK_BYTES or block & block - 1 or extra % 512 or extra > block:
        raise UdedupError(f"{subject}: its header gives blocks of {extra} + {block} bytes, which can't be")
    if blocks < -(-size // block):
        raise UdedupError(f"{subject}: its map has {blocks} entries, too few for {size} bytes of disk")
    if map_offset < HEADER_BYTES or map_offset % 512 or data_offset % 512 or data_offset < map_offset + 4 * blocks:
        raise UdedupError(f"{subject}: its map is at byte {map_offset}, its blocks at {data_offset}, which can't be")
    identity, modified, parent, parent_modified = (
        uuid.UUID(bytes_le=raw[start : start + 16]) for start in range(0x188, 0x1C8, 16)
    )
    if kind == DIFFERENCING and not parent.int:
        raise UdedupError(f"{subject}: is a differencing VDI that names no parent")
    return Header(
        size=size,
        kind=kind,
        map_offset=map_offset,
        data_offset=data_offset,
        block=block,
        extra=extra,
        identity=identity,
        modified=modified,
        parent=parent,
        parent_modified=parent_modified,
    )


class Vdi(Layer):
    """One VDI file."""

    def __init__(self, header: Header, file: RawFile, below: Layer | None) -> None:
        self.header = header
        self.size = header.size
        self.below = below
        self._file = file
        self._tables = TableCache(file, "I", "little")

    def forget(self) -> None:
        self._tables.forget()
        self._file.forget()
        if self.below is not None:
            self.below.forget()

    def close(self) -> None:
        self._file.close()
        if self.below is not None:
            self.below.close()

    def lookup(self, offset: int, length: int, *, wait: bool) -> Extent | None:
        header = self.header
        block = header.block
        number, within = divmod(offset, block)
        position = header.map_offset + 4 * number
        page = self._tables.page(position, wait=wait)
        if page is None:
            return None
        first = (position & PAGE_BYTES - 1) >> 2
        entries = page[first : first + (within + length + block - 1) // block]
        entry = entries[0]
        count, run = len(entries), 1
        # Blocks that follow each other in the file are in one piece only if nothing is between them.
        step = 0 if entry >= ZERO else 1
        while run < count and entries[run] == entry + step * run and (entry >= ZERO or not header.extra):
            run += 1
        length = min(length, run * block - within)
        if entry == FREE:
            return self.fall_through(offset, length, wait=wait)
        if entry == ZERO:
            return Extent(ZEROS, 0, length)
        start = header.data_offset + entry * (header.extra + block) + header.extra
        return self._file.place(start + within, length, (start, start + block))
