"""The client for trio programs: what it asks is done, and what goes wrong is one line."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from engine.conftest import Running, Start, start_engine
from engine.fake_agent import FakeAgent
from engine.test_server import memory, merge_all, pair

import udedup
from udedup.engine import maplimit
from udedup.engine.clients import receive_packet
from udedup.engine.config import EngineConfig
from udedup.engine.control import request
from udedup.errors import UdedupError


async def test_status_is_what_the_command_prints(start: Start) -> None:
    running = await start()
    await pair(running, 20)
    async with udedup.connect(running.path) as engine:
        status = await engine.status()
        assert status.kernel is None
        assert (status.pages_shared, status.pages_sharing) == (20, 20)
        assert msgspec.structs.asdict(status.limits) == {
            "sleep_millisecs": 0,
            "cpu_percent": None,
            "hint_slots": 1 << 18,
            "vmas": maplimit.vma_limit(),
        }
        assert (status.pid, status.uptime_seconds > 0) == (os.getpid(), True)
        assert [(agent.command, agent.pages_sharing, agent.paused) for agent in status.agents] == [
            ("fake", 20, False)
        ] * 2
        full = await engine.status(kernel=True)
        assert full.kernel is not None
        printed = await running.status()
    assert printed.keys() == set(msgspec.structs.asdict(status))
    assert printed["hints"] == msgspec.structs.asdict(status.hints)


async def test_unmerge_pause_and_resume(start: Start) -> None:
    running = await start()
    first, second = await pair(running, 10)
    async with udedup.connect(running.path) as engine:
        assert await engine.unmerge(os.getpid()) == 20
        assert not first.placed
        assert {agent.reason for agent in (await engine.status()).agents} == {"unmerged on request"}
        assert await engine.resume() == 2
        await merge_all(running, first, second)
        assert await engine.pause() == 2
        status = await engine.status()
        assert {(agent.paused, agent.merging, agent.reason) for agent in status.agents} == {
            (True, False, "paused on request")
        }
        assert status.pages_sharing == 10  # what is merged stays so
        third = await running.join(FakeAgent(running.path, memory(10)))
        await merge_all(running, first, second, third)
        assert await engine.resume(os.getpid()) == 3
        with pytest.raises(UdedupError, match="no wrapped process has pid 1: see"):
            await engine.pause(1)
        # A refusal is no reason to part.
        assert await engine.check_domain("private")


async def test_a_pause_leaves_the_reason_of_an_unmerge(start: Start) -> None:
    running = await start()
    await running.join(FakeAgent(running.path, memory(1)))
    async with udedup.connect(running.path) as engine:
        await engine.unmerge()
        await engine.pause()
        assert (await engine.status()).agents[0].reason == "unmerged on request"


async def test_several_tasks_ask_at_a_time(start: Start) -> None:
    running = await start()
    answers = []
    async with udedup.connect(running.path) as engine, trio.open_nursery() as nursery:

        async def ask() -> None:
            answers.append((await engine.status()).policy)

        for _ in range(10):
            nursery.start_soon(ask)
    assert answers == ["xlh"] * 10


async def test_images_need_a_mount(start: Start) -> None:
    running = await start()
    async with udedup.connect(running.path) as engine:
        for ask in (
            lambda: engine.mount("disk"),
            lambda: engine.umount("disk"),
            lambda: engine.clone("base", "one"),
            engine.clones,
            lambda: engine.show_clone("one"),
            lambda: engine.commit_clone("one"),
            lambda: engine.discard_clone("one"),
        ):
            with pytest.raises(UdedupError, match="this engine has no mount: start it with --mount DIR"):
                await ask()


@pytest.mark.require("fuse", "root")
async def test_images_and_clones(start: Start, tmp_path: Path) -> None:
    place, disk = tmp_path / "mount", tmp_path / "disk"
    place.mkdir()
    disk.write_bytes(os.urandom(1 << 20))
    running = await start(mount=place, state_dir=tmp_path / "state")
    async with udedup.connect(running.path) as engine:
        shown = await engine.mount(disk, name="one")
        assert shown == place / "one"
        assert await trio.Path(shown).read_bytes() == disk.read_bytes()
        (image,) = (await engine.status()).images
        assert (image.name, image.blocks_read, image.blocks_served) == ("one", 256, 0)
        clone = await engine.clone(disk, "vm")
        assert [record.shown for record in await engine.clones()] == [str(clone)]
        await engine.umount("vm.raw")
        assert await engine.show_clone("vm") == clone
        await engine.discard_clone("vm")
        await engine.umount(shown)
        assert (await engine.status()).images == []


async def test_there_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(UdedupError) as raised:
        async with udedup.connect(tmp_path / "nobody"):
            raise AssertionError
    assert str(raised.value) == (
        f"no engine listens at {tmp_path / 'nobody'}: start one with `udedup engine`, or name its socket with --socket"
    )


async def end(running: Running) -> None:
    running.scope.cancel()
    await running.until(lambda: not running.path.exists(), "ended")


async def test_it_finds_the_next_engine(socket_path: Path, nursery: trio.Nursery) -> None:
    config = EngineConfig(socket=socket_path, sleep_millisecs=0)
    running = await start_engine(nursery, config)
    async with udedup.connect(socket_path) as engine:
        await engine.status()
        await end(running)
        with pytest.raises(UdedupError, match="no engine listens"):
            await engine.status()
        await start_engine(nursery, config)
        assert (await engine.status()).agents == []


async def test_a_request_is_not_lost_where_the_engine_was_replaced(socket_path: Path, nursery: trio.Nursery) -> None:
    config = EngineConfig(socket=socket_path, sleep_millisecs=0)
    running = await start_engine(nursery, config)
    async with udedup.connect(socket_path) as engine:
        await engine.status()
        await end(running)
        await start_engine(nursery, config)
        assert (await engine.status()).agents == []


class Server:
    """What listens may be anything: answers each packet by what the test says."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.sock.bind(str(path))
        self.sock.listen(1)

    async def serve(self, answers: list[list[bytes]]) -> None:
        """One connection; takes a request for each answer, of several packets."""
        await trio.lowlevel.wait_readable(self.sock)
        client, _ = self.sock.accept()
        client.setblocking(False)
        with client:
            for packets in answers:
                if not await receive_packet(client, 65536):
                    return
                for packet in packets:
                    client.send(packet)


@contextmanager
def listening(path: Path) -> Iterator[Server]:
    server = Server(path)
    with server.sock:
        yield server


@pytest.mark.parametrize(
    "answer", [b".rubbish", b".{}", b'.{"ok":true,"result":{"pid":1}}', b'.{"ok":true}', b".[1]", b'.{"ok":1}']
)
async def test_nonsense_is_one_line(socket_path: Path, nursery: trio.Nursery, answer: bytes) -> None:
    with listening(socket_path) as server:
        nursery.start_soon(server.serve, [[answer]])
        async with udedup.connect(socket_path) as engine:
            with pytest.raises(UdedupError, match="does not answer like an engine of this version"):
                await engine.status()


async def test_it_hangs_up_in_the_middle(socket_path: Path, nursery: trio.Nursery) -> None:
    with listening(socket_path) as server:
        nursery.start_soon(server.serve, [[b'+{"ok":']])
        async with udedup.connect(socket_path) as engine:
            with pytest.raises(UdedupError, match="failed: it closed the connection"):
                await engine.unmerge()


async def test_a_late_answer_is_not_taken_for_the_next(
    socket_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    late = trio.Event()
    with listening(socket_path) as server:

        async def serve() -> None:
            await trio.lowlevel.wait_readable(server.sock)
            client, _ = server.sock.accept()
            with client:
                await late.wait()
            await server.serve([[b'.{"ok":true,"result":7}']])

        nursery.start_soon(serve)
        async with udedup.connect(socket_path) as engine:
            with trio.move_on_after(1) as scope:
                await engine.pause(1)
            assert scope.cancelled_caught
            late.set()
            assert await engine.pause(2) == 7


async def test_silence_is_not_waited_for_without_end(socket_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    with listening(socket_path):
        async with udedup.connect(socket_path) as engine:
            with pytest.raises(UdedupError, match=r"did not answer within 330 s"):
                await engine.status()


async def test_a_request_that_is_too_long(socket_path: Path) -> None:
    with listening(socket_path):
        async with udedup.connect(socket_path) as engine:
            with pytest.raises(UdedupError, match="the engine takes 65536: ask for less"):
                await engine.mount("x" * 70000)


async def test_the_queue_is_full_for_a_while(socket_path: Path, nursery: trio.Nursery) -> None:
    with listening(socket_path) as server, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        server.sock.listen(0)
        other.connect(str(socket_path))

        async def make_room() -> None:
            await trio.sleep(0.05)
            first, _ = server.sock.accept()
            first.close()
            await server.serve([[b'.{"ok":true,"result":7}']])

        nursery.start_soon(make_room)
        async with udedup.connect(socket_path) as engine:
            assert await engine.pause() == 7


async def test_other_users_may_pause_their_own(start: Start) -> None:
    """The same rule as for "unmerge", which tests/cli tries with other users."""
    running: Running = await start()
    await running.join(FakeAgent(running.path, memory(1)))
    assert await trio.to_thread.run_sync(request, running.path, {"op": "pause", "pid": os.getpid()}) == 1
