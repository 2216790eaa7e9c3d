"""Images in the engine's own mount: hints on them need no hashing by the agent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from engine.conftest import Start
from engine.fake_agent import PAGE, FakeAgent, page

from udedup._native import lib
from udedup.errors import UdedupError

pytestmark = pytest.mark.require("fuse", "qemu-utils")

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


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_hinted_image_blocks_merge_by_their_known_digest(start: Start, tmp_path: Path, kind: str) -> None:
    """Hints go by the blocks of the disk, wherever the image has them."""
    content = write_image(tmp_path / "disk.bin", 64)
    path = tmp_path / "disk.img"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, tmp_path / "disk.bin", path], check=True)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount, images=(("disk", path),))
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
    assert [(image["name"], image["format"], image["size"]) for image in status["images"]] == [
        ("disk", kind, len(content))
    ]
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


async def test_backing_files_where_the_engine_allows_them(start: Start, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "top").mkdir()
    content = write_image(tmp_path / "base" / "base.raw", 4)
    path = tmp_path / "top" / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-f", "qcow2", "-b", "../base/base.raw", "-F", "raw", path], check=True)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount)
    with pytest.raises(UdedupError, match="--allow-backing"):
        await engine.ask(op="mount", images=[[None, str(path)]])
    engine.scope.cancel()
    while mount.is_mount():
        await trio.sleep(0.01)
    engine = await start(mount=mount, images=((None, path),), allow_backing=(tmp_path / "base",))
    assert (await trio.to_thread.run_sync(read, mount / "disk.raw", len(content)))[1] == content


async def test_umount(start: Start, tmp_path: Path) -> None:
    """The name is free again at once, for another image too, and the file is let go of."""
    first, second = write_image(tmp_path / "a.img", 4), write_image(tmp_path / "b.img", 8)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount, images=(("disk", tmp_path / "a.img"),))
    ways = (("disk", "/nowhere"), ("x", str(tmp_path / "b.img")), ("./disk", str(mount / "disk")))
    contents = [(first, "b.img"), (second, "a.img"), (first, "b.img")]
    for (name, path), (content, following) in zip(ways, contents, strict=True):
        inode, found = await trio.to_thread.run_sync(read, mount / "disk", 16 * PAGE)
        assert found == content
        assert await engine.ask(op="umount", image=name, path=path)
        assert await trio.to_thread.run_sync(os.listdir, mount) == []
        assert not await trio.to_thread.run_sync((mount / "disk").exists)
        assert not open_files(tmp_path / "a.img", tmp_path / "b.img")
        await engine.ask(op="mount", images=[["disk", str(tmp_path / following)]])
        assert (await trio.to_thread.run_sync(read, mount / "disk", PAGE))[0] != inode
    with pytest.raises(UdedupError, match="is not in the mount"):
        await engine.ask(op="umount", image="none", path="/none")


def open_files(*paths: Path) -> list[Path]:
    """Those of ``paths`` that this process, in which the engine is, has open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(entry.readlink())
        except FileNotFoundError:
            continue
    return [path for path in paths if path in links]


HOLD = {
    "open": "file = open(sys.argv[1])",
    "mapped": "map = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=1); os.closerange(3, 100)",
    "inherited": "file = open(sys.argv[1]); os.fork() and os._exit(0)",
}
"""Ways to have a file open."""


@pytest.mark.parametrize("way", HOLD)
async def test_busy_image_is_not_unmounted(start: Start, tmp_path: Path, way: str) -> None:
    write_image(tmp_path / "disk.img", 4)
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount, images=(("disk", tmp_path / "disk.img"),))
    program = f"import mmap, os, sys, time; {HOLD[way]}; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, mount / "disk"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(await trio.to_thread.run_sync(process.stdout.readline))
    command = Path(f"/proc/{pid}/comm").read_text().strip()
    try:
        with pytest.raises(UdedupError) as caught:
            await engine.ask(op="umount", image="disk", path="/disk")
        assert str(caught.value) == f"image disk: is in use by process {pid} ({command}); end that first"
        assert await trio.to_thread.run_sync(os.listdir, mount) == ["disk"]
    finally:
        os.kill(pid, signal.SIGKILL)
        await trio.to_thread.run_sync(process.wait)
        process.stdout.close()
    with trio.fail_after(10):
        while True:
            try:
                assert await engine.ask(op="umount", image="disk", path="/disk")
            except UdedupError:
                await trio.sleep(0.05)
            else:
                break


async def test_200_images_come_and_go(start: Start, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    engine = await start(mount=mount)
    sources = tmp_path / "sources"
    sources.mkdir()
    base = write_image(sources / "base.raw", 4)
    for number in range(200):
        path = sources / f"{number}.qcow2"
        if number == 0:
            command = ["qemu-img", "create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, str(16 << 40)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        else:
            path.write_bytes((sources / "0.qcow2").read_bytes())
    for number in range(200):
        await engine.ask(op="mount", images=[[None, str(sources / f"{number}.qcow2")]])
    assert len(await trio.to_thread.run_sync(os.listdir, mount)) == 200
    for number in range(0, 200, 7):
        file = mount / f"{number}.raw"
        assert (await trio.to_thread.run_sync(read, file, 4 * PAGE))[1] == base
        assert (await trio.to_thread.run_sync(file.stat)).st_size == 16 << 40
    for number in range(200):
        await engine.ask(op="umount", image=f"{number}.raw", path="/x")
    assert await trio.to_thread.run_sync(os.listdir, mount) == []


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
