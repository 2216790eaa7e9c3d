import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from udedup.vdi.filesystem import EXAMINE_SECONDS
from udedup.vdi.images import Images
from udedup.vdi.watching import Watcher

if TYPE_CHECKING:
    from vdi.conftest import Mounter

BLOCK = 4096


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    made = Watcher()
    yield made
    made.close()


@pytest.fixture
def descriptor(make_image: Callable[..., Path]) -> Iterator[int]:
    opened = os.open(make_image(16 * BLOCK), os.O_RDWR)
    yield opened
    os.close(opened)


async def told(watcher: Watcher) -> set[int]:
    """What it tells; fails if that takes long."""
    with trio.fail_after(10):
        return await watcher.changed()


async def silent(watcher: Watcher) -> bool:
    """Whether it has nothing to tell."""
    with trio.move_on_after(0.05) as scope:
        await watcher.changed()
    return scope.cancelled_caught


@pytest.mark.parametrize(
    "change",
    [
        lambda descriptor: os.pwrite(descriptor, b"x", 5),
        lambda descriptor: os.ftruncate(descriptor, BLOCK),
        lambda descriptor: os.utime(descriptor),
        lambda descriptor: (path := Path(f"/proc/self/fd/{descriptor}").readlink()).rename(path.with_name("moved")),
    ],
)
async def test_each_change_is_told_once(watcher: Watcher, descriptor: int, change: Callable[[int], None]) -> None:
    watcher.watch(7, [descriptor])
    assert await silent(watcher)
    os.pread(descriptor, 5, 0)
    assert await silent(watcher)
    change(descriptor)
    assert await told(watcher) == {7}
    # The watch has been used up.
    os.pwrite(descriptor, b"y", 5)
    assert await silent(watcher)
    watcher.watch(7, [descriptor])
    os.pwrite(descriptor, b"y", 5)
    assert await told(watcher) == {7}


async def test_images_on_one_file(watcher: Watcher, descriptor: int, place: Path) -> None:
    (place / "top").write_bytes(b"x")
    top = os.open(place / "top", os.O_RDWR)
    watcher.watch(1, [descriptor])
    watcher.watch(2, [top, descriptor])
    watcher.watch(3, [top])
    os.pwrite(top, b"x", 0)
    assert await told(watcher) == {2, 3}
    os.pwrite(descriptor, b"x", 0)
    assert await told(watcher) == {1}
    watcher.watch(1, [descriptor])
    watcher.watch(2, [top, descriptor])
    watcher.keep_only({2})
    os.pwrite(descriptor, b"x", 0)
    assert await told(watcher) == {2}
    os.close(top)


async def test_what_is_not_to_be_had_is_said(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and reads go on."""

    def refuse(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with_watches = Watcher()
    monkeypatch.setattr(Watcher, "_call", refuse)
    without = Watcher()
    for watcher in (with_watches, without):
        watcher.watch(1, [descriptor])
        watcher.watch(2, [descriptor])
        watcher.keep_only(set())
        os.pwrite(descriptor, b"x", 0)
        assert await silent(watcher)
        watcher.close()
    assert len(caplog.records) == 2
    assert all("No space left" in record.getMessage() for record in caplog.records)


async def test_change_of_an_image_nobody_reads_is_noticed(
    mounter: "Mounter",
    make_image: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without looking from time to time, again and again. The size changes, too: times have a grain of milliseconds."""
    monkeypatch.setattr("udedup.vdi.filesystem.EXAMINE_SECONDS", 1000 * EXAMINE_SECONDS)
    path = make_image(16 * BLOCK)
    images = Images()
    image = images.add(path)
    mounted = await mounter(images)
    # Once opened it is watched. What the kernel has cached of it is read without a request, so no more is read there.
    await trio.to_thread.run_sync((mounted.directory / path.name).read_bytes)
    for number in range(3):
        image.note_digests(0, path.read_bytes())
        assert image.digests[:16] != bytes(16)
        path.write_bytes(bytes([number]) * (17 + number) * BLOCK)
        with trio.fail_after(10):
            while image.digests[:16] != bytes(16):
                await trio.sleep(0.01)
    assert [record.getMessage() for record in caplog.records] == [
        f"image {path} has changed while mounted: its digests are dropped"
    ]
