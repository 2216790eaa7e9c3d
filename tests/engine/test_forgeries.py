"""What a process could forge to get at another domain, or to have the engine hold things: nothing comes of it."""

import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
from engine.conftest import Running, Start
from engine.fake_agent import HEADER, PAGE, FakeAgent
from engine.hostile import Hoarder
from engine.test_server import BASE, Liar, Warnings, credentials_of, memory, one_dropped, pair

from udedup._native import lib

STRANGER = 4711


async def join_as_stranger(engine: Running, agent: FakeAgent) -> FakeAgent:
    """Another user's agent joins."""
    with credentials_of(STRANGER):
        joined: FakeAgent = await engine.join(agent)
    return joined


async def scans(engine: Running, rounds: int) -> None:
    """Lets the linear scan go round so many times."""
    start = (await engine.status())["full_scans"]

    async def scanned() -> bool:
        return bool((await engine.status())["full_scans"] >= start + rounds)

    await engine.until(scanned, "scanned")


# ---- another domain's segments ----


class ClaimsRuns(FakeAgent):
    """Says that it is a fork of somebody, and that it has what that one has."""

    claimed: dict[int, tuple[int, int]]

    def on_runs(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        cursor = struct.unpack_from("<Q", packet, HEADER.size)[0]
        items = [
            struct.pack("<QIIIxxxx", address, 1, *self.claimed[address])
            for address in sorted(self.claimed)
            if address >= cursor
        ][: lib.UDD_ITEMS_MAX]
        return 0, len(items), self.drops.head, b"".join(items)


@pytest.mark.parametrize("flags", [lib.UDD_HELLO_FORKED, lib.UDD_HELLO_REJOIN])
async def test_runs_of_another_domain_count_nothing(start: Start, flags: int) -> None:
    """Neither does it get its segments, nor keeps it their slots alive, nor can it give up what others hold."""
    engine = await start(retire_seconds=0.1)
    first, second = await pair(engine, 300)
    before = await engine.status()
    thief = ClaimsRuns(engine.path, memory(300, base=3 * BASE), flags=flags)
    thief.claimed = dict(second.placed)
    thief.engine_id = first.engine_id
    await join_as_stranger(engine, thief)
    await engine.until(lambda: lib.UDD_RUNS in thief.requests, "asked for its runs")
    for address, (segment, slot) in second.placed.items():
        thief.push_drop(address, segment, slot)
    await scans(engine, 20)
    assert thief.farewell is None
    assert not thief.segments
    assert not thief.placed
    status = await engine.status()
    assert status["pages_shared"] == before["pages_shared"]
    assert [agent["pages_sharing"] for agent in status["agents"] if agent["uid"] == STRANGER] == [0]
    # What was the others' still is, and goes when they do.
    for agent in (first, second):
        await trio.to_thread.run_sync(agent.leave)

    async def empty() -> bool:
        return bool((await engine.status())["pages_shared"] == 0)

    await engine.until(empty, "nothing is held by claims")


async def test_equal_content_is_not_even_compared_across_users(start: Start) -> None:
    """The stranger has every page of the others: no digest meets, no copy is asked for, no segment is sent."""
    engine = await start()
    await pair(engine, 200)
    stranger = await join_as_stranger(engine, FakeAgent(engine.path, memory(200, base=3 * BASE)))
    for i in range(200):
        stranger.hint(3 * BASE + i * PAGE, PAGE)
    await scans(engine, 10)
    assert set(stranger.requests) <= {lib.UDD_SCAN, lib.UDD_VISIT}
    assert not stranger.segments


async def test_users_see_their_own_part_only(start: Start) -> None:
    """Totals would tell what goes on in other domains."""
    engine = await start()
    await pair(engine, 200)
    with credentials_of(STRANGER):
        for with_kernel in (False, True):
            status = await engine.ask(op="status", kernel=with_kernel)
            assert status["agents"] == status["images"] == []
            numbers = {name: status[name] for name in status if name.startswith("pages_") and name != "pages_to_scan"}
            assert set(numbers.values()) == {0}, numbers
            assert status["full_scans"] == status["bytes_saved"] == 0
            for part in ("store", "merges", "hints"):
                assert set(status[part].values()) == {0}
            assert status["memory"]["agents"] == status["memory"]["managed"] == 0
            if with_kernel:
                assert status["kernel"]["saved_bytes"] == 0
    assert (await engine.status())["pages_sharing"] == 200


# ---- descriptors ----


SMUGGLED = 100


def smuggled() -> int:
    """Descriptors of the file that this process, the test's and the engine's, has open."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += entry.readlink().name == "smuggled"
        except FileNotFoundError:
            continue
    return found


class SmugglingSocket(socket.socket):
    """Adds descriptors to whatever is sent."""

    files: list[int]

    def send(self, data: Any, flags: int = 0) -> int:
        return socket.send_fds(self, [data], self.files)


async def test_descriptors_for_the_engine_are_not_kept(start: Start, tmp_path: Path) -> None:
    """It never wants any: those sent along, with a hello or an answer, would fill its table."""
    engine = await start()
    agent = FakeAgent(engine.path, memory(100))
    sock = SmugglingSocket(fileno=agent.sock.detach())
    sock.files = [os.open(tmp_path / "smuggled", os.O_RDWR | os.O_CREAT) for _ in range(SMUGGLED)]
    agent.sock = sock
    await engine.join(agent)
    await scans(engine, 5)
    assert smuggled() == SMUGGLED
    for file in sock.files:
        os.close(file)


# ---- messages ----


class HelloAgain(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        self.sock.send(self.hello())


class Replay(Liar):
    """Sends its last answer once more."""

    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> Any:
        answer = self.on_scan(count, packet)
        sequence = HEADER.unpack_from(packet)[3]
        whole = HEADER.pack(lib.UDD_MAGIC, lib.UDD_DONE, answer[1], sequence, 0, answer[2]) + answer[3]
        self.sock.send(whole)
        self.sock.send(whole)


class AnswersTheNext(Liar):
    """An answer to what was not asked yet."""

    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        sequence = HEADER.unpack_from(packet)[3]
        self.sock.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_DONE, 0, sequence + 1, 0, 0))


class CountBeyondTheMessage(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 0xFFFF, 0, struct.pack("<IIII", 0xFFFF, 0, 0, 1)


class SkippedTooMuch(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 0, 2**64 - 1, struct.pack("<IIII", 0, 0, 0, 1)


class DropTail(Liar):
    """Takes records back."""

    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> Any:
        self.drops.tail = 2**32
        return self.on_scan(count, packet)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HelloAgain, "agents don't send"),
        (Replay, "not under way"),
        (AnswersTheNext, "not under way"),
        (CountBeyondTheMessage, "reported 65535"),
        (SkippedTooMuch, "visited 0 of"),
        (DropTail, "drop ring"),
    ],
)
async def test_forged_messages(start: Start, warnings: Warnings, kind: type[Liar], text: str) -> None:
    engine = await start()
    await engine.join(kind(engine.path, memory(500)))
    await one_dropped(engine, warnings, text)


# ---- more than there is ----


async def test_one_user_cannot_have_all_connections(start: Start) -> None:
    engine = await start(agents_max=40)
    crowd = [await join_as_stranger(engine, FakeAgent(engine.path, {})) for _ in range(14)]
    assert [bool(agent.refused) for agent in crowd] == [False] * 10 + [True] * 4
    assert "10 connections of uid 4711 already" in crowd[-1].refused
    own = await engine.join(FakeAgent(engine.path, {}))
    assert not own.refused


async def test_connections_that_say_nothing_are_bounded(start: Start) -> None:
    """They need not wait for a word from each."""
    engine = await start(agents_max=40)
    with credentials_of(STRANGER):
        silent = []
        for _ in range(200):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            await trio.to_thread.run_sync(sock.connect, str(engine.path))
            silent.append(sock)
            await trio.sleep(0.001)
        closed = 0
        for sock in silent:
            try:
                closed += sock.recv(10) == b""
            except BlockingIOError:
                continue
        assert closed == 200 - 10 - 64
    assert not (await engine.join(FakeAgent(engine.path, {}))).refused
    for sock in silent:
        sock.close()


async def test_pages_that_nobody_has_do_not_fill_the_store(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent holds twice what the kernel says it has at most, whatever it claims."""
    monkeypatch.setattr("udedup.engine.agent.Agent._pages_most", 3000)
    engine = await start()
    await engine.join(Hoarder(engine.path, {}))

    async def refused() -> bool:
        return bool((await engine.status())["merges"]["deferred"] > 0)

    await engine.until(refused, "some were not published")
    await trio.sleep(1)
    status = await engine.status()
    assert status["pages_shared"] <= 3000
    assert status["store"]["bytes"] <= 2 * 3000 * PAGE
