import errno
import logging
import mmap
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio

from udedup.errors import UdedupError
from udedup.vdi import filesystem, mountpoint
from udedup.vdi.filesystem import serve
from udedup.vdi.images import Image, Images

if TYPE_CHECKING:
    from .conftest import Mounter

BLOCK = 4096
NOBODY = 65534
SIZES = (1, BLOCK - 1, BLOCK, 9 * BLOCK + 511, 1000 * BLOCK + 3)
T = TypeVar("T")


async def aside(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Runs file operations on the mount in a thread: the test's own loop has to answer them."""
    with trio.fail_after(30):
        return await trio.to_thread.run_sync(partial(function, *arguments, **options), abandon_on_cancel=True)


def adding(*paths: Path) -> Images:
    images = Images()
    for path in paths:
        images.add(path)
    return images


def read_direct(path: Path, offset: int, size: int) -> bytes:
    """One O_DIRECT read past the page cache of the mount."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, max(size, 1)) as buffer:
            return buffer[: os.preadv(descriptor, [memoryview(buffer)[:size]], offset)]
    finally:
        os.close(descriptor)


def read_plain(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


# Run by a process of its own: a page fault holds the GIL, which the loop that has to answer it needs.
COMPARE_MAPPED = """
import mmap, random, sys
mounted, bare, seed = sys.argv[1:]
chooser = random.Random(int(seed))
with open(mounted, "rb") as file, open(bare, "rb") as other:
    data = other.read()
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert len(mapped) == len(data)
    for _ in range(60):
        offset = chooser.randrange(len(data))
        size = chooser.choice([1, 4096, 12289, 1 << 20])
        assert mapped[offset : offset + size] == data[offset : offset + size], (offset, size)
    assert mapped[:] == data
"""


def error_of(function: Callable[..., object], *arguments: object) -> int | None:
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("size", SIZES)
async def test_mapped_bytes_are_the_files(mounter: "Mounter", make_image: Callable[..., Path], size: int) -> None:
    path = make_image(size)
    mounted = await mounter(adding(path))
    command = [sys.executable, "-c", COMPARE_MAPPED, mounted.directory / path.name, path, str(size)]
    done = await aside(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("read", [read_plain, read_direct])
@pytest.mark.parametrize("size", SIZES)
async def test_same_bytes_as_the_file(
    mounter: "Mounter", make_image: Callable[..., Path], read: Callable[[Path, int, int], bytes], size: int
) -> None:
    path = make_image(size)
    data = path.read_bytes()
    mounted = await mounter(adding(path))
    chooser = random.Random(f"{size} {read.__name__}")

    def compare() -> None:
        file = mounted.directory / path.name
        assert file.stat().st_size == size
        for _ in range(60):
            offset = chooser.randrange(size)
            length = chooser.choice([1, 511, 512, BLOCK, 3 * BLOCK + 1, 1 << 20, 3 << 20])
            assert read(file, offset, length) == data[offset : offset + length]
        assert read(file, size, BLOCK) == b""
        assert read(file, 0, size + BLOCK) == data

    await aside(compare)


@pytest.mark.parametrize("read", [read_plain, read_direct])
async def test_digests_and_hints(
    mounter: "Mounter",
    make_image: Callable[..., Path],
    expected_digests: Callable[[bytes], bytes],
    read: Callable[[Path, int, int], bytes],
) -> None:
    path = make_image(700 * BLOCK + 1000)
    table = expected_digests(path.read_bytes())
    images = adding(path)
    (image,) = images
    mounted = await mounter(images)
    read_blocks = set()
    await aside(read, mounted.directory / path.name, 0, image.size)
    for seen, first, count, pid in mounted.hints:
        assert seen is image
        # The thread that opened the file is not the process.
        assert pid == os.getpid()
        read_blocks |= set(range(first, first + count))
    assert read_blocks == set(range(700))
    assert image.digests[: len(table)] == table


async def test_hint_has_exactly_the_blocks_read(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    path = make_image(64 * BLOCK)
    images = adding(path)
    (image,) = images
    mounted = await mounter(images)
    for offset, size in ((5 * BLOCK, 7 * BLOCK), (20 * BLOCK + 512, 3 * BLOCK), (40 * BLOCK, 512)):
        await aside(read_direct, mounted.directory / path.name, offset, size)
    ranges = [(first, count) for _, first, count, _ in mounted.hints]
    assert ranges == [(5, 7), (21, 2)]
    known = [block for block in range(64) if image.digests[16 * block : 16 * block + 16] != bytes(16)]
    assert known == [*range(5, 12), 21, 22]


async def test_hint_names_the_process_that_opened(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    path = make_image(4 * BLOCK)
    mounted = await mounter(adding(path))
    process = await trio.lowlevel.open_process(
        ["dd", f"if={mounted.directory / path.name}", "of=/dev/null", "bs=4096", "status=none"]
    )
    with trio.fail_after(20):
        assert await process.wait() == 0
    assert {pid for *_, pid in mounted.hints} == {process.pid}


async def test_nothing_can_be_written(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    path = make_image(BLOCK)
    mounted = await mounter(adding(path))
    file = mounted.directory / path.name
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        assert await aside(error_of, os.open, file, flags) == errno.EROFS
    assert await aside(error_of, os.unlink, file) == errno.EROFS
    assert await aside(error_of, os.mkdir, mounted.directory / "new") == errno.EROFS
    assert await aside(error_of, os.truncate, file, 0) == errno.EROFS
    assert await aside(error_of, os.open, mounted.directory / "none", os.O_RDONLY) == errno.ENOENT
    assert path.stat().st_size == BLOCK


async def test_attributes(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    path = make_image(3 * BLOCK + 7)
    images = adding(path)
    (image,) = images
    mounted = await mounter(images)
    status = await aside((mounted.directory / path.name).stat)
    assert (status.st_ino, status.st_size, status.st_dev) == (image.inode, image.size, mounted.device)
    assert status.st_mtime_ns == path.stat().st_mtime_ns
    assert status.st_mode == stat.S_IFREG | 0o400
    space = await aside(os.statvfs, mounted.directory)
    assert (space.f_frsize, space.f_blocks, space.f_bavail, space.f_files) == (BLOCK, 4, 0, 1)


async def test_many_images(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    paths = [make_image(BLOCK, f"{'long' * 40}-{number}.raw", seed=number) for number in range(200)]
    mounted = await mounter(adding(*paths))
    assert sorted(await aside(os.listdir, mounted.directory)) == sorted(path.name for path in paths)
    for path in paths[::40]:
        assert await aside((mounted.directory / path.name).read_bytes) == path.read_bytes()


async def test_image_added_while_mounted(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    first = make_image(BLOCK, "a.raw")
    images = adding(first)
    mounted = await mounter(images)
    second = make_image(2 * BLOCK, "b.raw", seed=2)
    file = mounted.directory / "other.raw"
    assert not await aside(file.exists)
    assert await aside(os.listdir, mounted.directory) == ["a.raw"]
    await trio.to_thread.run_sync(images.add, second, "other.raw")
    assert await aside(file.read_bytes) == second.read_bytes()
    assert await aside(os.listdir, mounted.directory) == ["a.raw", "other.raw"]


async def test_own_file_is_refused_as_image(mounter: "Mounter", make_image: Callable[..., Path], place: Path) -> None:
    path = make_image(BLOCK)
    images = adding(path)
    mounted = await mounter(images)
    (place / "link.raw").symlink_to(mounted.directory / path.name)
    for alias in (mounted.directory / path.name, place / "link.raw"):
        with pytest.raises(UdedupError, match="served by this mount itself"):
            await aside(images.add, alias, "again.raw")
    assert len(images) == 1


async def test_concurrent_readers(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    paths = [make_image(500 * BLOCK + 77, f"{number}.raw", seed=number) for number in range(3)]
    mounted = await mounter(adding(*paths))

    def compare(seed: int) -> None:
        chooser = random.Random(seed)
        path = paths[seed % 3]
        data = path.read_bytes()
        for _ in range(200):
            offset, size = chooser.randrange(len(data)), chooser.randrange(1, 40 * BLOCK)
            read = chooser.choice([read_plain, read_direct])
            assert read(mounted.directory / path.name, offset, size) == data[offset : offset + size]

    async with trio.open_nursery() as nursery:
        for seed in range(8):
            nursery.start_soon(aside, compare, seed)


async def test_slow_disk_does_not_stall_the_loop(
    mounter: "Mounter", make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image(BLOCK)
    images = adding(path)
    disk_busy, disk_done = threading.Event(), threading.Event()
    read = Image.read

    def slow_read(self: Image, offset: int, size: int) -> bytes:
        disk_busy.set()
        assert disk_done.wait(20)
        return read(self, offset, size)

    monkeypatch.setattr(Image, "read", slow_read)
    monkeypatch.setattr(Image, "read_digested", lambda self, view, room, offset: False)
    mounted = await mounter(images)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(aside, read_plain, mounted.directory / path.name, 0, BLOCK)
        assert await aside(disk_busy.wait, 20)
        # The disk is at it until this very loop says otherwise, and other requests are answered meanwhile.
        assert await aside(os.listdir, mounted.directory) == [path.name]
        assert mounted.hints == []
        disk_done.set()
    assert [(first, count) for _, first, count, _ in mounted.hints] == [(0, 1)]


async def test_uncached_data_comes_from_the_disk(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    path = make_image(600 * BLOCK)
    data = path.read_bytes()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mounted = await mounter(adding(path))
    assert await aside((mounted.directory / path.name).read_bytes) == data


async def test_failing_medium(
    mounter: "Mounter",
    make_image: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make_image(4 * BLOCK)
    mounted = await mounter(adding(path))

    def broken(self: Image, view: memoryview, room: object, offset: int) -> bool:
        raise OSError(errno.EREMOTEIO, os.strerror(errno.EREMOTEIO))

    monkeypatch.setattr(Image, "read_digested", broken)
    for _ in range(3):
        assert await aside(error_of, read_direct, mounted.directory / path.name, 0, BLOCK) == errno.EIO
    assert mounted.hints == []
    assert [record.message for record in caplog.records if "can't be read" in record.message] == [
        f"image {path} can't be read: Remote I/O error; its readers get EIO"
    ]


async def test_changed_image(
    mounter: "Mounter",
    make_image: Callable[..., Path],
    expected_digests: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make_image(16 * BLOCK)
    images = adding(path)
    (image,) = images
    mounted = await mounter(images)
    file = mounted.directory / path.name
    await aside(file.read_bytes)
    changed = random.Random(2).randbytes(16 * BLOCK)
    with path.open("r+b") as writer:
        writer.write(changed)
    os.utime(path, ns=(0, 1))
    # Noticed when it is opened; what the kernel has cached goes with the next look at the attributes.
    assert await aside(read_direct, file, 0, 16 * BLOCK) == changed
    assert image.generation == 1
    assert image.digests[: 16 * 16] == expected_digests(changed)
    assert [record.message for record in caplog.records] == [
        f"image {path} has changed while mounted: its digests are dropped"
    ]
    with trio.fail_after(10):
        while await aside(file.read_bytes) != changed:
            await trio.sleep(0.1)


async def test_change_of_an_open_image_is_noticed(
    mounter: "Mounter", make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image(4 * BLOCK)
    images = adding(path)
    (image,) = images
    monkeypatch.setattr(filesystem, "EXAMINE_SECONDS", 0.02)
    mounted = await mounter(images)
    descriptor = await aside(os.open, mounted.directory / path.name, os.O_RDONLY)
    try:
        await aside(os.pread, descriptor, BLOCK, 0)
        os.utime(path, ns=(0, 1))
        with trio.fail_after(10):
            while image.generation == 0:
                await aside(os.posix_fadvise, descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                await aside(os.pread, descriptor, BLOCK, 0)
    finally:
        await aside(os.close, descriptor)


async def test_digests_of_a_read_overtaken_by_a_change_are_dropped(
    mounter: "Mounter", make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image(BLOCK)
    images = adding(path)
    (image,) = images
    read = Image.read
    mounted = await mounter(images)

    def overtaken(self: Image, offset: int, size: int) -> bytes:
        data = read(self, offset, size)
        os.utime(path, ns=(0, 1))
        trio.from_thread.run_sync(self.update, self.examine())
        return data

    monkeypatch.setattr(Image, "read_digested", lambda self, view, room, offset: False)
    monkeypatch.setattr(Image, "read", overtaken)
    await aside(read_direct, mounted.directory / path.name, 0, BLOCK)
    assert image.digests[:16] == bytes(16)
    assert mounted.hints == []


async def test_truncated_image(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    path = make_image(256 * BLOCK)
    data = path.read_bytes()
    mounted = await mounter(adding(path))
    file = mounted.directory / path.name
    descriptor = await aside(os.open, file, os.O_RDONLY)
    try:
        os.truncate(path, 100 * BLOCK + 9)
        for block in (0, 50, 99):
            assert await aside(os.pread, descriptor, BLOCK, block * BLOCK) == data[block * BLOCK : (block + 1) * BLOCK]
        for block in (100, 101, 255):
            assert await aside(error_of, os.pread, descriptor, BLOCK, block * BLOCK) == errno.EIO
            assert await aside(error_of, read_direct, file, block * BLOCK, BLOCK) == errno.EIO
        # The size stays: a failed read isn't the end of the file.
        assert (await aside(os.fstat, descriptor)).st_size == 256 * BLOCK
        assert await aside(read_plain, file, 0, 64 * BLOCK) == data[: 64 * BLOCK]
    finally:
        await aside(os.close, descriptor)


async def test_cancel_unmounts(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    images = adding(make_image(BLOCK))
    mounted = await mounter(images)
    assert images.mount_device == mounted.device == (await aside(mounted.directory.stat)).st_dev
    await mounted.end()
    assert mountpoint.mount_at(mounted.directory) is None
    assert list(mounted.directory.iterdir()) == []
    assert images.mount_device is None
    # And the process can mount again.
    again = await mounter(images, mounted.directory)
    assert await aside(os.listdir, again.directory) == ["disk.raw"]


async def test_cancel_unmounts_with_open_files(
    mounter: "Mounter", make_image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = make_image(BLOCK)
    mounted = await mounter(adding(path))
    descriptor = await aside(os.open, mounted.directory / path.name, os.O_RDONLY)
    await mounted.end()
    assert mountpoint.mount_at(mounted.directory) is None
    assert error_of(os.pread, descriptor, BLOCK, 0) in (errno.ENOTCONN, errno.ECONNABORTED)
    # Closes it all the same; what fails is telling the server.
    assert error_of(os.close, descriptor) in (errno.ENOTCONN, errno.ECONNABORTED)
    (record,) = [record for record in caplog.records if "open" in record.message]
    assert f"1 files open (by process {os.getpid()})" in record.message


async def test_cancel_does_not_wait_for_the_disk(
    mounter: "Mounter", make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image(BLOCK)
    disk_busy, disk_done = threading.Event(), threading.Event()

    def stuck(self: Image, offset: int, size: int) -> bytes:
        disk_busy.set()
        disk_done.wait(20)
        return bytes(size)

    monkeypatch.setattr(Image, "read", stuck)
    monkeypatch.setattr(Image, "read_digested", lambda self, view, room, offset: False)
    mounted = await mounter(adding(path))
    answers: list[int | None] = []

    async def reader() -> None:
        answers.append(await aside(error_of, read_plain, mounted.directory / path.name, 0, BLOCK))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            assert await aside(disk_busy.wait, 20)
            with trio.fail_after(10):
                await mounted.end()
        assert answers[0] in (errno.ENOTCONN, errno.ECONNABORTED)
    finally:
        disk_done.set()


async def test_unmounted_from_outside(
    mounter: "Mounter", make_image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    mounted = await mounter(adding(make_image(BLOCK)))
    await aside(mountpoint.detach, mounted.directory)
    with trio.fail_after(10):
        await mounted.ended.wait()
    assert any("unmounted by someone else" in record.message for record in caplog.records)


async def test_exception_of_the_callback_unmounts(fuse: None, make_image: Callable[..., Path], place: Path) -> None:
    def broken(image: Image, first: int, blocks: int, pid: int) -> None:
        raise ZeroDivisionError

    directory = place / "mount"
    directory.mkdir()
    path = make_image(BLOCK)
    answers: list[int | None] = []

    async def read_once(device: None = None) -> None:
        answers.append(await aside(error_of, read_direct, directory / path.name, 0, BLOCK))

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery, trio.open_nursery() as servers:
            await servers.start(serve, directory, adding(path), broken)
            nursery.start_soon(read_once)
    assert mountpoint.mount_at(directory) is None


async def test_mount_of_a_crashed_engine_is_cleaned_up(
    mounter: "Mounter", make_image: Callable[..., Path], place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_image(BLOCK)
    directory = place / "mount"
    directory.mkdir()
    program = (
        "import os, signal, sys, trio\n"
        "from pathlib import Path\n"
        "from udedup.vdi.filesystem import serve\n"
        "from udedup.vdi.images import Images\n"
        "async def main():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        await nursery.start(serve, Path(sys.argv[1]), Images(), print)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "trio.run(main)\n"
    )
    for _ in range(2):
        crashed = await aside(subprocess.run, [sys.executable, "-c", program, directory], capture_output=True)
        assert crashed.returncode == -9, crashed.stderr.decode()
        assert error_of(os.listdir, directory) == errno.ENOTCONN
    with caplog.at_level(logging.WARNING):
        mounted = await mounter(adding(path), directory)
    assert await aside((directory / path.name).read_bytes) == path.read_bytes()
    assert "crashed engine" in caplog.text
    await mounted.end()
    assert mountpoint.mount_at(directory) is None


async def test_mount_point_in_use(mounter: "Mounter", make_image: Callable[..., Path]) -> None:
    mounted = await mounter(adding(make_image(BLOCK)))
    with pytest.raises(UdedupError, match=r"in use: udedup \(fuse\.udedup\) is mounted there"):
        await serve(mounted.directory, Images(), print)


async def test_one_mount_per_process(mounter: "Mounter", make_image: Callable[..., Path], place: Path) -> None:
    await mounter(adding(make_image(BLOCK)))
    (place / "second").mkdir()
    with pytest.raises(UdedupError, match="this process has a mount already"):
        await serve(place / "second", Images(), print)
    assert mountpoint.mount_at(place / "second") is None


async def test_unresponsive_mount_point(
    monkeypatch: pytest.MonkeyPatch, place: Path, fuse: None, autojump_clock: trio.testing.MockClock
) -> None:
    hung: Callable[..., Awaitable[None]] = lambda *arguments, **options: trio.sleep_forever()  # noqa: E731
    monkeypatch.setattr(trio.to_thread, "run_sync", hung)
    with pytest.raises(UdedupError, match="doesn't answer"):
        await filesystem.prepare(place)


async def test_readahead_is_raised(mounter: "Mounter", lacking: Callable[[str], None]) -> None:
    if os.geteuid() != 0:
        lacking("readahead is raised by root only")
    mounted = await mounter(Images())
    setting = Path(f"/sys/class/bdi/{os.major(mounted.device)}:{os.minor(mounted.device)}/read_ahead_kb")
    assert setting.read_text(encoding="ascii") == "1024\n"


@pytest.mark.parametrize("allow_other", [False, True])
async def test_other_users(
    mounter: "Mounter", make_image: Callable[..., Path], lacking: Callable[[str], None], *, allow_other: bool
) -> None:
    if os.geteuid() != 0:
        lacking("acting as another user needs root")
    public, private = make_image(BLOCK, "public.raw"), make_image(BLOCK, "private.raw")
    public.chmod(0o644)
    private.chmod(0o600)
    mounted = await mounter(adding(public, private), allow_other=allow_other)

    async def readable(path: Path) -> bool:
        done = await aside(
            subprocess.run, ["cat", mounted.directory / path.name], user=NOBODY, group=NOBODY, capture_output=True
        )
        assert done.stdout == (path.read_bytes() if done.returncode == 0 else b"")
        return bool(done.returncode == 0)

    assert await readable(public) == allow_other
    assert not await readable(private)


@pytest.mark.parametrize("active", [True, False])
async def test_serves_with_and_without_fast_poll(
    mounter: "Mounter", make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, *, active: bool
) -> None:
    if not active:
        monkeypatch.setattr("udedup.vdi.fastpoll.TRIED", ())
    path = make_image(300 * BLOCK)
    mounted = await mounter(adding(path))
    assert await aside((mounted.directory / path.name).read_bytes) == path.read_bytes()
