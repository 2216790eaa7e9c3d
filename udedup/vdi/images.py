"""Disk images as the mount shows them: raw, read-only unless they are clones, whatever their format.

An image keeps the size it had when it was added, whatever becomes of its files: a guest's disk doesn't change its
size. Reads beyond what a file has left fail with EIO. The descriptors stay open, so an image that is renamed,
replaced or deleted goes on being served as it was.
"""

import itertools
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import attrs
import trio

from udedup.errors import UdedupError
from udedup.vdi.digests import BLOCK_BYTES, DigestTable
from udedup.vdi.formats.layer import same_file
from udedup.vdi.formats.probe import Opened, Opening, open_chain
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.paths import file_size

log = logging.getLogger(__name__)

# Inode 1 is the root directory (FUSE_ROOT_ID).
FIRST_INODE: Final = 2
NAME_BYTES_MAX: Final = 255
# Endings of names that speak of the format; the mount shows raw disks.
FORMAT_SUFFIXES: Final = frozenset((".qcow2", ".qcow", ".img", ".vdi", ".vmdk", ".vhd", ".vpc", ".vhdx"))

AS_FOUND: Final = Opening()


@attrs.frozen
class FileStamp:
    """What tells that a file's content may have changed."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, nanoseconds since the epoch. Writes to a block device don't show in it."""


@attrs.frozen
class Stamp:
    """The same of an image: of its file and of those it rests on."""

    files: tuple[FileStamp, ...]
    in_place: bool
    """Whether the image's path, and that of each file below, still leads to the file that was opened."""

    @property
    def mtime_ns(self) -> int:
        """When the last of the files changed, nanoseconds since the epoch."""
        return max(file.mtime_ns for file in self.files)


class Image:
    """One image, open for reading. Made by :meth:`Images.add`."""

    def __init__(self, name: str, path: Path, inode: int, opened: Opened) -> None:
        self.name = name
        self.path = path
        self.inode = inode
        """In the mount."""
        self.format = opened.format
        """In QEMU's words."""
        self.touched = False
        """Read since this was last set to False."""
        self.generation = 0
        """How often the digests have been dropped."""
        self.openers: Counter[int] = Counter()
        """How many open files it has in the mount, by the process that opened them."""
        self._layer = opened.layer
        self._files = opened.files
        self.size = opened.layer.size
        """Bytes of the disk, as of when the image was added."""
        self._stamp = self.examine()
        self._reported: set[str] = set()
        self._table = DigestTable(self.size // BLOCK_BYTES)
        self.digests = self._table.memory
        """16 bytes per whole 4 KiB block, see :class:`DigestTable`. A last partial block has none."""

    @property
    def mtime_ns(self) -> int:
        """When the file last changed as far as is known, nanoseconds since the epoch."""
        return self._stamp.mtime_ns

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of all files it is read from, itself first."""
        return tuple(file.path for file in self._files)

    @property
    def owner(self) -> tuple[int, int]:
        """User and group of the file."""
        status = self._files[0].status
        return status.st_uid, status.st_gid

    @property
    def mode(self) -> int:
        """Permission bits of the file."""
        return stat.S_IMODE(self._files[0].status.st_mode)

    def read_cached(self, view: memoryview, offset: int) -> bool:
        """Fills ``view`` from byte ``offset`` on if that needs no disk access; False if it does (or can't be told).

        For a stretch that lies in one piece it costs one system call. Never sleeps. Raises OSError if the medium has
        failed.
        """
        return self._layer.read_cached(view, offset)

    def read(self, offset: int, size: int) -> memoryview:
        """Reads ``size`` bytes at ``offset``, waiting for the disk; for threads that trio has started.

        Raises OSError if the medium fails, and with EIO if a file has been cut short or the image is corrupt.
        """
        view = memoryview(bytearray(size))
        self._layer.read_into(view, offset)
        return view

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

    def written(self, offset: int, length: int) -> None:
        """Bytes [offset, offset + length) have changed: what was known of their content is forgotten.

        Called when the change is complete, so that who was reading meanwhile can't bring it back.
        """
        self.generation += 1
        self.drop_digests(offset, length)

    def drop_digests(self, offset: int, length: int) -> None:
        """Forgets the digests of all blocks that have a part in [offset, offset + length): written, or discarded."""
        first = offset // BLOCK_BYTES
        count = min(-(-(offset + length) // BLOCK_BYTES), self.size // BLOCK_BYTES) - first
        if count > 0:
            self._table.drop(first, count)

    def examine(self) -> Stamp:
        """Looks at the files and at their paths; may wait for the disk."""
        return stamp_of(self._files)

    def update(self, stamp: Stamp) -> None:
        """Drops the digests and what is known of the map if a file is no longer what it was; warns the first time.

        Correctness doesn't hang on the digests: a stale one makes a merge fail its comparison, no more.
        """
        before, self._stamp = self._stamp, stamp
        if stamp.files != before.files:
            self._table.clear()
            self._layer.forget()
            self.generation += 1
            self.report("changed", "has changed while mounted: its digests are dropped")
        if isinstance(self._layer, RawFile) and stamp.files[0].size < self.size:
            self.report("cut", f"was cut short from {self.size} to {stamp.files[0].size} bytes: reads beyond fail")
        if not stamp.in_place:
            self.report("moved", "is no longer at its path: the file that was opened goes on being served")

    def closed_by(self, pid: int) -> None:
        """One open file fewer."""
        self.openers[pid] -= 1
        if not self.openers[pid]:
            del self.openers[pid]

    def report(self, topic: str, text: str) -> None:
        """Logs a warning about this image, once per topic."""
        if topic not in self._reported:
            self._reported.add(topic)
            log.warning("image %s %s", self.path, text)

    def close(self) -> None:
        """Closes the files. Nothing can be read any more."""
        self._layer.close()


def stamp_of(files: Iterable[RawFile]) -> Stamp:
    """What some files are like now."""
    stamps = [examine_file(file) for file in files]
    return Stamp(tuple(stamp for stamp, _ in stamps), all(in_place for _, in_place in stamps))


def examine_file(file: RawFile) -> tuple[FileStamp, bool]:
    """What a file is like now, and whether it is still at its path."""
    status = os.fstat(file.descriptor)
    try:
        in_place = same_file(file.path.stat(), status)
    except OSError:
        in_place = False
    return FileStamp(file_size(file.descriptor, status), status.st_mtime_ns), in_place


AnyImage = TypeVar("AnyImage", bound=Image)


class Images:
    """The images of one mount, by name and by inode."""

    def __init__(self) -> None:
        self.by_inode: dict[int, Image] = {}
        self.by_name: dict[str, Image] = {}
        self.mount_device: int | None = None
        """st_dev of the mount that shows them, once there is one."""
        self.examining = trio.Lock()
        """Held while the files of an image that may not be open in the mount are looked at."""
        # Held while a name is being claimed: images may be added from several threads.
        self._lock = threading.Lock()
        # Never used again: the kernel may remember one for a while.
        self._inodes = itertools.count(FIRST_INODE)

    def __iter__(self) -> Iterator[Image]:
        return iter(list(self.by_inode.values()))

    def __len__(self) -> int:
        return len(self.by_inode)

    def add(self, path: Path, name: str | None = None, opening: Opening = AS_FOUND) -> Image:
        """Opens the image at ``path`` and shows it in the mount as ``name`` (default: see :func:`shown_name`).

        Waits for the disk: once the mount is being served call it in a worker thread, or a slow disk (or a path that
        leads into the mount itself) stalls the server. Raises UdedupError if name or file won't do.
        """
        path = path.absolute()
        if name is not None:
            check_name(name, path)
        opened = open_chain(path, opening)
        try:
            if name is None:
                name = shown_name(path, opened.format)
                check_name(name, path)
            return self.admit(name, path, opened, Image)
        except BaseException:
            opened.layer.close()
            raise

    def admit(
        self, name: str, path: Path, opened: Opened, kind: Callable[[str, Path, int, Opened], AnyImage]
    ) -> AnyImage:
        """Shows what was opened at ``path`` as ``name``, as the ``kind`` of image it is. Raises UdedupError."""
        for file in opened.files:
            if file.status.st_dev == self.mount_device:
                what = "is" if file.path == path else f"rests on {file.path}, which is"
                raise UdedupError(f"image {path}: {what} served by this mount itself; name the original file")
        with self._lock:
            if name in self.by_name:
                other = self.by_name[name].path
                raise UdedupError(f"image {path}: the name {name!r} is taken by {other}; choose another with NAME=PATH")
            try:
                image = kind(name, path, next(self._inodes), opened)
            except OSError as error:
                raise UdedupError(f"image {path}: no room for its digests: {error.strerror}") from error
            self.by_inode[image.inode] = image
            self.by_name[name] = image
        return image

    def find(self, wanted: str) -> Image:
        """The image that is shown as ``wanted`` or whose path that is. Raises UdedupError unless it is exactly one.

        Paths are compared as text, since the disk they are on might not answer.
        """
        if wanted in self.by_name:
            return self.by_name[wanted]
        found = [image for image in self if os.path.normpath(image.path) == os.path.normpath(wanted)]
        if not found:
            raise UdedupError(f"image {wanted!r}: is not in the mount; `udedup status` lists those that are")
        if len(found) > 1:
            names = ", ".join(image.name for image in found)
            raise UdedupError(f"image {wanted!r}: is in the mount several times; choose one of {names}")
        return found[0]

    def remove(self, image: Image) -> None:
        """Takes an image that nobody has open out of the mount. What it was read from stays open."""
        assert not image.openers
        del self.by_inode[image.inode]
        del self.by_name[image.name]

    def close(self) -> None:
        """Closes and forgets all images; for when the mount is gone."""
        for image in self:
            image.close()
        self.by_inode.clear()
        self.by_name.clear()


def shown_name(path: Path, format_: str) -> str:
    """What the mount calls the image at ``path``: a raw one by its name, others by what they are there, ``….raw``."""
    if format_ == "raw":
        return path.name
    return (path.stem if path.suffix.lower() in FORMAT_SUFFIXES else path.name) + ".raw"


def check_name(name: str, path: Path) -> None:
    """Raises UdedupError if ``name`` can't be a file name in the mount."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise UdedupError(f"image {path}: {name!r} can't be a file name; choose another one with NAME=PATH")
    if len(os.fsencode(name)) > NAME_BYTES_MAX:
        raise UdedupError(f"image {path}: its name has more than {NAME_BYTES_MAX} bytes; choose another with NAME=PATH")
