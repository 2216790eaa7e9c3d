"""Reads that C answers: the same bytes, the same hints, and no longer than they are true."""

import mmap
import os
import random
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
import trio

from udedup.errors import UdedupError
from udedup.vdi import express, filesystem
from udedup.vdi.filesystem import ImageFilesystem
from udedup.vdi.images import DISK_BYTES_MAX, Images

if TYPE_CHECKING:
    from .conftest import Mounter

T = TypeVar("T")
KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4 * KIB
SIZE = 4 * MIB + 700


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the reads began that Python had to answer."""
    places: list[int] = []
    begin = ImageFilesystem.begin_read

    def noting(self: ImageFilesystem, fh: int, off: int, size: int) -> object:
        places.append(off)
        return begin(self, fh, off, size)

    monkeypatch.setattr(ImageFilesystem, "begin_read", noting)
    return places


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[int]:
    descriptor = await trio.to_thread.run_sync(os.open, path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        # The mount may be waiting for the loop that we are in.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(os.close, descriptor)


def read(descriptor: int, offset: int, size: int) -> bytes:
    with mmap.mmap(-1, size) as buffer, memoryview(buffer) as view:
        return bytes(view[: os.preadv(descriptor, [view], offset)])


def convert(raw: Path, kind: str) -> Path:
    if kind == "raw":
        return raw
    path = raw.with_name(f"{kind}.qcow2")
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={kind}", raw, path]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("kind", ["raw", "64k", "512", "4k"])
async def test_same_bytes_in_any_order(
    mounter: "Mounter", make_image: Callable[..., Path], asked: list[int], kind: str
) -> None:
    """Of all places and sizes, again and again; Python answers what is new, and each read is hinted."""
    raw = make_image(SIZE)
    data = raw.read_bytes()
    images = Images()
    image = images.add(convert(raw, kind), "image")
    mounted = await mounter(images)
    # The last sector of a disk is whole.
    data += bytes(image.size - SIZE)
    draw = random.Random(kind)
    wanted: Counter[tuple[int, int]] = Counter()

    def look(descriptor: int) -> None:
        for _ in range(3):
            for start in range(0, SIZE, 64 * KIB):
                assert read(descriptor, start, 64 * KIB) == data[start : start + 64 * KIB]
        asked.clear()
        mounted.hints.clear()
        for _ in range(1000):
            offset = draw.randrange(0, SIZE, 512)
            size = draw.choice((512, BLOCK, 20 * KIB, 200 * KIB))
            assert read(descriptor, offset, size) == data[offset : offset + size]
            first, end = -(-offset // BLOCK), min(offset + size, image.size) // BLOCK
            if end > first:
                wanted[first, end - first] += 1

    async with opened(mounted.directory / "image") as descriptor:
        await trio.to_thread.run_sync(look, descriptor)
    with trio.fail_after(10):
        while len(mounted.hints) < wanted.total():
            await trio.sleep(0.01)
    assert Counter((first, count) for _, first, count, _ in mounted.hints) == wanted
    assert {(which, pid) for which, _, _, pid in mounted.hints} == {(image, os.getpid())}
    assert image.touched
    # Of clusters that are small, Python hasn't had a piece of each.
    assert len(asked) < 100 or kind in ("512", "4k")


@pytest.mark.parametrize("kind", ["raw", "64k"])
async def test_a_changed_image_is_read_anew(
    mounter: "Mounter",
    place: Path,
    make_image: Callable[..., Path],
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Whatever was where in the file: the new one has it elsewhere."""
    monkeypatch.setattr(filesystem, "EXAMINE_SECONDS", 0.02)
    raw, changed = make_image(MIB), bytes(64 * KIB) + random.Random(2).randbytes(MIB - 64 * KIB)
    path = convert(raw, kind)
    other = place / "other"
    other.mkdir()
    (other / "disk.raw").write_bytes(changed)
    other = convert(other / "disk.raw", kind)
    images = Images()
    image = images.add(path, "image")
    mounted = await mounter(images)
    before = raw.read_bytes()[: 4 * BLOCK]
    async with opened(mounted.directory / "image") as descriptor:
        # The first may have to wait for the map.
        for _ in range(4):
            assert await trio.to_thread.run_sync(read, descriptor, 0, 4 * BLOCK) == before
        assert len(asked) < 3
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(0, 1))
        with trio.fail_after(10):
            while not image.generation:
                await trio.sleep(0.02)
        for start in range(0, MIB, 64 * KIB):
            for _ in range(2):
                found = await trio.to_thread.run_sync(read, descriptor, start, BLOCK)
                assert found == changed[start : start + BLOCK]


async def test_a_file_is_python_s_again_when_others_open_it_another_way(
    mounter: "Mounter", make_image: Callable[..., Path], asked: list[int]
) -> None:
    path = make_image(MIB)
    images = Images()
    images.add(path, "image")
    mounted = await mounter(images)
    async with opened(mounted.directory / "image") as descriptor:
        for _ in range(3):
            await trio.to_thread.run_sync(read, descriptor, 0, BLOCK)
        assert len(asked) == 1
        other = await trio.to_thread.run_sync(os.open, mounted.directory / "image", os.O_RDONLY)
        await trio.to_thread.run_sync(read, descriptor, 0, BLOCK)
        assert len(asked) == 2
        await trio.to_thread.run_sync(os.close, other)


def test_absurd_disks_are_refused(place: Path) -> None:
    """Their tables would take all addresses there are."""
    path = place / "absurd.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, str(DISK_BYTES_MAX + 512)],
        check=True,
    )
    with pytest.raises(UdedupError, match="1 PiB"):
        Images().add(path)


def test_maps_of_too_many_clusters_are_left_to_python(
    make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(express, "PLACES_MAX", 3)
    image = Images().add(convert(make_image(MIB), "64k"))
    data = bytearray(BLOCK)
    image.read(0, BLOCK)
    assert image.read_digested(memoryview(data), filesystem.ffi.from_buffer(data), 0)
    assert image.express.struct.flags == express.UNKNOWN
