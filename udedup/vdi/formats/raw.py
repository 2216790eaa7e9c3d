"""Raw files and block devices: what they hold is the disk. All other formats lie in one and read it through this."""

import errno
import os
from pathlib import Path
from typing import Final

from udedup.vdi.formats.layer import ZEROS, Extent, Layer, ends_early
from udedup.vdi.paths import file_size

RWF_DONTCACHE: Final = 0x80
"""linux/fs.h, from Linux 6.14 on. Python's os has it from 3.15 on."""


class RawFile(Layer):
    """A file open for reading; owns the descriptor, which may be closed with :meth:`close` only."""

    piece_bits = 0

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.status = os.fstat(descriptor)
        """As of when it was opened."""
        self.size = file_size(descriptor, self.status)
        self._end = self.size
        self.passing = False
        """Whether what is read for others is not to stay in the page cache: they have it cached themselves.

        What was there before stays. What the kernel has read ahead for us goes when it is first read, whoever does.
        """
        self._nowait = True
        self._can_pass = True

    def lookup(self, offset: int, length: int, *, wait: bool) -> Extent:
        return Extent(self, offset, length)

    def piece(self, offset: int, length: int) -> tuple["RawFile", int]:
        return self, offset

    @property
    def flags(self) -> int | None:
        """Those of preadv2(2) with which it is read if that needs no disk; None if it can't be told."""
        if not self._nowait:
            return None
        return os.RWF_NOWAIT | RWF_DONTCACHE if self.passing and self._can_pass else os.RWF_NOWAIT

    def read_cached(self, view: memoryview, offset: int) -> bool:
        """Costs one system call and never sleeps."""
        return self._read_nowait(view, offset, passing=self.passing)

    def _read_nowait(self, view: memoryview, offset: int, *, passing: bool) -> bool:
        if not self._nowait:
            return False
        flags = RWF_DONTCACHE if passing and self._can_pass else 0
        try:
            return os.preadv(self.descriptor, [view], offset, os.RWF_NOWAIT | flags) == len(view)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            if flags:
                self._can_pass = False
                return self._read_nowait(view, offset, passing=False)
            self._nowait = False
            return False

    def read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            more = self._read_waiting(view[done:], offset + done)
            if not more:
                raise ends_early()
            done += more

    def data_at(self, offset: int, length: int) -> tuple[bool, int]:
        """By the file system's word; it may take holes for data."""
        try:
            data = os.lseek(self.descriptor, offset, os.SEEK_DATA)
            if data > offset:
                return False, min(length, data - offset)
            return True, min(length, os.lseek(self.descriptor, offset, os.SEEK_HOLE) - offset)
        except OSError as error:
            # ENXIO: there is no data any more.
            return (False, length) if error.errno == errno.ENXIO else (True, length)

    def _read_waiting(self, view: memoryview, offset: int) -> int:
        if self.passing and self._can_pass:
            try:
                return os.preadv(self.descriptor, [view], offset, RWF_DONTCACHE)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._can_pass = False
        return os.preadv(self.descriptor, [view], offset)

    def read_some(self, offset: int, size: int, *, wait: bool) -> bytes | None:
        """Up to ``size`` bytes, fewer at the end of the file; None if that takes the disk and ``wait`` is False."""
        if wait:
            return os.pread(self.descriptor, size, offset)
        buffer = bytearray(size)
        # Of maps, which nobody else keeps.
        if self._read_nowait(memoryview(buffer), offset, passing=False):
            return bytes(buffer)
        # What is short may be the end of the file: a worker thread finds out.
        return None

    def place(self, offset: int, length: int, unit: tuple[int, int]) -> Extent:
        """The extent of up to ``length`` bytes that a map places at ``offset``.

        ``unit`` is where the allocation unit around ``offset`` starts and ends. QEMU leaves the last unit of a file
        unwritten behind the last byte it was given: such a remainder reads as zeros. Raises OSError if the unit
        starts beyond the end: the file was cut short, or the map can't be true.
        """
        start, end = unit
        if offset < self._end:
            return Extent(self, offset, min(length, self._end - offset))
        if start >= self._end:
            raise ends_early()
        return Extent(ZEROS, 0, min(length, end - offset))

    def forget(self) -> None:
        """Looks where the file ends now. The disk keeps its size."""
        self._end = file_size(self.descriptor, os.fstat(self.descriptor))

    def close(self) -> None:
        os.close(self.descriptor)
