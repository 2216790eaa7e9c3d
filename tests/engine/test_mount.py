"""Images in the engine's own mount: hints on them need no hashing by the agent."""

import os
from pathlib import Path

import pytest
import trio
from engine.conftest import Start
from engine.fake_agent import PAGE, FakeAgent, page

from udedup._native import lib
from udedup.errors import UdedupError

pytestmark = pytest.mark.require("fuse")

FIRST, SECOND = 0x10000000, 0x20000000


def write_image(path: Path, pages: int) -> bytes:
    content = b"".join(page(1000 + n) for n in range(pages))
    path.write_bytes(content)
    return content


def read(path: Path, size: int) -> tuple[int, bytes]:
    """Inode and first bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(descriptor).st_ino, os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


async def test_hinted_image_blocks_merge_by_their_known_digest(start: Start, tmp_path: Path) -> None:
    content = write_image(tmp_path / "disk.img", 64)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount, images=(("disk", tmp_path / "disk.img"),))
    inode, served = await trio.to_thread.run_sync(read, mount / "disk", len(content))
    assert served == content

    # Memory that the linear scan is never shown: only hints can bring it in.
    agents = []
    for base in (FIRST, SECOND):
        agent = FakeAgent(engine.path, {base + n * PAGE: page(1000 + n) for n in range(64)})
        agent.on_scan = lambda count, packet: (0, 0, 0, bytes(12) + b"\1\0\0\0")  # type: ignore[method-assign]
        agents.append(await engine.join(agent))
    for agent, base in zip(agents, (FIRST, SECOND), strict=True):
        agent.hint(base, len(content), inode=inode, offset=0)
    await engine.until(lambda: all(len(agent.placed) == 64 for agent in agents), "merged")
    assert not any(lib.UDD_VISIT in agent.requests for agent in agents)

    status = await engine.status()
    assert status["hints"]["content"] >= 64
    assert status["hints"]["visited"] == 128
    assert status["pages_scanned"] == 128
    assert [image["name"] for image in status["images"]] == ["disk"]
    assert status["mount"] == str(mount)


async def test_eager_shares_a_block_at_its_first_read(start: Start, tmp_path: Path) -> None:
    """The first reader's pages go to the store, the next reader's are merged with them. Other files' are not shared."""
    content = write_image(tmp_path / "disk.img", 64)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount, images=(("disk", tmp_path / "disk.img"),), policy="eager")
    inode, _ = await trio.to_thread.run_sync(read, mount / "disk", len(content))

    async def join(base: int) -> FakeAgent:
        memory = {base + n * PAGE: page(1000 + n if n < 64 else base + n) for n in range(80)}
        agent = FakeAgent(engine.path, memory)
        agent.on_scan = lambda count, packet: (0, 0, 0, bytes(12) + b"\1\0\0\0")  # type: ignore[method-assign]
        await engine.join(agent)
        agent.hint(base + 64 * PAGE, 16 * PAGE)
        agent.hint(base, len(content), inode=inode, offset=0)
        return agent

    first = await join(FIRST)
    await engine.until(lambda: len(first.placed) == 64, "shared alone")
    status = await engine.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (64, 0)
    second = await join(SECOND)
    await engine.until(lambda: len(second.placed) == 64, "merged")
    status = await engine.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (64, 64)
    assert lib.UDD_COPY not in second.requests


async def test_images_added_later(start: Start, tmp_path: Path) -> None:
    content = write_image(tmp_path / "more.img", 4)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount)
    added = await engine.ask(op="mount", images=[["more", str(tmp_path / "more.img")]])
    assert added == [str(mount / "more")]
    assert (await trio.to_thread.run_sync(read, mount / "more", len(content)))[1] == content
    for images in ([["x", "more.img"]], [["x", "/nonexistent"]], [["more", str(tmp_path / "more.img")]]):
        with pytest.raises(UdedupError) as caught:
            await engine.ask(op="mount", images=images)
        assert "\n" not in str(caught.value)


async def test_the_mount_is_gone_with_the_engine(start: Start, tmp_path: Path) -> None:
    write_image(tmp_path / "disk.img", 4)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount, images=((None, tmp_path / "disk.img"),))
    assert mount.is_mount()
    engine.scope.cancel()
    with trio.fail_after(10):
        while mount.is_mount():
            await trio.sleep(0.01)
