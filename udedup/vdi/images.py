"""Disk images as the mount shows them: raw, read-only unless they are clones, whatever their format.

An image keeps the size it had when it was added, whatever becomes of its files: a guest's disk doesn't change its
size. Reads beyond what a file has left fail with EIO. The descriptors stay open, so an image that is renamed,
replaced or deleted goes on being served as it was.
"""

import errno
import itertools
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import trio

from udedup.errors import UdedupError
from udedup.vdi.digests import BLOCK_BYTES, DigestTable
from udedup.vdi.express import ExpressImage
from udedup.vdi.formats.layer import Layer, same_file
from udedup.vdi.formats.probe import Opened, Opening, open_chain
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.keeping import Kept
from udedup.vdi.paths import file_size
from udedup.vdi.shelf import Watch
from udedup.vdi.sidecar import FileIdentity, Identity, digest_of_path
from udedup.vdi.state import StateDirectory

log = logging.getLogger(__name__)

# Inode 1 is the root directory (FUSE_ROOT_ID).
FIRST_INODE: Final = 2
NAME_BYTES_MAX: Final = 255
FLUSH_SECONDS: Final = 5.0
"""How often digests are written to sidecars."""
DISK_BYTES_MAX: Final = 1 << 50
"""Tables stand for every block: the addresses for those of a few absurd disks would be all that the engine has."""
END_SECONDS: Final = 10.0
"""How long that may take at the end."""
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
        self.blocks_read = 0
        """Through the mount, by programs."""
        self.direct_opens = 0
        """How many of the open files pass by the mount's page cache."""
        self.openers: Counter[int] = Counter()
        """How many open files it has in the mount, by the process that opened them."""
        self._layer = opened.layer
        self._files = opened.files
        self.size = opened.layer.size
        """Bytes of the disk, as of when the image was added."""
        self.watch = Watch(self.descriptors)
        """Tells at once whether the files have changed."""
        self._stamp = self.examine()
        self._reported: set[str] = set()
        self.blocks = self.size // BLOCK_BYTES
        """Whole ones."""
        self._table = DigestTable(self.blocks)
        self.digests = self._table.memory
        """16 bytes per whole 4 KiB block, see :class:`DigestTable`. A last partial block has none."""
        self.express = ExpressImage(self.size, self.digests, self._layer.piece_bits)
        """What C knows of it."""
        self.on_changed: Callable[[Image], None] = ignore
        """Told when the files have changed."""
        self.kept: Kept | None = None
        """Where the digests are kept when the image isn't mounted."""

    @property
    def identity(self) -> Identity | None:
        """What its digests belong to; None if they must not be kept.

        Nothing shows a change of a block device, and digests of what somebody has encrypted tell of its content.
        """
        layers: list[Layer] = [self._layer]
        while (below := layers[-1].below) is not None:
            layers.append(below)
        devices = any(stat.S_ISBLK(file.status.st_mode) for file in self._files)
        if devices or any(layer.encrypted for layer in layers):
            return None
        files = zip(self._files, self._stamp.files, strict=True)
        return Identity(self.format, self.size, tuple(identify(file, stamp) for file, stamp in files))

    @property
    def unkept(self) -> bool:
        """Whether there are digests to be kept."""
        return self.kept is not None and bool(self._table.unkept or self._table.emptied)

    def keep(self, state: StateDirectory, on_want: Callable[[], None]) -> None:
        """Keeps the digests in ``state``, if they may be; ``on_want`` as for :class:`Kept`."""
        identity = self.identity
        if identity is not None:
            self.kept = Kept(state, self.path, self._table, identity, on_want)

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

    @property
    def foreign(self) -> tuple[RawFile, ...]:
        """Those of the open files it is read from that others may change."""
        return self._files

    @property
    def descriptors(self) -> list[int]:
        """Of these."""
        return [file.descriptor for file in self.foreign]

    def read_cached(self, view: memoryview, offset: int) -> bool:
        """Fills ``view`` from byte ``offset`` on if that needs no disk access; False if it does (or can't be told).

        For a stretch that lies in one piece it costs one system call. Never sleeps. Raises OSError if the medium has
        failed.
        """
        return self._layer.read_cached(view, offset)

    def read_digested(self, view: memoryview, room: Any, offset: int) -> bool:
        """:meth:`read_cached` and :meth:`note_digests` in one; ``room`` is C's address of ``view``."""
        size = len(view)
        piece = self._layer.piece(offset, size)
        flags = None if piece is None else piece[0].flags
        if piece is not None and flags is not None:
            file, position = piece
            fresh = self._table.read(file.descriptor, position, flags, room, offset, size)
            if fresh > 0:
                first, count = blocks_within(offset, size)
                self._want(first, count)
                self._table.fresh(first, count)
            if fresh >= 0:
                self.express.found(file, position, flags, offset)
            if fresh >= 0 or fresh == -errno.EAGAIN:
                return fresh >= 0
        # What is not in one piece, and errors.
        if not self.read_cached(view, offset):
            return False
        self.note_digests(offset, view)
        return True

    def read(self, offset: int, size: int) -> memoryview:
        """Reads ``size`` bytes at ``offset``, waiting for the disk; for threads that trio has started.

        Raises OSError if the medium fails, and with EIO if a file has been cut short or the image is corrupt.
        """
        view = memoryview(bytearray(size))
        self._layer.read_into(view, offset)
        return view

    def drop_digests(self, offset: int, length: int) -> None:
        """Forgets all blocks that have a part in [offset, offset + length), which are written, or discarded.

        Their digests, that is, and that the store has them.
        """
        first = offset // BLOCK_BYTES
        count = min(-(-(offset + length) // BLOCK_BYTES), self.blocks) - first
        if count > 0:
            self._table.drop(first, count)
            self.watch.drop(first, count)

    def data_from(self, offset: int) -> int:
        """The first byte from ``offset`` on where there is data, as far as maps tell; the disk's size if there is none.

        Waits for the disk, as :meth:`hole_from`. Raises OSError.
        """
        return self._search(offset, self.size, data=True)

    def hole_from(self, offset: int, end: int) -> int:
        """The first byte from ``offset`` on where there is no data, ``end`` if there is data up to there."""
        return self._search(offset, end, data=False)

    def _search(self, offset: int, end: int, *, data: bool) -> int:
        while offset < end:
            found, length = self._layer.stretch(offset, end - offset)
            if found is data:
                break
            offset += length
        return offset

    def read_once(self) -> None:
        """Tells the kernel that what is read from now on needs not stay in memory for others."""
        for file in self._files:
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_NOREUSE)

    def read_gaps(self, view: memoryview, offset: int, gaps: Sequence[tuple[int, int]]) -> None:
        """Fills the bytes [start, end) of ``view``, which begins at byte ``offset``, as :meth:`read` would."""
        for start, end in gaps:
            self._layer.read_into(view[start:end], offset + start)

    def note_digests(self, offset: int, data: bytes | memoryview) -> tuple[int, int]:
        """Sees to it that the whole blocks within ``data``, read at byte ``offset``, have digests.

        Returns the first such block and their number, which is 0 if ``data`` covers none.
        """
        first, count = blocks_within(offset, len(data))
        if not count:
            return first, 0
        if not self._table.known(first, count):
            self._want(first, count)
            self._table.compute(first, count, data, first * BLOCK_BYTES - offset)
        return first, count

    def _want(self, first: int, count: int) -> None:
        """Asks for what is kept on disk around these blocks, which had no digests."""
        if self.kept is not None:
            self.kept.want(first, count)

    def noteworthy(self, generation: int, offset: int, size: int) -> bool:
        """Whether bytes read since ``generation`` at ``offset`` are still what is there, so that they may be noted."""
        return generation == self.generation

    def examine(self) -> Stamp:
        """Looks at the files and at their paths; may wait for the disk."""
        stamps = [examine_file(file) for file in self.foreign]
        return Stamp(tuple(stamp for stamp, _ in stamps), all(in_place for _, in_place in stamps))

    def update(self, stamp: Stamp) -> None:
        """Drops the digests and what is known of the map if a file is no longer what it was; warns the first time.

        Correctness doesn't hang on the digests: a stale one makes a merge fail its comparison, no more.
        """
        before, self._stamp = self._stamp, stamp
        if stamp.files != before.files:
            self.changed()
        if isinstance(self._layer, RawFile) and stamp.files[0].size < self.size:
            self.report("cut", f"was cut short from {self.size} to {stamp.files[0].size} bytes: reads beyond fail")
        if not stamp.in_place:
            self.report("moved", "is no longer at its path: the file that was opened goes on being served")

    def changed(self) -> None:
        """The files have been changed: what was known of their content is forgotten, by agents too."""
        self._table.clear()
        self._layer.forget()
        self.express.forget()
        self.generation += 1
        if self.kept is not None and (identity := self.identity) is not None:
            self.kept.changed(identity)
        self.report("changed", "has changed while mounted: its digests are dropped")
        self.on_changed(self)

    def forget_digests(self) -> None:
        """Gives their memory back; who reads the blocks next has them computed anew."""
        self._table.clear()

    def opened_by(self, pid: int, *, direct: bool) -> None:
        """One open file more."""
        self.openers[pid] += 1
        self.direct_opens += direct
        self._pass_on()

    def closed_by(self, pid: int, *, direct: bool) -> None:
        """One open file fewer."""
        self.direct_opens -= direct
        self._pass_on()
        self.openers[pid] -= 1
        if not self.openers[pid]:
            del self.openers[pid]

    def _pass_on(self) -> None:
        """Has the files themselves cached by the kernel while, and only while, there is a reader whom that serves.

        What others read is in the mount's page cache, and twice would be one copy too many.
        """
        for file in self._files:
            file.passing = not self.direct_opens
        self.express.doubt()

    def report(self, topic: str, text: str) -> None:
        """Logs a warning about this image, once per topic."""
        if topic not in self._reported:
            self._reported.add(topic)
            log.warning("image %s %s", self.path, text)

    def close(self) -> None:
        """Closes the files. Nothing can be read any more."""
        self._layer.close()


def blocks_within(offset: int, size: int) -> tuple[int, int]:
    """The first of the whole blocks in a read, and their number, which may be 0."""
    first = -(-offset // BLOCK_BYTES)
    return first, max((offset + size) // BLOCK_BYTES - first, 0)


def examine_file(file: RawFile) -> tuple[FileStamp, bool]:
    """What a file is like now, and whether it is still at its path."""
    status = os.fstat(file.descriptor)
    try:
        in_place = same_file(file.path.stat(), status)
    except OSError:
        in_place = False
    return FileStamp(file_size(file.descriptor, status), status.st_mtime_ns), in_place


def identify(file: RawFile, stamp: FileStamp) -> FileIdentity:
    """What tells a file from others and from itself at other times."""
    status = file.status
    return FileIdentity(digest_of_path(file.path), status.st_dev, status.st_ino, stamp.size, stamp.mtime_ns)


async def examine(image: Image, limiter: trio.CapacityLimiter | None = None) -> bool:
    """Has a worker thread see whether the files of an image have changed, and draws the conclusions.

    False if they can't be looked at; that is reported.
    """
    try:
        stamp = await trio.to_thread.run_sync(image.examine, abandon_on_cancel=True, limiter=limiter)
    except OSError as error:
        image.report("examine", f"can't be examined for changes: {error.strerror}")
        return False
    image.update(stamp)
    return True


AnyImage = TypeVar("AnyImage", bound=Image)


class Images:
    """The images of one mount, by name and by inode."""

    def __init__(self, state: StateDirectory | None = None) -> None:
        self.state = state
        """Where digests are kept, None: nowhere."""
        self.wanting = trio.Event()
        """Set when some are to be loaded."""
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
        self.on_changed: Callable[[Image], None] = ignore
        """Told of images whose files have changed while mounted."""

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
        if opened.layer.size > DISK_BYTES_MAX:
            raise UdedupError(
                f"image {path}: its disk has {opened.layer.size} bytes, and {DISK_BYTES_MAX} (1 PiB) are the most"
            )
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
                image.on_changed = lambda changed: self.on_changed(changed)
            except OSError as error:
                raise UdedupError(f"image {path}: no room for its digests: {error.strerror}") from error
            if self.state is not None:
                image.keep(self.state, self._want)
            self.by_inode[image.inode] = image
            self.by_name[name] = image
        return image

    def _want(self) -> None:
        self.wanting.set()

    @asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """While in it, digests are loaded from sidecars when wanted, and written to them, for the last time at the end.

        The end takes some END_SECONDS at most.
        """
        if self.state is None:
            yield
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._load_digests)
                nursery.start_soon(self._write_digests)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._finish_digests()

    async def _finish_digests(self) -> None:
        with trio.move_on_after(END_SECONDS):
            for image in self:
                await self.flush(image)
        for image in self:
            if image.kept is not None:
                await image.kept.close()

    async def _load_digests(self) -> None:
        while True:
            await self.wanting.wait()
            self.wanting = trio.Event()
            for image in self:
                if image.kept is not None:
                    await image.kept.load()

    async def _write_digests(self) -> None:
        while True:
            await trio.sleep(FLUSH_SECONDS)
            for image in self:
                await self.flush(image)

    async def flush(self, image: Image) -> None:
        """Writes the digests of an image that are new to its sidecar."""
        async with self.examining:
            # It may have been taken out while others were examined.
            if image.kept is not None and image.unkept and image.inode in self.by_inode and await examine(image):
                await image.kept.flush(image.mtime_ns)

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


def ignore(_image: Image) -> None:
    """Nobody wants to know."""


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
