"""Disk images as the mount shows them: raw files and block devices, opened read-only.

An image keeps the size it had when it was added, whatever becomes of its file: a guest's disk doesn't change its
size. Reads beyond what the file has left fail with EIO. The descriptor stays open, so an image that is renamed,
replaced or deleted goes on being served as it was.
"""

import errno
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from udedup.errors import UdedupError
from udedup.vdi.digests import BLOCK_BYTES, DigestTable

log = logging.getLogger(__name__)

# Inode 1 is the root directory (FUSE_ROOT_ID).
FIRST_INODE: Final = 2
NAME_BYTES_MAX: Final = 255


@attrs.frozen
class Stamp:
    """What tells that a file's content may have changed."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, nanoseconds since the epoch. Writes to a block device don't show in it."""
    in_place: bool
    """Whether the image's path still leads to the file that was opened."""


class Image:
    """One raw image, open for reading. Made by :meth:`Images.add`."""

    def __init__(self, name: str, path: Path, inode: int, descriptor: int) -> None:
        self.name = name
        self.path = path
        self.inode = inode
        """In the mount."""
        self.touched = False
        """Read since this was last set to False."""
        self.generation = 0
        """How often the digests have been dropped."""
        self._descriptor = descriptor
        self._status = os.fstat(descriptor)
        self.size = file_size(descriptor, self._status)
        """Bytes, as of when the image was added."""
        self._stamp = self.examine()
        self._nowait = True
        self._reported: set[str] = set()
        self._table = DigestTable(self.size // BLOCK_BYTES)
        self.digests = self._table.memory
        """16 bytes per whole 4 KiB block, see :class:`DigestTable`. A last partial block has none."""

    @property
    def mtime_ns(self) -> int:
        """When the file last changed as far as is known, nanoseconds since the epoch."""
        return self._stamp.mtime_ns

    @property
    def owner(self) -> tuple[int, int]:
        """User and group of the file."""
        return self._status.st_uid, self._status.st_gid

    @property
    def mode(self) -> int:
        """Permission bits of the file."""
        return stat.S_IMODE(self._status.st_mode)

    def read_cached(self, view: memoryview, offset: int) -> bool:
        """Fills ``view`` from byte ``offset`` on if that needs no disk access; False if it does (or can't be told).

        Costs one system call and never sleeps. Raises OSError if the medium has failed.
        """
        if not self._nowait:
            return False
        try:
            return os.preadv(self._descriptor, [view], offset, os.RWF_NOWAIT) == len(view)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._nowait = False
            return False

    def read(self, offset: int, size: int) -> bytes:
        """Reads ``size`` bytes at ``offset``, waiting for the disk.

        Raises OSError if the medium fails, and with EIO if the file has been cut short.
        """
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "image file ends early", str(self.path))
            data += more
        return data

    def note_digests(self, offset: int, data: bytes | memoryview) -> tuple[int, int]:
        """Sees to it that the whole blocks within ``data``, read at byte ``offset``, have digests.

        Returns the first such block and their number, which is 0 if ``data`` covers none.
        """
        first = -(-offset // BLOCK_BYTES)
        count = (offset + len(data)) // BLOCK_BYTES - first
        if count <= 0:
            return first, 0
        if not self._table.known(first, count):
            self._table.compute(first, count, data, first * BLOCK_BYTES - offset)
        return first, count

    def examine(self) -> Stamp:
        """Looks at the file and at its path; may wait for the disk."""
        status = os.fstat(self._descriptor)
        try:
            found = self.path.stat()
            in_place = (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)
        except OSError:
            in_place = False
        return Stamp(file_size(self._descriptor, status), status.st_mtime_ns, in_place)

    def update(self, stamp: Stamp) -> None:
        """Drops the digests if the file is no longer what it was, and warns the first time.

        Correctness doesn't hang on it: a stale digest makes a merge fail its comparison, no more.
        """
        before, self._stamp = self._stamp, stamp
        if (stamp.size, stamp.mtime_ns) != (before.size, before.mtime_ns):
            self._table.clear()
            self.generation += 1
            self.report("changed", "has changed while mounted: its digests are dropped")
        if stamp.size < self.size:
            self.report("cut", f"was cut short from {self.size} to {stamp.size} bytes: reads beyond fail")
        if not stamp.in_place:
            self.report("moved", "is no longer at its path: the file that was opened goes on being served")

    def report(self, topic: str, text: str) -> None:
        """Logs a warning about this image, once per topic."""
        if topic not in self._reported:
            self._reported.add(topic)
            log.warning("image %s %s", self.path, text)

    def close(self) -> None:
        """Closes the file. Nothing can be read any more."""
        os.close(self._descriptor)


class Images:
    """The images of one mount, by name and by inode. Images are only ever added."""

    def __init__(self) -> None:
        self.by_inode: dict[int, Image] = {}
        self.by_name: dict[str, Image] = {}
        self.mount_device: int | None = None
        """st_dev of the mount that shows them, once there is one."""
        # Held while a name is being claimed: images may be added from several threads.
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Image]:
        return iter(list(self.by_inode.values()))

    def __len__(self) -> int:
        return len(self.by_inode)

    def add(self, path: Path, name: str | None = None) -> Image:
        """Opens the image at ``path`` and shows it in the mount as ``name`` (default: its file name).

        Waits for the disk: once the mount is being served call it in a worker thread, or a slow disk (or a path that
        leads into the mount itself) stalls the server. Raises UdedupError if name or file won't do.
        """
        path = path.absolute()
        name = path.name if name is None else name
        check_name(name, path)
        descriptor = open_image(path)
        try:
            return self._admit(name, path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _admit(self, name: str, path: Path, descriptor: int) -> Image:
        if os.fstat(descriptor).st_dev == self.mount_device:
            raise UdedupError(f"image {path}: is served by this mount itself; name the original file")
        with self._lock:
            if name in self.by_name:
                other = self.by_name[name].path
                raise UdedupError(f"image {path}: the name {name!r} is taken by {other}; choose another with NAME=PATH")
            try:
                image = Image(name, path, FIRST_INODE + len(self.by_inode), descriptor)
            except OSError as error:
                raise UdedupError(f"image {path}: no room for its digests: {error.strerror}") from error
            self.by_inode[image.inode] = image
            self.by_name[name] = image
        return image

    def close(self) -> None:
        """Closes and forgets all images; for when the mount is gone."""
        for image in self:
            image.close()
        self.by_inode.clear()
        self.by_name.clear()


def check_name(name: str, path: Path) -> None:
    """Raises UdedupError if ``name`` can't be a file name in the mount."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise UdedupError(f"image {path}: {name!r} can't be a file name; choose another one with NAME=PATH")
    if len(os.fsencode(name)) > NAME_BYTES_MAX:
        raise UdedupError(f"image {path}: its name has more than {NAME_BYTES_MAX} bytes; choose another with NAME=PATH")


def open_image(path: Path) -> int:
    """Opens a regular file or block device for reading; raises UdedupError for anything else."""
    try:
        # Looked at before it is opened: opening a pipe or a tape drive has effects.
        check_kind(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UdedupError(f"image {path}: can't be opened: {error.strerror}") from error
    try:
        check_opened(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_opened(path: Path, descriptor: int) -> None:
    """Raises UdedupError if what has been opened is no image after all, or has no bytes."""
    status = os.fstat(descriptor)
    check_kind(path, status.st_mode)
    if file_size(descriptor, status) == 0:
        raise UdedupError(f"image {path}: is empty; there is nothing to mount")


def check_kind(path: Path, mode: int) -> None:
    """Raises UdedupError if ``mode`` is neither a regular file's nor a block device's."""
    if stat.S_ISDIR(mode):
        raise UdedupError(f"image {path}: is a directory; give a raw image file or a block device")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UdedupError(f"image {path}: is neither a regular file nor a block device")


def file_size(descriptor: int, status: os.stat_result) -> int:
    """Bytes in a file, or in a block device (for which stat says 0)."""
    return os.lseek(descriptor, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size
