"""The FUSE file system: one flat directory of disk images, served in the caller's trio loop.

Images are read-only; clones can be written, in place.

What is read from an image is digested on its way, and the reader's process is told to ``on_read``: the content hint.
A read is answered from the loop's own thread if the image file's data is in the page cache (one preadv2 that refuses
to wait), otherwise by a worker thread, so that a slow disk never holds up the engine.
"""

import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import attrs
import pyfuse3
import trio

from udedup._native import ffi, lib  # type: ignore[import-not-found, unused-ignore]
from udedup.errors import UdedupError
from udedup.fallocate import KEEP_SIZE
from udedup.vdi import express, requests
from udedup.vdi import mountpoint as mountpoints
from udedup.vdi.clone import Clone
from udedup.vdi.digests import BLOCK_BYTES
from udedup.vdi.fastpoll import fast_poll
from udedup.vdi.fixed import FixedDirectory, refuse
from udedup.vdi.holders import name_holders
from udedup.vdi.images import NAME_BYTES_MAX, Image, Images, blocks_within, examine
from udedup.vdi.openers import NoShelves, Opener, ShelfSource
from udedup.vdi.requests import Data, Rest
from udedup.vdi.shelf import Shelf
from udedup.vdi.tidy import Tidier
from udedup.vdi.watching import Watcher

log = logging.getLogger(__name__)

OnRead = Callable[[Image, int, int, int], None]

# The largest read FUSE asks for: 256 pages.
READ_BYTES_MAX: Final = 1 << 20
BUFFER_BYTES_LEAST: Final = 1 << 17
"""What a buffer has at least that is given back at once."""
# Names never vanish and inodes never change; a changed image's mtime must get through (the kernel then drops what it
# has cached of it).
ENTRY_SECONDS: Final = 3600.0
ATTRIBUTE_SECONDS: Final = 1.0
# How often the files of images that have been read are examined for changes, …
EXAMINE_SECONDS: Final = 1.0
# … and how often at most those of which inotify tells that they have changed.
NOTICE_SECONDS: Final = 0.1
# Every so many times that images which have been read are examined, those that are only open are examined as well.
OPEN_TURNS: Final = 3
# How long a write may stay in memory if nobody asks for it to be on the disk.
SETTLE_SECONDS: Final = 5.0
# Reads that wait for disks at the same time; apart from trio's own limit, so that they can't use up the threads of the
# rest of the engine.
DISK_THREADS: Final = 16
PREPARE_SECONDS: Final = 10.0
RELEASE_SECONDS: Final = 1.0


@attrs.define(eq=False)
class Handle:
    """One open file."""

    image: Image
    """What is open."""
    opener: Opener
    """Process that opened it; those it has forked share it."""
    direct: bool
    """Whether its reads pass by the kernel's page cache."""
    own: bool
    """Whether we opened it ourselves."""
    shelf: Shelf | None = None
    """What it may be served from."""
    asked: int = -1
    """The turn of the shelves when it was last asked for."""

    @property
    def pid(self) -> int:
        """Of the opener. 0 if unknown."""
        return self.opener.pid


@attrs.frozen
class Read:
    """One read that a shelf has not all of."""

    handle: Handle
    offset: int
    """Bytes, in the image."""
    size: int
    """Bytes."""
    generation: int
    """Of the image when it began."""
    epoch: int
    """Likewise, of its watch."""


class ImageFilesystem(FixedDirectory):
    """Answers the kernel's requests. Handlers raise FUSEError only; what else they raise ends the mount."""

    def __init__(self, images: Images, on_read: OnRead, shelves: ShelfSource, *, allow_other: bool) -> None:
        super().__init__()
        self.tidier = Tidier(images, self._among_friends)
        self.handles: dict[int, Handle] = {}
        self._images = images
        self._on_read = on_read
        self._shelves = shelves
        self._allow_other = allow_other
        self._watcher = Watcher()
        self._numbers = itertools.count(1)
        self._limiter = trio.CapacityLimiter(DISK_THREADS)
        # Every answer from the page cache is built here. That is safe because pyfuse3 hands the returned view to the
        # kernel before it gives up control.
        self._buffer = memoryview(bytearray(READ_BYTES_MAX))
        self._room = ffi.from_buffer(self._buffer)
        self._done = ffi.new("struct udd_express_done[]", lib.UDD_EXPRESS_BATCH)
        self._turn = shelves.turn
        lib.udd_express_begin(self._room, READ_BYTES_MAX)

    async def watch(self) -> None:
        """Examines images that are being read, or might be in page faults that the kernel serves, until cancelled.

        Once a second and in a worker thread, not on every read: a stat on each costs 7% of a 4 KiB read, and no
        frequency would make digests trustworthy, since a write can follow any check (and a block device has no mtime).
        """
        for turn in itertools.count(1):
            await trio.sleep(EXAMINE_SECONDS)
            self._watcher.keep_only(self._images.by_inode.keys())
            for image in self._images:
                if image.touched or (image.openers and turn % OPEN_TURNS == 0):
                    image.touched = False
                    await self._examine(image)

    async def notice(self) -> None:
        """Examines images whose files have been changed, as inotify tells, until cancelled."""
        while True:
            for inode in await self._watcher.changed():
                image = self._images.by_inode.get(inode)
                if image is not None:
                    # First, or a change in between would go unnoticed.
                    self._watcher.watch(inode, image.descriptors)
                    await self._examine(image)
            await trio.sleep(NOTICE_SECONDS)

    async def _examine(self, image: Image) -> None:
        async with self._images.examining:
            # It may have been taken out while others were examined.
            if image.inode in self._images.by_inode:
                await examine(image, self._limiter)

    def close(self) -> None:
        """Stops watching files."""
        self._watcher.close()

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._root_attributes() if inode == pyfuse3.ROOT_INODE else self._attributes(self._image(inode))

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name in (b".", b".."):
            return self._root_attributes()
        # The kernel doesn't remember a name that is not there (there is no entry to give a timeout for), so an image
        # added later shows at once.
        image = self._images.by_name.get(os.fsdecode(name))
        if image is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(image)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: images stay as long as the mount."""

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for image in self._images:
            # Inodes ascend in the order of adding and are never used again: they do as positions.
            if image.inode > start_id and not pyfuse3.readdir_reply(
                token, os.fsencode(image.name), self._attributes(image), image.inode
            ):
                return

    async def releasedir(self, fh: int) -> None:
        """Nothing is held for an open directory."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK_BYTES
        answer.f_blocks = sum(-(-image.size // BLOCK_BYTES) for image in self._images)
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = len(self._images)
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = NAME_BYTES_MAX
        return answer

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        image = self._image(inode)
        if (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC) and not isinstance(image, Clone):
            refuse()
        handle = Handle(
            image,
            Opener.of(process_of(ctx.pid), ctx.uid),
            direct=bool(flags & os.O_DIRECT),
            own=ctx.pid == self.tidier.thread[0],
        )
        # Counts from now on: while it is examined nobody may take it out of the mount.
        image.opened_by(handle.pid, direct=handle.direct)
        try:
            self._watcher.watch(inode, image.descriptors)
            await examine(image, self._limiter)
        except BaseException:
            image.closed_by(handle.pid, direct=handle.direct)
            raise
        number = next(self._numbers)
        self.handles[number] = handle
        return pyfuse3.FileInfo(fh=number, keep_cache=True)

    async def flush(self, fh: int) -> None:
        """Closing a file brings nothing to the disk: with this answer the kernel stops asking at each close."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        lib.udd_express_leave(fh)
        handle = self.handles.pop(fh)
        handle.image.closed_by(handle.pid, direct=handle.direct)

    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        """:meth:`begin_read` and what comes after it, for where pyfuse3 asks."""
        found = self.begin_read(fh, off, size)
        return await found() if callable(found) else found

    def begin_read(self, fh: int, off: int, size: int) -> Data | Rest:
        """The bytes asked for, fewer only at the end of the image; or what has to be awaited for them.

        A file that has become shorter than its image gives EIO for any read that reaches beyond it, rather than a
        short answer, which the kernel would take for a new size. Readahead that fails so is asked for again page by
        page, and what is left of the file is still served.
        """
        handle = self.handles[fh]
        image = handle.image
        size = min(size, image.size - off)
        if size <= 0:
            return b""
        image.touched = True
        shelf = handle.shelf or self._find_shelf(handle)
        if shelf is not None:
            express.enter(fh, image.express, shelf.handle, image.watch.handle)
            return self._begin_read_with(shelf, handle, off, size)
        data = self._buffer[:size]
        try:
            if not image.read_digested(data, self._room, off):
                return partial(self._read_waiting, handle, off, size, image.generation)
        except OSError as error:
            fail(image, error)
        first, count = blocks_within(off, size)
        if not handle.own:
            express.enter(fh, image.express)
            if count:
                self._on_read(image, first, count, handle.pid)
        return data

    def reads_done(self) -> None:
        """What comes with reads that C has answered."""
        done = self._done
        for number in range(lib.udd_express_take(done)):
            read = done[number]
            handle = self.handles[read.file]
            handle.image.touched = True
            first, count = blocks_within(read.offset, read.size)
            if read.epoch:
                assert handle.shelf is not None
                handle.shelf.count_served(-(-read.size // BLOCK_BYTES))
                self._served(handle.shelf, handle, first, count, read.epoch)
            elif count:
                self._on_read(handle.image, first, count, handle.pid)
        if self._turn != self._shelves.turn:
            # Somebody may have a shelf now.
            self._turn = self._shelves.turn
            lib.udd_express_leave_all()

    async def _read_waiting(self, handle: Handle, off: int, size: int, generation: int) -> Data:
        image = handle.image
        try:
            data = await trio.to_thread.run_sync(image.read, off, size, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            fail(image, error)
        # Digests of what was read before a change was noticed must not outlive it.
        if not image.noteworthy(generation, off, size):
            return data
        first, count = image.note_digests(off, data)
        if count and not handle.own:
            self._on_read(image, first, count, handle.pid)
        return data

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """All of ``buf``, less only at the end of the disk, where there is no room, as on a disk."""
        clone = self._clone(self.handles[fh].image)
        data = buf[: max(clone.size - off, 0)]
        if not data:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        with answering(clone):
            await clone.write(off, data, self._limiter)
        return len(data)

    async def fallocate(self, fh: int, mode: int, off: int, length: int) -> None:
        """Makes a stretch of a clone zero and gives its room back: a guest's discards and write-zeroes."""
        clone = self._clone(self.handles[fh].image)
        if mode not in requests.HOLES:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        if off + length > clone.size and not mode & KEEP_SIZE:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        with answering(clone):
            await clone.zero(off, min(off + length, clone.size) - off, self._limiter)

    async def fsync(self, fh: int, datasync: bool) -> None:
        image = self.handles[fh].image
        if isinstance(image, Clone):
            with answering(image):
                await image.settle(self._limiter)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """A disk keeps its size, and all else is that of its file."""
        if inode == pyfuse3.ROOT_INODE:
            refuse()
        clone = self._clone(self._image(inode))
        kept = fields.update_size and attr.st_size == clone.size
        if not kept or fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        return self._attributes(clone)

    async def settle(self) -> None:
        """Until cancelled: brings what was written to clones to the disk, should nobody ask for it."""
        while True:
            await trio.sleep(SETTLE_SECONDS)
            for image in self._images:
                if isinstance(image, Clone) and image.unsettled:
                    try:
                        await image.settle(self._limiter)
                    except OSError as error:
                        image.errno_of(error)

    def _clone(self, image: Image) -> Clone:
        if not isinstance(image, Clone):
            refuse()
        return image

    def _begin_read_with(self, shelf: Shelf, handle: Handle, off: int, size: int) -> Data | Rest:
        """:meth:`begin_read` for one in a trust domain: what its store has, which is on ``shelf``, is not read anew."""
        image = handle.image
        generation = image.generation
        taken = shelf.take(off, size, self._room)
        if taken is not None and taken.data is not None:
            self._served(shelf, handle, *blocks_within(off, size), taken.epoch)
            return taken.data
        gaps = ((0, size),) if taken is None else taken.gaps
        read = Read(handle, off, size, generation, image.watch.epoch if taken is None else taken.epoch)
        try:
            if all(image.read_cached(self._buffer[start:end], off + start) for start, end in gaps):
                return self._put(shelf, read, self._buffer[:size])
        except OSError as error:
            fail(image, error)
        # Others will use the buffer while this one waits for the disk.
        return partial(self._fill, shelf, read, gaps, memoryview(bytearray(self._buffer[:size])))

    async def _fill(self, shelf: Shelf, read: Read, gaps: Sequence[tuple[int, int]], view: memoryview) -> Data:
        """Reads ``gaps`` of a read whose other bytes are in ``view``."""
        image = read.handle.image
        fill = partial(image.read_gaps, view, read.offset, gaps)
        try:
            await trio.to_thread.run_sync(fill, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            fail(image, error)
        return self._put(shelf, read, view)

    def _put(self, shelf: Shelf, read: Read, data: memoryview) -> Data:
        """Puts on the shelf what was read, if it is still true and the store has it."""
        image = read.handle.image
        if image.noteworthy(read.generation, read.offset, read.size):
            first, count = image.note_digests(read.offset, data)
            shelf.put(first, count, data, first * BLOCK_BYTES - read.offset, read.epoch)
            self._served(shelf, read.handle, first, count, read.epoch)
        return data

    def _served(self, shelf: Shelf, handle: Handle, first: int, count: int, epoch: int) -> None:
        if count:
            self._on_read(handle.image, first, count, handle.pid)
            if not handle.direct:
                self.tidier.served(handle.image, shelf, first, count, epoch)

    def _find_shelf(self, handle: Handle) -> Shelf | None:
        """Looks for the shelf of one who has none so far, unless nobody has joined since it was last looked for."""
        turn = self._shelves.turn
        if handle.asked != turn and not handle.own:
            handle.asked = turn
            handle.shelf = self._shelves.find(handle.image, handle.opener)
        return handle.shelf

    def _among_friends(self, image: Image, shelf: Shelf) -> bool:
        """Whether only those have ``image`` open who may know what is on ``shelf``."""
        handles = [handle for handle in self.handles.values() if handle.image is image and not handle.own]
        return all(
            found is shelf or (found is None and self._shelves.may_know_all(handle.opener.uid))
            for handle, found in ((handle, self._find_shelf(handle)) for handle in handles)
        )

    def _image(self, inode: int) -> Image:
        image = self._images.by_inode.get(inode)
        if image is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return image

    def _root_attributes(self) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | (0o555 if self._allow_other else 0o500)
        entry.st_nlink = 2
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.attr_timeout = entry.entry_timeout = ATTRIBUTE_SECONDS
        return entry

    def _attributes(self, image: Image) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = image.inode
        # Other users may read what they may read of the file itself, if they are let in at all.
        most = 0o666 if isinstance(image, Clone) else 0o444
        entry.st_mode = stat.S_IFREG | (image.mode if self._allow_other else 0o600) & most
        if image.generation or isinstance(image, Clone):
            # Agents must not take it for one that stays as it is, also if it can't be written here.
            entry.st_mode |= stat.S_IWUSR
        entry.st_uid, entry.st_gid = image.owner if self._allow_other else (os.geteuid(), os.getegid())
        entry.st_size = image.size
        entry.st_blocks = -(-image.size // 512)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = image.mtime_ns
        entry.attr_timeout, entry.entry_timeout = ATTRIBUTE_SECONDS, ENTRY_SECONDS
        return entry


def fail(image: Image, error: OSError) -> NoReturn:
    """Answers a read that failed, EIO whatever the cause, as a disk would."""
    image.report("read", f"can't be read: {error.strerror}; its readers get EIO")
    raise pyfuse3.FUSEError(errno.EIO) from error


@contextmanager
def answering(clone: Clone) -> Iterator[None]:
    """Answers a change of ``clone`` that fails in the body."""
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(clone.errno_of(error)) from error


def process_of(task: int) -> int:
    """The process that task (thread) ``task`` belongs to: FUSE gives the thread. ``task`` itself if it is gone."""
    try:
        lines = Path(f"/proc/{task}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return task
    return next((int(line.split()[1]) for line in lines if line.startswith("Tgid:")), task)


def fuse_descriptors() -> set[int]:
    """Descriptors of this process on which a FUSE device is open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if entry.readlink() == Path("/dev/fuse"):
                found.add(int(entry.name))
        except FileNotFoundError:
            # Closed since, as the descriptor of the listing itself always is.
            continue
    return found


@contextmanager
def session(directory: Path, filesystem: ImageFilesystem, *, allow_other: bool) -> Iterator[int]:
    """Has ``filesystem`` mounted on ``directory``; yields the descriptor of the FUSE device.

    At the end it is unmounted whatever has happened. Files that are open then give errors to their readers.
    """
    if pyfuse3.trio_token is not None:
        raise UdedupError(f"mount point {directory}: this process has a mount already, and pyfuse3 allows one")
    options = {"default_permissions", f"fsname={mountpoints.FILESYSTEM}", f"subtype={mountpoints.FILESYSTEM}"}
    before = fuse_descriptors()
    requests.prepare()
    try:
        pyfuse3.init(filesystem, str(directory), options | {"allow_other"} if allow_other else options)
    except RuntimeError as error:
        if "mount" in str(error):
            # There is a session, only the mount failed.
            pyfuse3.close(unmount=False)
        raise UdedupError(f"mount point {directory}: {error}; `udedup doctor` may tell more") from error
    try:
        (descriptor,) = fuse_descriptors() - before
        yield descriptor
    finally:
        others = [handle for handle in filesystem.handles.values() if not handle.own]
        if others:
            users = ", ".join(str(pid) for pid in sorted({handle.pid for handle in others}))
            log.warning(
                "mount point %s: unmounting with %d files open (by process %s), which can't be read any more",
                directory, len(others), users,
            )  # fmt: skip
        # Closes the device first, so that it can't wait for ourselves, and unmounts lazily.
        pyfuse3.close()
        left = mountpoints.mount_at(directory)
        if left is not None and left.ours:
            # The connection was aborted from outside; libfuse then leaves the mount alone.
            mountpoints.detach(directory)


async def serve(
    mountpoint: Path,
    images: Images,
    on_read: OnRead,
    *,
    shelves: ShelfSource | None = None,
    allow_other: bool = False,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mounts ``images`` on the directory ``mountpoint`` and serves them until cancelled, then unmounts.

    Reports st_dev of the mount to ``task_status`` once it answers. ``on_read(image, first_block, blocks, pid)`` is
    called in the loop's thread for every read that covers whole blocks, after their digests are in the image's table
    and right before the reader gets the data; ``pid`` is the process that opened the file. Returns, with a warning
    logged, if somebody unmounts. With ``allow_other`` other users may read what the image files' permissions let
    them read; off, the engine's user only. ``shelves`` says who may be served from a store. Raises UdedupError if the
    mount can't be made.

    A process can have one mount (pyfuse3 keeps it in module state).
    """
    await trio.to_thread.run_sync(partial(mountpoints.require_fuse, allow_other=allow_other))
    directory = await prepare(mountpoint)
    # Reads that wait for a disk have buffers of their own, in many threads, each of which would keep some.
    lib.udd_memory_buffers_go(BUFFER_BYTES_LEAST)
    async with images.keeping():
        with closing(ImageFilesystem(images, on_read, shelves or NoShelves(), allow_other=allow_other)) as filesystem:
            await serve_session(directory, filesystem, images, allow_other=allow_other, task_status=task_status)


async def serve_session(
    directory: Path,
    filesystem: ImageFilesystem,
    images: Images,
    *,
    allow_other: bool,
    task_status: trio.TaskStatus[int],
) -> None:
    """:func:`serve`, once the directory is fit for it."""
    with session(directory, filesystem, allow_other=allow_other) as descriptor, fast_poll(descriptor):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(filesystem.watch)
            nursery.start_soon(filesystem.settle)
            nursery.start_soon(filesystem.notice)
            requests.attach(nursery, filesystem)
            nursery.start_soon(run_session, directory, nursery.cancel_scope)
            images.mount_device = await trio.to_thread.run_sync(settle, directory, abandon_on_cancel=True)
            nursery.start_soon(filesystem.tidier.run, directory)
            try:
                task_status.started(images.mount_device)
                await trio.sleep_forever()
            finally:
                images.mount_device = None


async def withdraw(images: Images, image: Image, on_removed: Callable[[], None]) -> None:
    """Takes ``image`` out of the mount that shows ``images`` and closes it.

    ``on_removed`` is called once nobody can open it any more, and before it is closed. Raises UdedupError, saying who
    holds it, if it is open.
    """
    await images.flush(image)
    # The kernel tells of the last close when it gets round to it.
    with trio.move_on_after(RELEASE_SECONDS):
        while image.openers:
            await trio.sleep(RELEASE_SECONDS / 50)
    device = images.mount_device
    if image.openers and device is not None:
        holders = await trio.to_thread.run_sync(
            name_holders, image.name, device, image.inode, list(image.openers), abandon_on_cancel=True
        )
        raise UdedupError(f"image {image.name}: is in use by {holders}; end that first")
    if image.inode not in images.by_inode:
        raise UdedupError(f"image {image.name}: is not in the mount any more")
    if isinstance(image, Clone):
        try:
            await image.settle()
        except OSError as error:
            raise UdedupError(f"clone {image.name}: can't be brought to the disk: {error.strerror}") from error
        if image.openers or image.inode not in images.by_inode:
            raise UdedupError(f"image {image.name}: was opened or taken out meanwhile; try again")
    images.remove(image)
    on_removed()
    if device is not None:
        await trio.to_thread.run_sync(forget_name, image.name, abandon_on_cancel=True)
    async with images.examining:
        if image.kept is not None:
            await image.kept.close()
        image.close()


def forget_name(name: str) -> None:
    """Has the kernel look ``name`` up again. It may have to ask the loop first, so this is for another thread."""
    try:
        pyfuse3.invalidate_entry(pyfuse3.ROOT_INODE, os.fsencode(name))
    except FileNotFoundError:
        log.debug("the kernel knew no %s", name)


async def prepare(mountpoint: Path) -> Path:
    """:func:`udedup.vdi.mountpoint.prepare` in a worker thread; UdedupError also if what is mounted doesn't answer."""
    with trio.move_on_after(PREPARE_SECONDS):
        return await trio.to_thread.run_sync(mountpoints.prepare, mountpoint, abandon_on_cancel=True)
    mount = mountpoints.mount_at(mountpoint.absolute())
    raise UdedupError(f"mount point {mountpoint}: doesn't answer{mountpoints.describe(mount)}; unmount it first")


async def run_session(directory: Path, scope: trio.CancelScope) -> None:
    """Lets pyfuse3 answer requests until cancelled or unmounted from outside; the latter cancels ``scope``."""
    await pyfuse3.main()
    log.warning("mount point %s: was unmounted by someone else; images are no longer served", directory)
    scope.cancel()


def settle(directory: Path) -> int:
    """Waits for the new mount to answer, sets its readahead and returns its st_dev."""
    device = directory.stat().st_dev
    os.statvfs(directory)
    mountpoints.raise_readahead(device)
    return device
