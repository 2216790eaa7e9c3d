"""Digests survive the mount: computed once, found by the next engine, dropped when they are not the image's."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from udedup.vdi.digests import DROPPED_MAX, PAGE_BLOCKS, PAGE_BYTES, DigestTable
from udedup.vdi.formats.probe import Opening
from udedup.vdi.images import Image, Images
from udedup.vdi.state import StateDirectory

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory.open(tmp_path / "state")


@pytest.fixture
def old_image(make_image: Callable[..., Path]) -> Callable[..., Path]:
    """An image as :func:`make_image` makes it, last changed a minute ago."""

    def make(size: int, name: str = "disk.raw", seed: int = 1) -> Path:
        path = make_image(size, name, seed)
        age(path)
        return path

    return make


def age(path: Path, seconds: int = 60) -> None:
    """Makes ``path`` look as if nobody had changed it for a while."""
    then = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(then, then))


async def settled(image: Image) -> None:
    """Waits until what was wanted of the sidecar is in the table."""
    assert image.kept is not None
    await trio.testing.wait_all_tasks_blocked(0.01)
    await image.kept.load()


@asynccontextmanager
async def served(state: StateDirectory, *paths: Path) -> AsyncIterator[list[Image]]:
    """Images as an engine has them, without the mount: one after the other, each to its end."""
    images = Images(state)
    for path in paths:
        images.add(path)
    async with images.keeping():
        yield list(images)
    images.close()


def read_all(image: Image, path: Path) -> None:
    """As the file system does for a reader of the whole image."""
    data = path.read_bytes()
    for start in range(0, len(data), 128 << 10):
        image.note_digests(start, data[start : start + (128 << 10)])


async def test_next_engine_knows_what_this_one_has_digested(
    state: StateDirectory,
    old_image: Callable[..., Path],
    expected_digests: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = old_image(5 * MIB + 3 * BLOCK + 100)
    expected = expected_digests(path.read_bytes())
    async with served(state, path) as (image,):
        read_all(image, path)
    async with served(state, path) as (image,):
        assert image.digests[: len(expected)] == bytes(len(expected))
        image.note_digests(0, path.read_bytes()[:BLOCK])
        await settled(image)
        assert image.digests[:PAGE_BYTES] == expected[:PAGE_BYTES]
        # The next stretch is in sequence, so what comes after it is loaded, too, …
        image.note_digests(MIB, path.read_bytes()[MIB : MIB + BLOCK])
        await settled(image)
        assert image.digests[: len(expected)] == expected
        # … and nothing is computed any more.
        monkeypatch.setattr(DigestTable, "compute", None)
        read_all(image, path)


async def test_digests_come_from_the_sidecar_and_not_from_the_data(
    state: StateDirectory, old_image: Callable[..., Path]
) -> None:
    """Otherwise the tests here would show nothing: other bytes, same time and size."""
    path = old_image(MIB)
    async with served(state, path) as (image,):
        read_all(image, path)
        before = image.digests[:PAGE_BYTES]
    mtime = path.stat().st_mtime_ns
    path.write_bytes(bytes(MIB))
    os.utime(path, ns=(mtime, mtime))
    async with served(state, path) as (image,):
        image.kept.want(0, 1)
        await settled(image)
        assert image.digests[:PAGE_BYTES] == before


@pytest.mark.parametrize("what", ["size", "time", "inode", "path"])
async def test_changed_or_moved_image_has_no_digests(
    state: StateDirectory, old_image: Callable[..., Path], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = old_image(2 * MIB)
    async with served(state, path) as (image,):
        read_all(image, path)
    status = path.stat()
    match what:
        case "size":
            os.truncate(path, MIB)
            os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
        case "time":
            os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns + 1))
        case "inode":
            content = path.read_bytes()
            path.rename(path.with_name("old"))
            path.write_bytes(content)
            os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
        case "path":
            path = path.rename(path.with_name("moved.raw"))
    async with served(state, path) as (image,):
        image.kept.want(0, PAGE_BLOCKS)
        await settled(image)
        assert image.digests[:PAGE_BYTES] == bytes(PAGE_BYTES)
    assert not caplog.records


@pytest.mark.require("qemu-utils")
@pytest.mark.parametrize("changed", ["image", "backing file", "nothing"])
async def test_backing_files_count(
    state: StateDirectory, old_image: Callable[..., Path], place: Path, changed: str
) -> None:
    base = old_image(2 * MIB)
    path = place / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path], check=True)
    age(path)
    async with served(state, path) as (image,):
        read_all(image, base)
        known = image.digests[:PAGE_BYTES]
    if changed != "nothing":
        age(path if changed == "image" else base)
    async with served(state, path) as (image,):
        image.kept.want(0, 1)
        await settled(image)
        assert image.digests[:PAGE_BYTES] == (known if changed == "nothing" else bytes(PAGE_BYTES))


async def test_digests_of_a_file_just_written_are_not_kept(
    state: StateDirectory, make_image: Callable[..., Path], old_image: Callable[..., Path]
) -> None:
    """Its writer may write again without a new time of change. What is digested later is kept."""
    fresh, old = make_image(2 * MIB, "fresh.raw"), old_image(2 * MIB, "old.raw")
    images = Images(state)
    both = [images.add(path) for path in (fresh, old)]
    for image, path in zip(both, (fresh, old), strict=True):
        image.note_digests(0, path.read_bytes()[:MIB])
        await images.flush(image)
        assert image.digests[:PAGE_BYTES] != bytes(PAGE_BYTES)
    images.close()
    found = {path.name for path in state.path.iterdir()}
    assert both[0].identity is not None
    assert both[1].identity is not None
    assert both[1].identity.name in found
    assert both[0].identity.name not in found
    age(fresh, 5)
    async with served(state, fresh) as (image,):
        read_all(image, fresh)
    assert both[0].identity.name in {path.name for path in state.path.iterdir()}


async def test_change_while_mounted_drops_the_digests(
    state: StateDirectory,
    old_image: Callable[..., Path],
    expected_digests: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those in the sidecar as well, and what it had does not come back."""
    path = old_image(2 * MIB)
    async with served(state, path) as (image,):
        read_all(image, path)
    async with served(state, path) as (image,):
        image.kept.want(0, 1)
        await settled(image)
        changed = bytes(MIB) + path.read_bytes()[MIB:]
        path.write_bytes(changed)
        age(path, 30)
        image.update(image.examine())
        assert image.digests[:PAGE_BYTES] == bytes(PAGE_BYTES)
        image.kept.want(0, 1)
        await settled(image)
        assert image.digests[:PAGE_BYTES] == bytes(PAGE_BYTES)
        image.note_digests(0, changed[:MIB])
    assert [record.getMessage() for record in caplog.records] == [
        f"image {path} has changed while mounted: its digests are dropped"
    ]
    async with served(state, path) as (image,):
        image.kept.want(0, 2 * PAGE_BLOCKS)
        await settled(image)
        expected = expected_digests(changed)
        assert image.digests[:PAGE_BYTES] == expected[:PAGE_BYTES]
        assert image.digests[PAGE_BYTES : 2 * PAGE_BYTES] == bytes(PAGE_BYTES)


async def test_damaged_sidecar_is_dropped_with_one_line(
    state: StateDirectory,
    old_image: Callable[..., Path],
    expected_digests: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = old_image(4 * MIB)
    async with served(state, path) as (image,):
        read_all(image, path)
    (sidecar,) = state.path.iterdir()
    raw = bytearray(sidecar.read_bytes())
    raw[-100] ^= 1
    sidecar.write_bytes(raw)
    expected = expected_digests(path.read_bytes())
    async with served(state, path) as (image,):
        image.kept.want(0, 4 * PAGE_BLOCKS)
        await settled(image)
        assert image.digests[: len(expected)] == bytes(len(expected))
        read_all(image, path)
        assert image.digests[: len(expected)] == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    async with served(state, path) as (image,):
        image.kept.want(0, 4 * PAGE_BLOCKS)
        await settled(image)
        assert image.digests[: len(expected)] == expected


async def test_two_engines_add_to_each_other(
    state: StateDirectory, old_image: Callable[..., Path], expected_digests: Callable[[bytes], bytes]
) -> None:
    """The same image in both, each reads half of every stretch, and they write again and again."""
    path = old_image(8 * MIB)
    data, expected = path.read_bytes(), expected_digests(path.read_bytes())
    engines = [Images(state), Images(state)]
    both = [images.add(path) for images in engines]
    for start in range(0, len(data), 64 * BLOCK):
        number = start // (64 * BLOCK) % 2
        both[number].note_digests(start, data[start : start + 64 * BLOCK])
        await engines[number].flush(both[number])
    for images in engines:
        images.close()
    async with served(state, path) as (image,):
        image.kept.want(0, len(data) // BLOCK)
        await settled(image)
        assert image.digests[: len(expected)] == expected


async def test_written_blocks_are_dropped(
    state: StateDirectory, old_image: Callable[..., Path], expected_digests: Callable[[bytes], bytes]
) -> None:
    """Here and in the sidecar, from where they must not come back."""
    path = old_image(3 * MIB)
    expected = bytearray(expected_digests(path.read_bytes()))
    async with served(state, path) as (image,):
        read_all(image, path)
    async with served(state, path) as (image,):
        image.kept.want(0, 1)
        image.drop_digests(10 * BLOCK + 1, BLOCK)
        await settled(image)
        image.kept.want(PAGE_BLOCKS, 1)
        await settled(image)
        image.drop_digests(MIB, BLOCK)
        expected[16 * PAGE_BLOCKS : 16 * (PAGE_BLOCKS + 1)] = bytes(16)
        assert image.digests[PAGE_BYTES : 2 * PAGE_BYTES] == expected[PAGE_BYTES : 2 * PAGE_BYTES]
    async with served(state, path) as (image,):
        image.kept.want(0, 3 * PAGE_BLOCKS)
        await settled(image)
        # Of the first stretch nothing was known when it was written to.
        assert image.digests[:PAGE_BYTES] == bytes(PAGE_BYTES)
        assert image.digests[PAGE_BYTES : 3 * PAGE_BYTES] == expected[PAGE_BYTES:]


async def test_whole_disk_is_discarded(state: StateDirectory, place: Path) -> None:
    path = place / "disk.raw"
    with path.open("wb") as file:
        file.truncate((DROPPED_MAX + 1) * MIB)
    age(path)
    async with served(state, path) as (image,):
        image.note_digests(0, bytes(MIB))
    async with served(state, path) as (image,):
        image.drop_digests(0, image.size)
        image.note_digests(MIB, bytes(MIB))
    async with served(state, path) as (image,):
        image.kept.want(0, 2 * PAGE_BLOCKS)
        await settled(image)
        assert image.digests[:PAGE_BYTES] == bytes(PAGE_BYTES)
        assert image.digests[PAGE_BYTES : 2 * PAGE_BYTES] != bytes(PAGE_BYTES)


async def test_disk_that_fails_ends_the_keeping_with_one_line(
    state: StateDirectory, old_image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = old_image(2 * MIB)
    async with served(state, path) as (image,):
        state.path.rename(state.path.with_name("elsewhere"))
        for start in (0, MIB):
            image.note_digests(start, path.read_bytes()[start : start + MIB])
            await settled(image)
    assert len(caplog.records) == 1
    assert "no longer kept" in caplog.records[0].getMessage()


@pytest.mark.require("qemu-utils")
async def test_nothing_is_kept_of_encrypted_images(state: StateDirectory, place: Path) -> None:
    secret, path = place / "secret", place / "disk.qcow2"
    secret.write_text("open sesame")
    command = ["qemu-img", "create", "-q", "--object", f"secret,id=s,file={secret}", "-f", "qcow2"]
    options = "encrypt.format=aes,encrypt.key-secret=s"
    subprocess.run([*command, "-o", options, path, "1M"], check=True)
    images = Images(state)
    assert images.add(path, opening=Opening(secret=secret)).kept is None
    images.close()


def test_costs_what_is_touched(state: StateDirectory, place: Path) -> None:
    """200 disks of 16 TiB, a gibibyte of which has been read: at most 0.6% of that."""
    before = resident_bytes()
    images = Images(state)
    data = memoryview(bytes(MIB))
    for number in range(200):
        path = place / f"{number}.raw"
        with path.open("wb") as file:
            file.truncate((16 << 40) - BLOCK)
        age(path)
        image = images.add(path)
        for start in range(5):
            image.note_digests((number * 4321 + start) * MIB, data)
    assert resident_bytes() - before < 0.006 * 200 * 5 * MIB + 200 * 16 * 1024
    images.close()


def resident_bytes() -> int:
    """Memory this process has right now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
