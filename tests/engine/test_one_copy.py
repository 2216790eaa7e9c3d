"""One copy in memory, end to end: what is merged is served from the store and leaves the page cache of the mount."""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from engine.conftest import Running, Start
from engine.fake_agent import PAGE, FakeAgent, page

from udedup._native import lib
from udedup.engine import server
from udedup.engine.domain import Domain
from udedup.engine.shelves import Shelves
from udedup.engine.wire import SEGMENT_SLOTS
from udedup.vdi import filesystem, images, tidy
from udedup.vdi.clone import Clone
from udedup.vdi.shelf import Watch

pytestmark = pytest.mark.require("fuse")

FIRST, SECOND = 0x10000000, 0x20000000
COUNT = 300
SIZE = COUNT * PAGE
CACHESTAT = 451


def cached_pages(path: Path) -> int:
    """In the kernel's page cache, by cachestat(2)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        span, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(CACHESTAT, descriptor, span, found, 0):
            raise OSError(ctypes.get_errno(), "cachestat")
        return found[0]
    finally:
        os.close(descriptor)


def read_all(path: Path, *, direct: bool = False) -> bytes:
    """By read(2), in one piece or, past the page cache, in pieces of 128 KiB."""
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, 1 << 17) as buffer, memoryview(buffer) as view:
            content = b""
            while got := os.preadv(descriptor, [view], len(content)):
                content += view[:got]
            return content
    finally:
        os.close(descriptor)


@attrs.define
class Stage:
    """An engine with an image in its mount, seen from inside."""

    engine: Running
    source: Path
    mounted: Path
    content: bytes
    shelves: list[Shelves]
    filesystems: list[filesystem.ImageFilesystem]

    @property
    def served(self) -> int:
        """Blocks that came from the store."""
        return self.shelves[0].blocks.served

    @property
    def dropped(self) -> int:
        """Blocks dropped from the mount's page cache."""
        return self.filesystems[0].tidier.counters.dropped

    @property
    def domains(self) -> list[Domain]:
        return [agent.domain for agent in self.shelves[0]._agents()]

    async def read(self, *, direct: bool = False, path: Path | None = None) -> bytes:
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(partial(read_all, path or self.mounted, direct=direct))

    async def merge(self, *, label: str = "", first: int = 1000, count: int = COUNT) -> list[FakeAgent]:
        """Two agents that both have ``count`` of the image's pages, merged."""
        agents = []
        for base in (FIRST, SECOND):
            memory = {base + n * PAGE: page(first + n) for n in range(count)}
            agents.append(await self.engine.join(FakeAgent(self.engine.path, memory, label=label)))
        await self.engine.until(lambda: all(len(agent.placed) == count for agent in agents), "merged")
        return agents

    async def retire(self) -> None:
        """Waits until all segments are gone that nobody refers to; fills the newest first, since only full ones go."""
        store = self.domains[0].store
        old = set(store.segments)
        pages = {FIRST + n * PAGE: page(10_000 + n) for n in range(SEGMENT_SLOTS)}
        fillers = [await self.engine.join(FakeAgent(self.engine.path, dict(pages))) for _ in range(2)]
        await self.engine.until(lambda: all(len(agent.placed) == len(pages) for agent in fillers), "filled")
        await self.part(fillers)
        await self.engine.until(lambda: not old & set(store.segments), "retired")

    async def part(self, agents: list[FakeAgent]) -> None:
        for agent in agents:
            await trio.to_thread.run_sync(agent.leave)


Prepare = Callable[..., Any]


@pytest.fixture
def prepare(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    # The files of a test are new.
    monkeypatch.setattr(images, "Watch", partial(Watch, settle_seconds=0))
    shelves: list[Shelves] = []
    filesystems: list[filesystem.ImageFilesystem] = []
    original = server.Engine.shelves

    def remember(engine: server.Engine) -> Shelves:
        shelves.append(original(engine))
        return shelves[-1]

    class Remembered(filesystem.ImageFilesystem):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            filesystems.append(self)

    monkeypatch.setattr(server.Engine, "shelves", remember)
    monkeypatch.setattr(filesystem, "ImageFilesystem", Remembered)

    async def begin(**settings: Any) -> Stage:
        content = b"".join(page(1000 + n) for n in range(COUNT))
        source, mount = tmp_path / "disk.img", tmp_path / "mount"
        source.write_bytes(content)
        os.sync()
        mount.mkdir()
        engine = await start(mount=mount, images=(("disk", source),), **settings)
        return Stage(engine, source, mount / "disk", content, shelves, filesystems)

    return begin


async def test_merged_blocks_leave_the_page_cache_and_come_from_the_store(prepare: Prepare) -> None:
    stage = await prepare()
    await stage.merge()
    assert await stage.read() == stage.content
    assert await trio.to_thread.run_sync(cached_pages, stage.mounted) == COUNT
    await stage.engine.until(lambda: stage.dropped >= COUNT, "dropped")

    async def gone() -> bool:
        return await trio.to_thread.run_sync(cached_pages, stage.mounted) == 0

    await stage.engine.until(gone, "out of the page cache")
    before = stage.served
    # No file to read from any more: nothing but the store has it.
    os.posix_fadvise((descriptor := os.open(stage.source, os.O_RDONLY)), 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    left = await trio.to_thread.run_sync(cached_pages, stage.source)
    assert await stage.read() == stage.content
    assert stage.served - before == COUNT
    assert await stage.read(direct=True) == stage.content
    assert stage.served - before == 2 * COUNT
    blocks = (await stage.engine.status())["blocks"]
    assert blocks == {"served": stage.served, "entered": COUNT, "differing": 0}
    # All of it on a file system that is memory, nothing elsewhere.
    assert await trio.to_thread.run_sync(cached_pages, stage.source) == left


async def test_who_is_in_no_domain_is_served_from_the_file(prepare: Prepare) -> None:
    stage = await prepare()
    agents = await stage.merge()
    assert await stage.read(direct=True) == stage.content
    assert stage.served == 0
    assert await stage.read(direct=True) == stage.content
    assert stage.served == COUNT
    await stage.part(agents)
    await stage.engine.until(lambda: not stage.domains, "left")
    assert await stage.read(direct=True) == stage.content
    assert stage.served == COUNT


async def test_domains_are_served_from_their_own_store_only(prepare: Prepare) -> None:
    """Two users' guests read one image: that the one has it merged must not make it faster for the other."""
    stage = await prepare()
    agents = await stage.merge(label="one")
    # Verified, and served, for those in this domain.
    assert await stage.read(direct=True) == await stage.read(direct=True) == stage.content
    assert stage.served == COUNT
    await stage.part(agents)
    await stage.engine.until(lambda: not stage.domains, "left")
    other = await stage.engine.join(FakeAgent(stage.engine.path, {FIRST: page(1)}, label="two"))
    assert await stage.read(direct=True) == await stage.read(direct=True) == stage.content
    assert stage.served == COUNT
    await stage.part([other])
    await stage.engine.until(lambda: not stage.domains, "left")
    # The first one's are still there.
    await stage.engine.join(FakeAgent(stage.engine.path, {FIRST: page(1)}, label="one"))
    assert await stage.read(direct=True) == stage.content
    assert stage.served == 2 * COUNT


async def test_nothing_is_dropped_while_another_domain_has_it_open(prepare: Prepare) -> None:
    stage = await prepare()
    agents = await stage.merge(label="one")
    held = await trio.to_thread.run_sync(partial(os.open, stage.mounted, os.O_RDONLY))
    # No more than that: what it reads, the other domain finds cached.
    os.posix_fadvise(held, 0, 0, os.POSIX_FADV_RANDOM)
    await trio.to_thread.run_sync(os.pread, held, PAGE, 0)
    await stage.part(agents)
    await stage.engine.until(lambda: not stage.domains, "left")
    await stage.merge(label="two")
    assert await stage.read() == stage.content
    shelf = stage.domains[0].shelf(stage.filesystems[0]._images.by_name["disk"], stage.shelves[0].blocks)
    await stage.engine.until(lambda: shelf.there(1, COUNT - 1).bit_count() == COUNT - 1, "compared")
    await trio.sleep(0.1)
    assert stage.dropped == 0
    assert await trio.to_thread.run_sync(cached_pages, stage.mounted) == COUNT
    await trio.to_thread.run_sync(os.close, held)
    await stage.engine.until(lambda: stage.dropped >= COUNT - 1, "dropped when the other has closed it")


async def test_equal_blocks_of_another_image(prepare: Prepare, tmp_path: Path) -> None:
    stage = await prepare()
    await stage.merge()
    assert await stage.read(direct=True) == stage.content
    other = tmp_path / "other.img"
    other.write_bytes(page(5) + stage.content)
    await stage.engine.ask(op="mount", images=[["other", str(other)]])
    mounted = stage.mounted.parent / "other"
    assert await stage.read(direct=True, path=mounted) == page(5) + stage.content
    before = stage.served
    assert await stage.read(direct=True, path=mounted) == page(5) + stage.content
    assert stage.served - before == COUNT


async def test_a_block_whose_digest_somebody_has_forged_comes_from_the_file(prepare: Prepare) -> None:
    stage = await prepare()
    await stage.merge(first=5000)
    assert await stage.read() == stage.content
    domain = stage.domains[0]
    image = stage.filesystems[0]._images.by_name["disk"]
    for block in range(COUNT):
        digest = [int.from_bytes(image.digests[16 * block + at : 16 * block + at + 8], "little") for at in (0, 8)]
        assert lib.udd_index_publish(domain.index.handle, digest, 1, block) == 0
    for direct in (True, False, True):
        assert await stage.read(direct=direct) == stage.content
    await stage.engine.until(lambda: stage.shelves[0].blocks.differing >= 3 * COUNT, "compared by the tidier, too")
    assert await stage.read(direct=True) == await stage.read() == stage.content
    assert stage.served == stage.dropped == 0


async def test_a_file_changed_behind_our_back_shows_in_the_next_read(prepare: Prepare) -> None:
    stage = await prepare()
    await stage.merge()
    assert await stage.read(direct=True) == await stage.read(direct=True) == stage.content
    assert stage.served == COUNT
    for turn in range(20):
        changed = bytearray(stage.content)
        changed[turn * PAGE : turn * PAGE + 8] = b"new %4d" % turn
        with stage.source.open("r+b") as file:
            file.write(changed)
        assert await stage.read(direct=True) == bytes(changed)


async def test_segments_retired_while_they_are_served(prepare: Prepare) -> None:
    stage = await prepare(retire_seconds=0.05)
    for _ in range(3):
        agents = await stage.merge()
        async with trio.open_nursery() as nursery:

            async def keep_reading() -> None:
                while True:
                    assert await stage.read(direct=True) == stage.content

            keeper = await stage.engine.join(FakeAgent(stage.engine.path, {FIRST: page(1), SECOND: page(1)}))
            nursery.start_soon(keep_reading)
            before = stage.served
            await stage.engine.until(lambda before=before: stage.served > before, "served")
            await stage.part(agents)
            await stage.retire()
            nursery.cancel_scope.cancel()
        await stage.part([keeper])
        await stage.engine.until(lambda: not stage.domains, "left")


@pytest.mark.parametrize("way", ["image", "engine"])
async def test_unmounting_while_it_is_served(prepare: Prepare, way: str) -> None:
    stage = await prepare()
    await stage.merge()
    assert await stage.read(direct=True) == await stage.read() == stage.content
    if way == "image":
        await stage.engine.ask(op="umount", image="disk", path="/disk")
        assert all(not domain.shelves for domain in stage.domains)
        await stage.engine.ask(op="mount", images=[["disk", str(stage.source)]])
        assert await stage.read(direct=True) == stage.content
        return
    reading = os.open(stage.source, os.O_RDONLY)
    os.close(reading)
    async with trio.open_nursery() as nursery:

        async def read_on() -> None:
            try:
                while True:
                    assert await stage.read(direct=True) == stage.content
            except OSError:
                return

        for _ in range(3):
            nursery.start_soon(read_on)
        await trio.sleep(0.2)
        stage.engine.scope.cancel()
    with trio.fail_after(10):
        while stage.mounted.parent.is_mount():
            await trio.sleep(0.01)


async def test_a_new_process_with_the_number_of_an_old_one_is_nobody(prepare: Prepare) -> None:
    stage = await prepare()
    await stage.merge()
    descriptor = await trio.to_thread.run_sync(partial(os.open, stage.mounted, os.O_RDONLY | os.O_DIRECT))
    try:
        (handle,) = stage.filesystems[0].handles.values()
        assert handle.opener.there
        handle.opener = attrs.evolve(handle.opener, started=(handle.opener.started or 0) - 1)
        handle.shelf, handle.asked = None, -1
        assert stage.filesystems[0]._find_shelf(handle) is None
    finally:
        await trio.to_thread.run_sync(os.close, descriptor)


# ---- clones, which are written ----


async def clone_of(stage: Stage) -> tuple[Path, Clone]:
    """A clone of the stage's image, in the mount."""
    path = Path(await stage.engine.ask(op="clone", name="clone", base=str(stage.source)))
    image = stage.filesystems[0]._images.by_name[path.name]
    assert isinstance(image, Clone)
    assert image.kept is None
    return path, image


def write(path: Path, data: bytes, offset: int, *, direct: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            assert os.pwrite(descriptor, buffer, offset) == len(data)
    finally:
        os.close(descriptor)


@pytest.mark.require("qemu-utils")
@pytest.mark.parametrize("direct", [False, True])
async def test_what_is_written_to_a_clone_never_comes_from_the_store_again(
    prepare: Prepare, tmp_path: Path, *, direct: bool
) -> None:
    """All else does, while it is written."""
    stage = await prepare(state_dir=tmp_path / "state")
    path, _ = await clone_of(stage)
    assert (await trio.to_thread.run_sync(path.stat)).st_mode & 0o222
    await stage.merge()
    content = bytearray(stage.content)
    for _ in range(2):
        assert await stage.read(direct=True, path=path) == content
    for block in (0, 7, 130, COUNT - 1):
        before = stage.served
        data = page(20_000 + block)
        await trio.to_thread.run_sync(partial(write, path, data, block * PAGE, direct=direct))
        content[block * PAGE : (block + 1) * PAGE] = data
        assert await stage.read(direct=True, path=path) == content
        assert COUNT - 10 <= stage.served - before < COUNT
        assert await stage.read(path=path) == content
    # Nothing of the others' is gone.
    assert await stage.read() == stage.content


@pytest.mark.require("qemu-utils")
async def test_the_tidier_notes_nothing_that_was_written_since_it_looked(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await prepare(state_dir=tmp_path / "state")
    path, image = await clone_of(stage)
    compare = tidy.Work._to_drop
    written: list[bytes] = []

    def write_first(work: tidy.Work, *arguments: Any) -> Any:
        if work.image is image and not written:
            written.append(page(30_000))
            image._overlay.write(0, written[0])
            image._forget(0, PAGE)
        return compare(work, *arguments)

    monkeypatch.setattr(tidy.Work, "_to_drop", write_first)
    # It is cached and digested first, so that the tidier has something to compare.
    assert await stage.read(path=path) == stage.content
    await stage.merge()
    stage_shelf = stage.domains[0].shelf(image, stage.shelves[0].blocks)
    descriptor = await trio.to_thread.run_sync(partial(os.open, path, os.O_RDONLY))
    await trio.to_thread.run_sync(os.posix_fadvise, descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    monkeypatch.setattr(stage_shelf, "put", lambda *_: 0)
    assert await trio.to_thread.run_sync(os.pread, descriptor, SIZE, 0) == stage.content
    monkeypatch.undo()
    monkeypatch.setattr(tidy.Work, "_to_drop", write_first)
    await stage.engine.until(lambda: bool(written), "looked at by the tidier")
    await stage.engine.until(lambda: stage.dropped >= COUNT - 1, "dropped all the same")
    assert stage_shelf.there(0, 2) == 0b10
    assert (await stage.read(direct=True, path=path))[: 2 * PAGE] == written[0] + page(1001)
    await trio.to_thread.run_sync(os.close, descriptor)


@pytest.mark.require("qemu-utils")
async def test_a_write_that_fails_is_forgotten_too(prepare: Prepare, tmp_path: Path) -> None:
    """A part of it may be on the disk."""
    stage = await prepare(state_dir=tmp_path / "state")
    path, image = await clone_of(stage)
    await stage.merge()
    for _ in range(2):
        assert await stage.read(direct=True, path=path) == stage.content
    overlay, complete = image._overlay, image._overlay.write

    def fail(offset: int, data: bytes) -> None:
        complete(offset, data[:PAGE])
        raise OSError(errno.ENOSPC, "no room")

    overlay.write = fail  # type: ignore[method-assign]
    overlay.write_at_hand = lambda offset, data: False  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        await trio.to_thread.run_sync(partial(write, path, page(1) + page(2), 0, direct=True))
    assert (await stage.read(direct=True, path=path))[: 3 * PAGE] == page(1) + page(1001) + page(1002)


@pytest.mark.require("qemu-utils")
async def test_nobody_notes_what_is_being_written(prepare: Prepare, tmp_path: Path) -> None:
    """Who reads while a write is under way gets old or new blocks, and neither is remembered."""
    stage = await prepare(state_dir=tmp_path / "state")
    path, image = await clone_of(stage)
    await stage.merge()
    complete = image._overlay.write
    begun, go_on = threading.Event(), threading.Event()

    def slow(offset: int, data: bytes) -> None:
        begun.set()
        assert go_on.wait(20)
        complete(offset, data)

    image._overlay.write = slow  # type: ignore[method-assign]
    image._overlay.write_at_hand = lambda offset, data: False  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, partial(write, path, page(1), 5 * PAGE, direct=True))
        await trio.to_thread.run_sync(begun.wait)
        for _ in range(2):
            assert await stage.read(direct=True, path=path) == stage.content
        shelf = stage.domains[0].shelf(image, stage.shelves[0].blocks)
        # Not the read of 128 KiB that has it, and all others.
        assert shelf.there(0, 64) == (1 << 64) - (1 << 32)
        assert image.digests[5 * 16 : 6 * 16] == bytes(16)
        go_on.set()
    assert (await stage.read(direct=True, path=path))[5 * PAGE : 6 * PAGE] == page(1)
