"""Images of all formats through the mount itself."""

import errno
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from udedup.vdi.formats.helper import Helper
from udedup.vdi.images import Images

from .conftest import KIB, MIB, expected, qemu_img, scribble

if TYPE_CHECKING:
    from ..conftest import Mounter

Disk = Callable[..., Path]


async def read(path: Path, offset: int, size: int) -> bytes | int:
    """What is there, or the errno of the attempt."""

    def attempt() -> bytes:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    with trio.fail_after(30):
        try:
            return await trio.to_thread.run_sync(attempt, abandon_on_cancel=True)
        except OSError as error:
            return error.errno or 0


async def test_all_formats_in_one_mount(mounter: "Mounter", disk: Disk, tmp_path: Path) -> None:
    plain = disk("plain.raw", "raw")
    images, contents = Images(), {}
    for kind in ("qcow2", "vdi", "vmdk", "vpc", "vhdx"):
        path = tmp_path / f"{kind}.{kind}"
        qemu_img("convert", "-O", kind, plain, path)
        contents[f"{kind}.raw"] = expected(path, kind)
        images.add(path)
    small, top = tmp_path / "small.qcow2", tmp_path / "top.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", plain, small)
    qemu_img("create", "-f", "qcow2", "-b", small, "-F", "qcow2", top)
    scribble(top, 4, 24 * MIB)
    contents["top.raw"] = expected(top, "qcow2")
    images.add(top)
    mounted = await mounter(images)
    async with trio.open_nursery() as nursery:

        async def compare(name: str, content: bytes) -> None:
            file = mounted.directory / name
            with trio.fail_after(40):
                found = await trio.to_thread.run_sync(file.read_bytes, abandon_on_cancel=True)
            assert found == content, name

        for name, content in contents.items():
            nursery.start_soon(compare, name, content)
    assert {hint[0].name for hint in mounted.hints} == set(contents)


async def test_digests_are_those_of_the_disk(
    mounter: "Mounter", disk: Disk, expected_digests: Callable[[bytes], bytes]
) -> None:
    path = disk("disk.qcow2", "qcow2", 4 * MIB + 512)
    content = expected(path, "qcow2")
    images = Images()
    image = images.add(path)
    mounted = await mounter(images)
    assert await read(mounted.directory / "disk.raw", 0, len(content)) == content
    table = expected_digests(content)
    assert image.digests[: len(table)] == table


async def test_corrupt_cluster_is_eio_and_told_once(
    mounter: "Mounter", disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    path = disk("disk.qcow2", "qcow2", 4 * MIB)
    content = expected(path, "qcow2")
    with path.open("r+b") as file:
        head = file.read(64 * KIB)
        file.seek(struct.unpack_from(">Q", head, 40)[0])
        table = struct.unpack(">Q", file.read(8))[0] & ~(1 << 63)
        file.seek(table)
        file.write(struct.pack(">Q", 1 << 63 | 1 << 50))
    images = Images()
    images.add(path)
    mounted = await mounter(images)
    for _ in range(3):
        assert await read(mounted.directory / "disk.raw", 0, 4 * KIB) == errno.EIO
        assert await read(mounted.directory / "disk.raw", MIB, MIB) == content[MIB : 2 * MIB]
    messages = [record.message for record in caplog.records if "can't be read" in record.message]
    assert messages == [f"image {path} can't be read: image file ends early; its readers get EIO"]


async def test_helper_dies_under_its_readers(
    mounter: "Mounter", disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They get the bytes all the same, or EIO, never others; and there is not a line for each time."""
    path = tmp_path / "disk.vmdk"
    qemu_img("convert", "-O", "vmdk", disk("plain.raw", "raw"), path)
    content = expected(path, "vmdk")
    images = Images()
    image = images.add(path)
    mounted = await mounter(images)
    extent = image._layer.lookup(0, 1, wait=True)
    assert extent is not None
    helper = extent.source
    assert isinstance(helper, Helper)
    outcomes = []
    async with trio.open_nursery() as nursery:

        async def kill() -> None:
            while True:
                await trio.sleep(0.05)
                if helper.pid is not None:
                    os.kill(helper.pid, signal.SIGKILL)

        nursery.start_soon(kill)
        for number in range(60):
            offset = number * 300 * KIB % (20 * MIB)
            found = await read(mounted.directory / "disk.raw", offset, 200 * KIB)
            assert found in (errno.EIO, content[offset : offset + 200 * KIB])
            outcomes.append(found == errno.EIO)
        nursery.cancel_scope.cancel()
    with trio.fail_after(20):
        while await read(mounted.directory / "disk.raw", 0, MIB) != content[:MIB]:
            await trio.sleep(0.1)
    assert len(caplog.records) <= 3
    assert not all(outcomes)


async def test_files_are_closed_with_the_mount(mounter: "Mounter", disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("convert", "-O", "vmdk", disk("plain.raw", "raw"), path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    images = Images()
    images.add(path)
    mounted = await mounter(images)
    assert isinstance(await read(mounted.directory / "disk.raw", 0, MIB), bytes)
    await mounted.end()
    images.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
