"""What an opened image can do, whatever its format: say where its bytes are, and read them.

An image is an *offset map*: for every byte, the source and the offset where it is found. A source is a file, zeros,
or a helper process for what only QEMU can decode. Maps are looked up in the loop's own thread and must not wait for
a disk there, hence ``wait``.
"""

import errno
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from udedup.vdi.formats.raw import RawFile

DEPTH_MAX: Final = 64
"""Files in a chain of backing files."""


class Source(Protocol):
    """Where bytes come from. Sources are read from several threads at once."""

    def read_cached(self, view: memoryview, offset: int) -> bool:
        """Fills ``view`` from byte ``offset`` on if that needs no waiting, else returns False.

        Raises OSError if the medium has failed.
        """

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills ``view`` from byte ``offset`` on, waiting for the disk. Raises OSError, EIO if bytes are missing."""

    def data_at(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether anything but zeros can be at ``offset``, and for how many of ``length`` bytes that goes."""


class Extent(NamedTuple):
    """A stretch of an image that lies in one piece. (source, offset) is what a block is, whoever asks for it."""

    source: Source
    offset: int
    """Bytes, in the source."""
    length: int
    """Bytes, at least 1."""


class Zeros:
    """The source of what was never written."""

    def read_cached(self, view: memoryview, offset: int) -> bool:
        view[:] = bytes(len(view))
        return True

    def read_into(self, view: memoryview, offset: int) -> None:
        view[:] = bytes(len(view))

    def data_at(self, offset: int, length: int) -> tuple[bool, int]:
        return False, length


ZEROS: Final = Zeros()


class Layer(ABC):
    """An image, or one file of its chain."""

    size: int
    """Bytes of the disk."""

    encrypted: bool = False
    """Whether the file has something else than the disk's bytes, for others not to read."""

    piece_bits: int | None = None
    """Of any offset within 2^piece_bits bytes of the disk, :meth:`piece` has the same piece; 0: the file is the disk.

    None: it has none. All are in one file.
    """

    below: "Layer | None" = None
    """What shows where this one has nothing: its backing file or parent."""

    @abstractmethod
    def lookup(self, offset: int, length: int, *, wait: bool) -> Extent | None:
        """Where the bytes from ``offset`` on are, up to ``length`` of them: the first stretch in one piece.

        [offset, offset + length) must lie inside the disk. None if finding out takes the disk and ``wait`` is False.
        Raises OSError, EIO for a map that can't be true.
        """

    def piece(self, offset: int, length: int) -> "tuple[RawFile, int] | None":
        """The file that has these bytes in one piece, and where in it, if that is at hand; None: see :meth:`lookup`.

        The usual case made short. The bytes may be beyond the end of the file.
        """
        return None

    @abstractmethod
    def forget(self) -> None:
        """Drops what is remembered of the map: a file has changed."""

    @abstractmethod
    def close(self) -> None:
        """Closes the files of this layer and of those below."""

    def read_cached(self, view: memoryview, offset: int) -> bool:
        """As :meth:`Source.read_cached`."""
        size = len(view)
        piece = self.piece(offset, size)
        # False behind the end of the file, too: the long way finds out what to make of that.
        if piece is not None:
            file, position = piece
            return file.read_cached(view, position)
        done = 0
        while done < size:
            extent = self.lookup(offset + done, size - done, wait=False)
            if extent is None:
                return False
            source, start, length = extent
            # The usual case, one extent, is one system call on the view as it is.
            part = view if length == size else view[done : done + length]
            if not source.read_cached(part, start):
                return False
            done += length
        return True

    def read_into(self, view: memoryview, offset: int) -> None:
        """As :meth:`Source.read_into`."""
        done, size = 0, len(view)
        while done < size:
            extent = self.lookup(offset + done, size - done, wait=True)
            assert extent is not None
            extent.source.read_into(view[done : done + extent.length], extent.offset)
            done += extent.length

    def stretch(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether there is data from ``offset`` on, and for how many bytes, up to ``length``, that is so.

        There is none where the map, or the file system of the file it leads to, has nothing but zeros. Waits for the
        disk. Raises OSError.
        """
        extent = self.lookup(offset, length, wait=True)
        assert extent is not None
        return extent.source.data_at(extent.offset, extent.length)

    def fall_through(self, offset: int, length: int, *, wait: bool) -> Extent | None:
        """:meth:`lookup` in the layer below for what this one does not hold; zeros where there is none."""
        below = self.below
        if below is None or offset >= below.size:
            return Extent(ZEROS, 0, length)
        return below.lookup(offset, min(length, below.size - offset), wait=wait)


def bad_map(text: str) -> OSError:
    """The error for a map that can't be true."""
    return OSError(errno.EIO, f"the image is corrupt: {text}")


def ends_early() -> OSError:
    """The error for bytes that the file no longer has."""
    return OSError(errno.EIO, "image file ends early")


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both are of the same file."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
