"""The tables of an image's map, read when needed and kept in bounds: a page of 4 KiB at a time, the oldest goes.

A page of qcow2's second level stands for 32 MiB of disk at its usual cluster size, one of VDI's map for 1 GiB. So the
map of a sparse disk of 16 TiB costs what has been read of it, and at most 1 MiB.
"""

import sys
import threading
from array import array
from collections import OrderedDict
from typing import Final, Literal

from udedup.vdi.formats.layer import bad_map
from udedup.vdi.formats.raw import RawFile

PAGE_BITS: Final = 12
PAGE_BYTES: Final = 1 << PAGE_BITS
PAGES_MAX: Final = 256


class TableCache:
    """Tables of whole numbers within a file, aligned to their size; used by several threads."""

    def __init__(self, file: RawFile, kind: Literal["Q", "I"], order: Literal["big", "little"]) -> None:
        """``kind`` is that of array.array: Q has 8 bytes, I has 4."""
        self._file = file
        self._kind = kind
        self._swap = order != sys.byteorder
        self._pages: OrderedDict[int, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pages)

    def page(self, position: int, *, wait: bool) -> "array[int] | None":
        """The entries of the page around byte ``position``, fewer if the file ends in it.

        None if it must be read from the disk and ``wait`` is False. Raises OSError if the file ends before that byte.
        """
        entries = self._page(position >> PAGE_BITS, wait=wait)
        if entries is not None and (position & PAGE_BYTES - 1) // entries.itemsize >= len(entries):
            raise bad_map(f"a table at byte {position} is beyond the end of the file")
        return entries

    def forget(self) -> None:
        """Drops all pages."""
        self._pages = OrderedDict()

    def _page(self, number: int, *, wait: bool) -> "array[int] | None":
        pages = self._pages
        with self._lock:
            entries = pages.get(number)
            if entries is not None:
                pages.move_to_end(number)
                return entries
        entries = self._read(number << PAGE_BITS, wait=wait)
        if entries is not None:
            with self._lock:
                # Into the pages of before, should they have been forgotten meanwhile.
                pages[number] = entries
                if len(pages) > PAGES_MAX:
                    pages.popitem(last=False)
        return entries

    def _read(self, start: int, *, wait: bool) -> "array[int] | None":
        raw = self._file.read_some(start, PAGE_BYTES, wait=wait)
        if raw is None:
            return None
        entries = array(self._kind)
        entries.frombytes(raw[: len(raw) - len(raw) % entries.itemsize])
        if self._swap:
            entries.byteswap()
        return entries


def read_numbers(file: RawFile, offset: int, count: int, kind: Literal["Q", "H"]) -> "array[int]":
    """``count`` big-endian numbers from byte ``offset`` on; what is behind the end of the file is 0. Raises OSError."""
    numbers = array(kind)
    size = count * numbers.itemsize
    numbers.frombytes((file.read_some(offset, size, wait=True) or b"").ljust(size, b"\0"))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def to_big_endian(numbers: "array[int]") -> bytes:
    """The bytes that :func:`read_numbers` reads."""
    copy = numbers[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()
