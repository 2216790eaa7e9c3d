"""The whole engine with fake agents: pages merge, counts agree, who misbehaves is dropped alone, with one line."""

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from engine.conftest import Running, Start
from engine.fake_agent import HEADER, PAGE, FakeAgent, page

from udedup._native import lib
from udedup.engine.agent import Agent
from udedup.engine.link import peer_of
from udedup.engine.store import Segment
from udedup.errors import UdedupError

Warnings = Callable[[], list[str]]
BASE = 0x10000000


def memory(count: int, *, base: int = BASE, first: int = 1) -> dict[int, bytes]:
    """``count`` different pages in a row."""
    return {base + i * PAGE: page(first + i) for i in range(count)}


async def merge_all(engine: Running, *agents: FakeAgent) -> None:
    """Waits until all pages of all agents are merged, and the engine knows."""
    await engine.until(lambda: all(len(agent.placed) == len(agent.memory) for agent in agents), "all merged")

    async def counted() -> bool:
        status = await engine.status()
        return bool(status["pages_shared"] + status["pages_sharing"] == sum(len(agent.memory) for agent in agents))

    await engine.until(counted, "counted")


async def candidates(engine: Running, least: int) -> None:
    """Waits until so many pages are known."""

    async def known() -> bool:
        return bool((await engine.status())["pages_unshared"] >= least)

    await engine.until(known, "known")


async def pair(engine: Running, count: int = 300, kind: type[FakeAgent] = FakeAgent) -> tuple[FakeAgent, FakeAgent]:
    """Two agents with the same pages at different addresses, merged."""
    first = await engine.join(kind(engine.path, memory(count)))
    await candidates(engine, count)
    second = await engine.join(kind(engine.path, memory(count, base=2 * BASE)))
    await merge_all(engine, first, second)
    return first, second


async def test_two_agents_share(start: Start) -> None:
    engine = await start()
    first, second = await pair(engine, 1000)
    for agent in (first, second):
        for address, content in agent.memory.items():
            assert agent.read(address) == content
    assert [first.placed[BASE + i * PAGE] for i in range(1000)] == [
        second.placed[2 * BASE + i * PAGE] for i in range(1000)
    ]
    status = await engine.status()
    assert status["pages_shared"] == 1000
    assert status["pages_sharing"] == 1000
    assert status["bytes_saved"] == 1000 * PAGE
    assert status["pages_unshared"] == 0
    assert status["merges"]["pages"] == 2000
    assert status["full_scans"] > 1
    assert [agent["pages_sharing"] for agent in status["agents"]] == [1000, 1000]


async def test_neighbours_in_memory_are_neighbours_in_the_store(start: Start) -> None:
    engine = await start()
    first, second = await pair(engine, 1024)
    for agent in (first, second):
        slots = [slot for _, (_, slot) in sorted(agent.placed.items())]
        assert slots == list(range(1024))
        # 16 runs of 64 pages, but for where one scan step ended and the next began.
        assert len(agent.run_lengths) <= 19


async def test_those_who_start_together_get_long_runs_too(start: Start) -> None:
    engine = await start()
    agents = [FakeAgent(engine.path, memory(2048, base=(n + 1) * BASE)) for n in range(3)]
    for agent in agents:
        await engine.join(agent)
    await merge_all(engine, *agents)
    assert all(len(agent.run_lengths) <= 48 for agent in agents)


async def test_self_sharing(start: Start) -> None:
    engine = await start()
    agent = await engine.join(FakeAgent(engine.path, memory(50) | memory(50, base=2 * BASE)))
    await merge_all(engine, agent)
    assert (await engine.status())["pages_shared"] == 50


async def test_many_agents_one_slot(start: Start) -> None:
    engine = await start()
    agents = [await engine.join(FakeAgent(engine.path, memory(20))) for _ in range(6)]
    await merge_all(engine, *agents)
    status = await engine.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (20, 100)


async def test_different_pages_stay_apart(start: Start) -> None:
    engine = await start()
    first = await engine.join(FakeAgent(engine.path, memory(100)))
    second = await engine.join(FakeAgent(engine.path, memory(100, first=1000)))

    async def scanned() -> bool:
        return bool((await engine.status())["full_scans"] > 4)

    await engine.until(scanned, "scanned")
    assert not first.placed
    assert not second.placed
    assert (await engine.status())["pages_unshared"] == 200


HUGE = 512 * PAGE


def sparse(equal: int, *, base: int, own: int) -> dict[int, bytes]:
    """Two huge pages with ``equal`` pages each that others have too, far apart; the rest from number ``own`` on."""
    places = [HUGE * half + 7 * i * PAGE for half in range(2) for i in range(equal)]
    shared = {base + place: page(1 + i) for i, place in enumerate(places)}
    return {base + i * PAGE: page(own + i) for i in range(1024)} | shared


async def sparse_pair(engine: Running, equal: int, *, huge: tuple[bool, bool] = (True, True)) -> list[FakeAgent]:
    """Two agents with such memory, in huge pages or not, after a few rounds."""
    agents = []
    for n in range(2):
        base = (n + 1) * BASE
        agent = FakeAgent(engine.path, sparse(equal, base=base, own=10_000 * (n + 1)))
        agent.huge = {base, base + HUGE} if huge[n] else set()
        agents.append(agent)
        await engine.join(agent)

    async def scanned() -> bool:
        return bool((await engine.status())["full_scans"] >= 6)

    await engine.until(scanned, "scanned")
    return agents


async def test_huge_pages_with_few_equal_pages_stay(start: Start) -> None:
    engine = await start(huge_page_threshold=8)
    agents = await sparse_pair(engine, 7)
    status = await engine.status()
    assert all(len(agent.huge) == 2 and not agent.placed for agent in agents)
    assert status["pages_shared"] == 0
    assert status["store"]["bytes"] == 0  # nor is anything stored that nobody uses
    assert status["merges"]["huge"] > 0


@pytest.mark.parametrize(("threshold", "equal"), [(8, 8), (1, 1), (0, 1)])
async def test_huge_pages_are_split_when_it_is_worth_it(start: Start, threshold: int, equal: int) -> None:
    engine = await start(huge_page_threshold=threshold)
    agents = await sparse_pair(engine, equal)
    assert all(not agent.huge and len(agent.placed) == 2 * equal for agent in agents)


async def test_small_pages_do_not_wait_for_their_neighbours(start: Start) -> None:
    engine = await start(huge_page_threshold=8)
    agents = await sparse_pair(engine, 1, huge=(False, False))
    assert all(len(agent.placed) == 2 for agent in agents)


@pytest.mark.parametrize("huge", [(True, False), (False, True)])
async def test_who_has_huge_pages_keeps_them_whoever_comes_first(start: Start, huge: tuple[bool, bool]) -> None:
    engine = await start(huge_page_threshold=8)
    agents = await sparse_pair(engine, 3, huge=huge)
    assert not any(agent.placed for agent, whole in zip(agents, huge, strict=True) if whole)


class NeverScanned(FakeAgent):
    """Its linear scan finds nothing, however far it goes."""

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 0, 0, struct.pack("<IIII", *struct.unpack_from("<I", packet, HEADER.size), 0, 0, 0)


async def test_hints_add_up_until_a_huge_page_is_split(start: Start) -> None:
    """Where nothing comes by a second time, those put off first are asked for again."""
    engine = await start(huge_page_threshold=8)
    first = await engine.join(NeverScanned(engine.path, memory(8)))
    first.hint(BASE, 8 * PAGE)
    await candidates(engine, 8)
    second = NeverScanned(engine.path, {2 * BASE + 60 * i * PAGE: page(1 + i) for i in range(8)})
    second.huge = {2 * BASE}
    await engine.join(second)
    for i, address in enumerate(second.memory):
        assert not second.placed
        second.hint(address, PAGE)

        async def looked_at(count: int = 9 + i) -> bool:
            return bool((await engine.status())["hints"]["visited"] >= count)

        await engine.until(looked_at, "looked at")
    await merge_all(engine, first, second)
    assert not second.huge


async def test_those_who_come_first_with_half_of_the_pages_each(start: Start) -> None:
    """Each has candidates that the other matches, so neither has enough matches of its own."""
    engine = await start(huge_page_threshold=8)
    agents = [NeverScanned(engine.path, memory(8, base=(n + 1) * BASE)) for n in range(2)]
    for agent in agents:
        agent.huge = set(agent.memory) & {BASE, 2 * BASE}
        await engine.join(agent)
    agents[0].hint(BASE, 4 * PAGE)
    await candidates(engine, 4)
    agents[1].hint(2 * BASE, 8 * PAGE)
    await candidates(engine, 8)
    assert not any(agent.placed for agent in agents)
    agents[0].hint(BASE + 4 * PAGE, 4 * PAGE)
    await merge_all(engine, *agents)


async def test_zero_pages_count_for_huge_pages(start: Start) -> None:
    engine = await start(huge_page_threshold=8)
    zeros = {BASE + 5 * i * PAGE: bytes(PAGE) for i in range(1, 8)}
    agent = FakeAgent(engine.path, memory(1) | zeros)
    agent.huge = {BASE}
    await engine.join(agent)
    await candidates(engine, 1)
    other = await engine.join(FakeAgent(engine.path, memory(1, base=2 * BASE)))
    # One after the other, in the agent's thread.
    await engine.until(lambda: not agent.huge and set(agent.zeroed) == set(zeros), "split")
    await engine.until(lambda: bool(agent.placed and other.placed), "merged")


async def test_who_talks_nonsense_about_huge_pages_is_dropped(start: Start, warnings: Warnings) -> None:
    class Liar(FakeAgent):
        def on_huge(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
            return 0, 0, 0, b"short"

    engine = await start(huge_page_threshold=8)
    honest = await engine.join(FakeAgent(engine.path, memory(4)))
    await candidates(engine, 4)
    liar = Liar(engine.path, memory(4, base=2 * BASE))
    await engine.join(liar)
    await engine.until(lambda: liar.farewell is not None, "dropped")
    assert "huge pages" in "".join(warnings())
    assert honest.farewell is None


async def test_writes_break_and_merge_again(start: Start) -> None:
    engine = await start()
    first, second = await pair(engine, 64)
    first.write(BASE, page(9999))
    assert second.read(2 * BASE) == page(1)

    async def noticed() -> bool:
        status = await engine.status()
        return (status["pages_shared"], status["pages_sharing"]) == (64, 63)

    await engine.until(noticed, "the engine noticed")
    first.write(BASE, page(1))
    await merge_all(engine, first, second)
    assert first.read(BASE) == page(1)


async def test_labels_and_users_are_apart(start: Start) -> None:
    engine = await start()
    first = await engine.join(FakeAgent(engine.path, memory(50), label="red"))
    second = await engine.join(FakeAgent(engine.path, memory(50), label="blue"))
    third = await engine.join(FakeAgent(engine.path, memory(50), label="red"))
    await merge_all_of(engine, first, third)
    assert not second.placed
    assert {agent["domain"] for agent in (await engine.status())["agents"]} == {"red", "blue"}


async def test_private_processes_share_with_themselves_only(start: Start) -> None:
    engine = await start()
    twice = memory(50) | memory(50, base=2 * BASE)
    first = await engine.join(FakeAgent(engine.path, dict(twice), label="private"))
    second = await engine.join(FakeAgent(engine.path, dict(twice), label="private"))
    third = await engine.join(FakeAgent(engine.path, memory(50)))
    await merge_all_of(engine, first, second)
    assert set(first.segments).isdisjoint(second.segments)
    assert not third.placed
    status = await engine.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (100, 100)
    await trio.to_thread.run_sync(first.leave)

    async def gone() -> bool:
        return bool((await engine.status())["store"]["segments"] == 1)

    await engine.until(gone, "its store ends with it")
    assert first.read(BASE) == page(1)


async def test_users_share_a_domain_only_where_the_configuration_says_so(start: Start) -> None:
    users = frozenset({(os.geteuid(), label) for label in ("fleet", "web")} | {(4711, "fleet"), (4711, "web")})
    engine = await start(allowed_domains=users, shared_domains=frozenset({"fleet"}))
    agents = {}
    for uid in (os.geteuid(), 4711):
        for label in ("fleet", "web"):
            with credentials_of(uid):
                agents[uid, label] = await engine.join(FakeAgent(engine.path, memory(50), label=label))
    fleet = [agent for (_, label), agent in agents.items() if label == "fleet"]
    await merge_all_of(engine, *fleet)
    assert fleet[0].placed == fleet[1].placed

    async def scanned() -> bool:
        return bool((await engine.status())["full_scans"] > 10)

    await engine.until(scanned, "scanned")
    assert not any(agent.placed for (_, label), agent in agents.items() if label == "web")


@contextmanager
def credentials_of(uid: int) -> Iterator[None]:
    """The engine takes whoever connects meanwhile for this user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("udedup.engine.server.peer_of", lambda sock: attrs.evolve(peer_of(sock), uid=uid))
        yield


async def test_who_wants_to_be_left_alone_is(start: Start) -> None:
    engine = await start()
    agent = await engine.join(FakeAgent(engine.path, memory(10), label="off"))
    assert "left alone" in agent.refused
    assert await engine.ask(op="check_domain", label="off")
    assert (await engine.status())["agents"] == []


async def merge_all_of(engine: Running, *agents: FakeAgent) -> None:
    await engine.until(lambda: all(len(agent.placed) == len(agent.memory) for agent in agents), "merged")


async def test_rate_limit(start: Start) -> None:
    engine = await start(pages_to_scan=10, sleep_millisecs=10, policy="linear")
    await engine.join(FakeAgent(engine.path, memory(5000)))
    before = (await engine.status())["pages_scanned"]
    began = time.monotonic()
    await trio.sleep(1)
    scanned = (await engine.status())["pages_scanned"] - before
    assert 0 < scanned <= 10 * (time.monotonic() - began + 0.02) / 0.01


async def test_a_spurt_is_no_longer_than_it_may_be(start: Start) -> None:
    """Also where it takes several requests, the last of them for what is left."""
    asked: list[int] = []

    class Asked(FakeAgent):
        """Notes how many pages each step of the scan is for."""

        def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
            asked.append(struct.unpack_from("<I", packet, HEADER.size)[0])
            return super().on_scan(count, packet)

    pages = lib.UDD_SCAN_MAX + 400
    engine = await start(pages_to_scan=pages, sleep_millisecs=1000, policy="linear", smart_scan=False)
    await engine.join(Asked(engine.path, memory(2 * pages)))
    await engine.until(lambda: len(asked) >= 2, "a spurt")
    assert asked[:2] == [lib.UDD_SCAN_MAX, 400]


# ---- hints ----


@pytest.mark.parametrize("written", [False, True])
async def test_hinted_pages_merge_without_waiting_for_the_scan(start: Start, written: bool) -> None:
    """A page merges from one hint in each process, though the linear scan would have to see it twice, unchanged.

    The target of a read or the source of a write.
    """
    engine = await start(pages_to_scan=50, sleep_millisecs=20)
    first = await engine.join(FakeAgent(engine.path, memory(100_000)))
    second = await engine.join(FakeAgent(engine.path, memory(100_000, base=0x100000000)))
    last = 99_000 * PAGE
    first.hint(BASE + last, 10 * PAGE, written=written)
    second.hint(0x100000000 + last, 10 * PAGE, written=written)
    await engine.until(lambda: len(first.placed) == len(second.placed) == 10, "hinted pages merged")
    status = await engine.status()
    assert status["hints"] == {"place": 2, "content": 0, "dropped": 0, "visited": 20, "merged": 10, "waiting": 0}
    assert 0 < status["lead_time_seconds"]["p50"] < 5


async def test_hint_to_merged_takes_less_than_20_ms(start: Start) -> None:
    """No rate limit, an idle engine, second reader of shared content: rung awake by the doorbell."""
    engine = await start()
    first, second = await pair(engine, 200)
    # Let the scan's rests grow.
    await trio.sleep(1.5)
    delays = []
    for i in range(20):
        address = 2 * BASE + i * PAGE
        second.write(address, page(5000 + i))
        first_address = BASE + i * PAGE
        second.write(address, first.memory[first_address])
        began = time.monotonic()
        second.hint(address, PAGE)
        while address not in second.placed:
            assert time.monotonic() - began < 5
            await trio.sleep(0.0005)
        delays.append(time.monotonic() - began)
    assert sorted(delays)[10] <= 0.020
    assert lib.UDD_VISIT in second.requests


async def test_linear_policy_does_not_ask_for_hints(start: Start) -> None:
    engine = await start(policy="linear")
    first, _ = await pair(engine, 50)
    first.hint(BASE, PAGE)
    await trio.sleep(0.3)
    assert lib.UDD_VISIT not in first.requests
    assert first.hints.waiting == 0


# ---- those who join with runs ----


async def test_fork_child_is_counted(start: Start) -> None:
    engine = await start()
    first, second = await pair(engine, 700)
    child = FakeAgent(engine.path, dict(first.memory), flags=lib.UDD_HELLO_FORKED)
    child.engine_id = first.engine_id
    child.placed = dict(first.placed)
    child.segments = dict(first.segments)
    await engine.join(child)
    await merge_all(engine, first, second, child)
    assert (await engine.status())["pages_shared"] == 700
    assert child.run_lengths == []
    child.write(BASE, page(123456))

    async def noticed() -> bool:
        return bool((await engine.status())["pages_sharing"] == 1399)

    await engine.until(noticed, "the child's break was counted")


class BreaksWhileCounted(FakeAgent):
    """Writes to merged pages, counted ones and others, between the answers of a count."""

    def on_runs(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        answer = super().on_runs(count, packet)
        for address in list(self.placed)[:: len(self.placed) // 20]:
            self.memory[address] = page(900_000 + address // PAGE)
            self.drop(address)
        return answer


async def test_count_while_pages_break(start: Start, warnings: Warnings) -> None:
    engine = await start(answer_seconds=3.0)
    first, second = await pair(engine, 1500)
    child = BreaksWhileCounted(engine.path, dict(first.memory), flags=lib.UDD_HELLO_FORKED)
    child.engine_id, child.placed, child.segments = first.engine_id, dict(first.placed), dict(first.segments)
    await engine.join(child)

    async def agreed() -> bool:
        status = await engine.status()
        return bool(status["pages_sharing"] == len(first.placed) + len(second.placed) + len(child.placed) - 1500)

    await engine.until(lambda: child.requests.count(lib.UDD_RUNS) >= 4, "counted")
    await engine.until(agreed, "the count is exact")
    assert len(child.placed) < 1450
    assert not warnings()


async def test_lost_drop_records_lead_to_a_recount(start: Start) -> None:
    engine = await start()
    first, _ = await pair(engine, 100)
    for address in list(first.placed)[:40]:
        with first._lock:
            del first.placed[address]
            first.memory[address] = page(70_000 + address // PAGE)
    first.stats.drops_lost += 1

    async def counted() -> bool:
        return bool((await engine.status())["pages_sharing"] == 60)

    await engine.until(counted, "counted anew")
    assert lib.UDD_RUNS in first.requests
    assert (await engine.status())["agents"][0]["pages_sharing"] == 60


# ---- the end of agents ----


async def test_leaving_gives_references_back(start: Start, warnings: Warnings) -> None:
    engine = await start()
    first, second = await pair(engine, 100)
    await trio.to_thread.run_sync(first.leave)

    async def counted() -> bool:
        status = await engine.status()
        return (status["pages_shared"], status["pages_sharing"], len(status["agents"])) == (100, 0, 1)

    await engine.until(counted, "references given back")
    await trio.to_thread.run_sync(second.leave)

    async def empty() -> bool:
        status = await engine.status()
        return (status["pages_shared"], len(status["agents"])) == (0, 0)

    await engine.until(empty, "references given back")
    assert len(warnings()) == 2


async def test_end_of_the_engine(start: Start) -> None:
    engine = await start()
    first, second = await pair(engine, 100)
    engine.scope.cancel()
    for agent in (first, second):
        await trio.to_thread.run_sync(agent._thread.join, 5)
        assert agent.farewell == "the engine ends"
        for address, content in agent.memory.items():
            assert agent.read(address) == content
    assert not engine.path.exists()


# ---- retirement ----


async def test_sparse_segments_are_given_back(start: Start) -> None:
    engine = await start(retire_seconds=0.05)
    first, second = await pair(engine, 4096 + 100)
    assert (await engine.status())["store"]["segments"] == 2
    kept = [address for address in first.memory if (address - BASE) // PAGE % 8 == 0]
    for agent, base in ((first, BASE), (second, 2 * BASE)):
        for i in range(4096):
            if BASE + i * PAGE not in kept:
                agent.write(base + i * PAGE, page(1_000_000 + base + i))

    async def retired() -> bool:
        return bool((await engine.status())["store"]["segments"] == 1)

    await engine.until(retired, "the first segment is gone")
    await engine.until(lambda: 1 not in first.segments and 1 not in second.segments, "agents let go of it")
    assert {segment for agent in (first, second) for segment, _ in agent.placed.values()} == {2}
    for agent in (first, second):
        for address, content in agent.memory.items():
            assert agent.read(address) == content
    assert (await engine.status())["pages_sharing"] == 512 + 100


# ---- control ----


async def test_unmerge_and_merge(start: Start) -> None:
    engine = await start()
    first, second = await pair(engine, 100)
    assert await engine.ask(op="unmerge", pid=None) == 200
    status = await engine.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (0, 0)
    await trio.sleep(0.2)
    assert not first.placed
    assert {agent["reason"] for agent in status["agents"]} == {"unmerged on request"}
    assert await engine.ask(op="merge", pid=os.getpid()) == 2
    await merge_all(engine, first, second)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"op": "unmerge", "pid": 1}, "no wrapped process has pid 1"),
        ({"op": "mount", "images": [["a", "/b"]]}, "no mount"),
        ({"op": "fly"}, "did not understand"),
        ({"op": "unmerge", "pid": "x"}, "did not understand"),
        ({}, "did not understand"),
    ],
)
async def test_bad_control_requests(start: Start, message: dict[str, Any], error: str) -> None:
    engine = await start()
    with pytest.raises(UdedupError, match=error) as caught:
        await engine.ask(**message)
    assert "\n" not in str(caught.value)
    assert (await engine.status())["refused"] == {"connections": 0, "requests": int("understand" in error)}


async def test_check_domain(start: Start) -> None:
    engine = await start()
    assert await engine.ask(op="check_domain", label="anything") is True


async def test_long_answers_come_in_parts(start: Start) -> None:
    engine = await start(sleep_millisecs=1000)
    agents = [await engine.join(FakeAgent(engine.path, {}, label="x" * 60)) for _ in range(600)]
    status = await engine.status()
    assert len(status["agents"]) == 600
    for agent in agents:
        agent.sock.shutdown(socket.SHUT_RDWR)
        agent._thread.join(5)
        agent.sock.close()


async def test_kernel_numbers(start: Start) -> None:
    engine = await start()
    await pair(engine, 500)
    kernel = (await engine.ask(op="status"))["kernel"]
    # Both agents are this very process, and so is the engine: three mappings, none of them private.
    assert kernel["unreadable"] == 0
    assert kernel["pss_bytes"] > 500 * PAGE


# ---- those who misbehave ----


async def one_dropped(engine: Running, warnings: Warnings, text: str) -> None:
    """Waits for exactly one line; then two good agents share as ever."""
    await engine.until(lambda: len(warnings()) > 0, f"a line with {text!r}")
    await pair(engine, 100)
    await trio.sleep(0.05)
    (line,) = warnings()
    assert text in line
    assert "\n" not in line


class Liar(FakeAgent):
    """Lies once it was asked for ``kind``."""

    kind = 0

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes] | None:
        raise NotImplementedError

    def answer(self, kind: int, count: int, packet: bytes, descriptors: list[int]) -> Any:
        if kind == self.kind:
            return self.lie(count, packet)
        return super().answer(kind, count, packet, descriptors)


class Garbage(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        self.sock.send(os.urandom(500))


class Empty(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        self.sock.send(b"x")


class WrongSequence(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        self.sock.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_DONE, 0, 4711, 0, 0))


class WrongType(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        self.sock.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_MERGE, 0, 1, 0, 0))


class TooManyReports(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 1010, 0, struct.pack("<IIII", 1010, 0, 0, 1) + bytes(1010 * 32)


class VisitedTooMuch(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 0, 0, struct.pack("<IIII", 100_000, 0, 0, 1)


class ShortReports(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 10, 0, struct.pack("<IIII", 10, 0, 0, 1) + bytes(100)


class BadAddress(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 1, 0, struct.pack("<IIIIQQQQ", 1, 0, 0, 1, 2**60, 1, 1, 0)


class PositiveStatus(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 5, 0, 0, b""


class HintHead(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> Any:
        self.hints.head = 2**62
        return self.on_scan(count, packet)


class DropHead(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> Any:
        self.drops.head = 2**40
        return self.on_scan(count, packet)


class DropOfNothing(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> Any:
        self.push_drop(BASE, 1, 7)
        return self.on_scan(count, packet)


class Bells(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> Any:
        # The engine may close the connection before the last of them.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(50):
                self.sock.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_DOORBELL, 0, 0, 0, 0))
        return self.on_scan(count, packet)


class Crash(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Garbage, "no message"),
        (Empty, "1 bytes"),
        (WrongSequence, "not under way"),
        (WrongType, "agents don't send"),
        (TooManyReports, "reported 1010 of 1000"),
        (VisitedTooMuch, "visited 100000"),
        (ShortReports, "reported 10"),
        (BadAddress, "address"),
        (PositiveStatus, "status 5"),
        (HintHead, "hint ring"),
        (DropHead, "drop ring"),
        (DropOfNothing, "drop ring"),
        (Bells, "rings"),
        (Crash, "in the middle of a request"),
    ],
)
async def test_liars(start: Start, warnings: Warnings, kind: type[Liar], text: str) -> None:
    engine = await start()
    await engine.join(kind(engine.path, memory(500)))
    await one_dropped(engine, warnings, text)


class LyingResults(Liar):
    kind = lib.UDD_MERGE

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, count, 0, struct.pack("<QQQQQ", 2**64 - 1, 2**64 - 1, 0, 0, 0) * count


class FewResults(Liar):
    kind = lib.UDD_MERGE

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, count - 1, 0, b""


class LongCopy(Liar):
    kind = lib.UDD_COPY

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 0, 0, bytes(5000)


@pytest.mark.parametrize(
    ("kind", "text"), [(LyingResults, "a run it merged"), (FewResults, "runs"), (LongCopy, "copy")]
)
async def test_liars_about_merges(start: Start, warnings: Warnings, kind: type[Liar], text: str) -> None:
    engine = await start()
    # Shares with itself, so that it is asked for the merge whoever else is there.
    await engine.join(kind(engine.path, memory(50, first=8000) | memory(50, first=8000, base=2 * BASE)))
    await one_dropped(engine, warnings, text)


class ChangesWhileCopying(FakeAgent):
    """What arrives in the copy area is not what was reported."""

    def on_copy(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        answer = super().on_copy(count, packet)
        self.area[lib.UDD_SHARED_COPY : lib.UDD_SHARED_COPY + 10] = b"0123456789"
        return answer


async def test_pages_that_change_on_their_way_are_not_published(start: Start) -> None:
    engine = await start()
    first = await engine.join(FakeAgent(engine.path, memory(10)))
    await trio.sleep(0.3)
    second = await engine.join(ChangesWhileCopying(engine.path, memory(10, base=2 * BASE)))
    await engine.until(lambda: len(second.placed) == 9 and len(first.placed) == 9, "the others merged")
    assert BASE not in first.placed


class Copies(FakeAgent):
    """Leaves copies of what it reports in the copy area, from ``place`` on, as real agents do."""

    place = 0

    def copied(self, address: int) -> bytes:
        """What lies there."""
        return self.memory[address]

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        self.next = self.place
        return super().on_scan(count, packet)

    def report(self, address: int, flags: int) -> bytes:
        start = lib.UDD_SHARED_COPY + self.next * PAGE
        if self.next < lib.UDD_COPY_SLOTS:
            self.area[start : start + PAGE] = self.copied(address)
        self.next += 1
        return super().report(address, flags | self.next << lib.UDD_REPORT_COPY_SHIFT)


async def test_pages_are_published_from_the_copies_of_their_reports(start: Start) -> None:
    engine = await start()
    first = await engine.join(FakeAgent(engine.path, memory(200)))
    await trio.sleep(0.3)
    second = await engine.join(Copies(engine.path, memory(200, base=2 * BASE)))
    await engine.until(lambda: len(second.placed) == 200 and len(first.placed) == 200, "merged")
    assert lib.UDD_COPY not in second.requests
    assert all(agent.read(address) == agent.memory[address] for agent in (first, second) for address in agent.memory)
    assert max(second.run_lengths) == lib.UDD_RUN_MAX


class WrongCopies(Copies):
    """Every third copy is not what was reported."""

    def copied(self, address: int) -> bytes:
        return bytes(PAGE) if address // PAGE % 3 == 0 else super().copied(address)


async def test_copies_that_are_not_what_was_reported_are_copied_anew(start: Start) -> None:
    """One that is wrong costs nothing but another copy, and leaves its neighbours right."""
    engine = await start()
    first = await engine.join(FakeAgent(engine.path, memory(200)))
    await trio.sleep(0.3)
    second = await engine.join(WrongCopies(engine.path, memory(200, base=2 * BASE)))
    await engine.until(lambda: len(second.placed) == 200 and len(first.placed) == 200, "merged")
    assert lib.UDD_COPY in second.requests
    assert all(agent.read(address) == agent.memory[address] for agent in (first, second) for address in agent.memory)


class CopiesOutside(Copies):
    place = lib.UDD_COPY_SLOTS


async def test_copies_outside_the_copy_area(start: Start, warnings: Warnings) -> None:
    engine = await start()
    await engine.join(CopiesOutside(engine.path, memory(10)))
    await one_dropped(engine, warnings, "where it says its copy is")


class EndlessRuns(Liar):
    kind = lib.UDD_RUNS

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 1, 0, struct.pack("<QIIII", BASE, 1, 1, 0, 0)


async def test_list_of_runs_that_does_not_end(start: Start, warnings: Warnings) -> None:
    engine = await start()
    first, _ = await pair(engine, 10)
    child = EndlessRuns(engine.path, {}, flags=lib.UDD_HELLO_FORKED)
    child.engine_id = first.engine_id
    await engine.join(child)
    await engine.until(lambda: len(warnings()) > 0, "a line")
    assert "does not end" in warnings()[0]


@pytest.mark.parametrize("times", [1, 2])
async def test_ring_that_the_engine_before_had_asked_for(start: Start, warnings: Warnings, times: int) -> None:
    """One is passed on to the next engine; two can't be."""
    engine = await start(policy="linear")
    agent = await engine.join(FakeAgent(engine.path, {}, flags=lib.UDD_HELLO_REJOIN))
    for _ in range(times):
        agent.sock.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_DOORBELL, 0, 0, 0, 0))
    await engine.until(lambda: lib.UDD_HANDOVER in agent.requests, "joined")
    await trio.sleep(0.1)
    assert [line for line in warnings() if "rings without being asked" in line] == warnings()
    assert len(warnings()) == times - 1


class Silent(Liar):
    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> None:
        return None


@pytest.mark.parametrize("sleep_millisecs", [0, 1])
async def test_silent_agent_stalls_nobody(start: Start, warnings: Warnings, sleep_millisecs: int) -> None:
    engine = await start(answer_seconds=3.0, sleep_millisecs=sleep_millisecs)
    began = time.monotonic()
    silent = await engine.join(Silent(engine.path, memory(100)))
    await engine.until(lambda: lib.UDD_SCAN in silent.requests, "asked")
    await pair(engine, 300)
    assert time.monotonic() - began < 2.5
    assert not warnings()
    await engine.until(lambda: len(warnings()) > 0, "dropped")
    (line,) = warnings()
    assert "did not answer" in line
    assert silent.farewell == "it did not answer request 6 within 3 s"
    assert (await engine.status())["agents_total"] == {"joined": 3, "dropped": 1, "silent": 1}


class Idle(Liar):
    """Visits nothing, and is never at the end."""

    kind = lib.UDD_SCAN

    def lie(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 0, 0, struct.pack("<IIII", 0, 0, 0, 0)


@pytest.mark.parametrize("pages_to_scan", [300, 1000])
async def test_idle_agent_stalls_nobody(start: Start, pages_to_scan: int) -> None:
    """However few pages a spurt has left for it."""
    engine = await start(pages_to_scan=pages_to_scan)
    idle = await engine.join(Idle(engine.path, memory(100)))
    await engine.until(lambda: idle.requests.count(lib.UDD_SCAN) > 50, "asked")
    await pair(engine, 300)


async def test_agent_that_does_not_read(start: Start, warnings: Warnings) -> None:
    """Its socket's queue fills; the engine neither blocks nor remembers more and more."""
    engine = await start(answer_seconds=1.0)
    deaf = FakeAgent(engine.path, {})
    await trio.to_thread.run_sync(deaf.sock.send, deaf.hello())
    await one_dropped(engine, warnings, "did not answer") if await marks_merging(deaf) else None
    deaf.sock.close()


async def marks_merging(agent: FakeAgent) -> bool:
    """Takes the welcome by hand and says that it merges, without ever reading again."""

    def take() -> None:
        import mmap

        from udedup._native import ffi

        packet, descriptors, _, _ = socket.recv_fds(agent.sock, 65536, 4)
        assert HEADER.unpack_from(packet)[1] == lib.UDD_WELCOME
        with mmap.mmap(descriptors[0], lib.UDD_SHARED_BYTES) as area, ffi.from_buffer(area) as base:
            ffi.cast("struct udd_stats *", ffi.cast("char *", base) + lib.UDD_SHARED_STATS).merging = 1
        for descriptor in descriptors:
            os.close(descriptor)

    await trio.to_thread.run_sync(take)
    return True


# ---- when memory is short ----


async def test_copies_give_their_memory_back(start: Start) -> None:
    """What agents copy to be shared needs up to 8 MiB of each shared area, for a moment only."""
    engine = await start(retire_seconds=0.2)
    first, second = await pair(engine, 2000)

    async def small() -> bool:
        return bool((await engine.status())["memory"]["agents"] < 2 * lib.UDD_SHARED_COPY)

    await engine.until(small, "memory given back")
    assert (await engine.status())["memory"]["agents"] > 0
    # The next copies take it anew, and what comes to the store is right: the digests are compared there.
    more = await engine.join(FakeAgent(engine.path, memory(500, base=3 * BASE, first=10_000)))
    other = await engine.join(FakeAgent(engine.path, memory(500, base=4 * BASE, first=10_000)))
    await merge_all(engine, first, second, more, other)
    await engine.until(small, "memory given back again")


async def test_store_that_can_t_grow(start: Start, warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without a slot stay private, those with one are shared, one line says so; later all is well again."""
    engine = await start()
    first, second = await pair(engine, 4096)

    def refuse(number: int, prefix: str, owner: int) -> Segment:
        raise OSError(errno.ENOSPC, "No space left on device")

    more = {**memory(4096, base=3 * BASE), **memory(100, base=4 * BASE, first=10_000)}
    with monkeypatch.context() as patch:
        patch.setattr(Segment, "create", refuse)
        third = await engine.join(FakeAgent(engine.path, more))
        fourth = await engine.join(FakeAgent(engine.path, dict(more)))
        await engine.until(lambda: len(third.placed) == len(fourth.placed) == 4096, "what has a slot is shared")
        await engine.until(lambda: len(warnings()) > 0, "a line")
        await trio.sleep(0.2)
        (line,) = warnings()
        assert "the store can't grow" in line
    await merge_all(engine, first, second, third, fourth)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
async def test_no_memory_for_a_newcomer(
    start: Start, warnings: Warnings, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It is not refused, which would be for good: it comes back."""
    engine = await start()
    first, second = await pair(engine, 100)

    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("udedup.engine.server._shared_area", refuse)
        late = FakeAgent(engine.path, memory(100, base=3 * BASE))

        def try_to_join() -> bytes:
            late.sock.send(late.hello())
            return late.sock.recv(1000)

        assert await trio.to_thread.run_sync(try_to_join) == b""
        late.sock.close()
    again = await engine.join(FakeAgent(engine.path, memory(100, base=3 * BASE)))
    await merge_all(engine, first, second, again)
    (line,) = warnings()
    assert "has to wait" in line


async def test_counts_are_made_up_for_after_a_shortage(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start(retire_seconds=0.1)
    first, second = await pair(engine, 100)
    original, failures = Agent._merge_chunk, 0

    async def fail_once(self: Agent, *arguments: Any) -> None:
        nonlocal failures
        failures += 1
        await original(self, *arguments)
        if failures == 1:
            lib.udd_holder_clear(self._holder)  # as if they had not been counted
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Agent, "_merge_chunk", fail_once)
    third = await engine.join(FakeAgent(engine.path, memory(100, base=3 * BASE)))
    await engine.until(lambda: len(third.placed) == 100, "merged")
    third.write(3 * BASE, page(1))
    third.write(3 * BASE + PAGE, page(1))
    await merge_all(engine, first, second, third)
    assert third.farewell is None


# ---- first messages ----


def hello_with(path: Path, **changes: Any) -> bytes:
    """A hello with some fields wrong."""
    from udedup._native import ffi

    agent = FakeAgent(path, {})
    agent.sock.close()
    raw = bytearray(agent.hello())
    hello = ffi.from_buffer("struct udd_hello *", raw)
    for name, value in changes.items():
        setattr(hello.header if hasattr(hello.header, name) else hello, name, value)
    return bytes(raw)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"magic": 1}, "no hello"),
        ({"type": 9}, "no hello"),
        ({"version": 99}, "version 99"),
        ({"label": b"x" * 64}, "label"),
        ({"command": b"x" * 128}, "command"),
    ],
)
async def test_bad_hello(start: Start, warnings: Warnings, changes: dict[str, Any], text: str) -> None:
    engine = await start()

    def say() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(engine.path))
            sock.send(hello_with(engine.path, **changes))
            return sock.recv(1000)

    answer = await trio.to_thread.run_sync(say)
    assert HEADER.unpack_from(answer)[1] == lib.UDD_REFUSED
    assert text in answer[HEADER.size :].split(b"\0")[0].decode()
    await one_dropped(engine, warnings, text)


@pytest.mark.parametrize("length", [40, 88, 264, 1000])
async def test_other_versions_are_left_alone(start: Start, warnings: Warnings, length: int) -> None:
    """Whatever follows the version in their hello. All of them together are worth one line."""
    engine = await start()
    ours = lib.UDD_WIRE_VERSION

    def say() -> list[bytes]:
        answers = []
        for version in (ours - 1, ours + 1, ours - 1, ours + 1, 99):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(engine.path))
                sock.send(hello_with(engine.path, version=version)[:40].ljust(length, b"\0"))
                answers.append(sock.recv(1000))
                assert sock.recv(1000) == b""
        return answers

    for answer in await trio.to_thread.run_sync(say):
        assert HEADER.unpack_from(answer)[1] == lib.UDD_REFUSED
        assert "of the protocol" in answer[HEADER.size :].split(b"\0")[0].decode()
    await one_dropped(engine, warnings, f"version {ours - 1} of the protocol, this engine speaks {ours}")


@pytest.mark.parametrize("packet", [b"\0", os.urandom(300), b"x" * 100_000])
async def test_garbage_for_a_greeting(start: Start, warnings: Warnings, packet: bytes) -> None:
    engine = await start()

    def say() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(engine.path))
            sock.send(packet)

    await trio.to_thread.run_sync(say)
    await one_dropped(engine, warnings, "refused")
    assert (await engine.status())["refused"] == {"connections": 1, "requests": 0}


async def test_command_names_can_t_forge_log_lines(start: Start, warnings: Warnings) -> None:
    engine = await start()
    agent = FakeAgent(engine.path, memory(1))
    original = agent.hello
    agent.hello = lambda: original().replace(b"fake\0", b"a\nb\x1b\0")[: len(original())]  # type: ignore[method-assign]
    await engine.join(agent)
    assert (await engine.status())["agents"][0]["command"] == "a?b?"


async def test_label_not_allowed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udedup.engine.domain.DomainRules.permits", lambda self, uid, label: not label)
    engine = await start()
    agent = await engine.join(FakeAgent(engine.path, {}, label="secret"))
    assert "domain label 'secret' is not allowed for uid" in agent.refused
    with pytest.raises(UdedupError, match="--allow-domain"):
        await engine.ask(op="check_domain", label="secret")


async def test_userfaultfd_on_request(start: Start) -> None:
    engine = await start()
    plain = await engine.join(FakeAgent(engine.path, {}))
    needy = await engine.join(FakeAgent(engine.path, {}, flags=lib.UDD_HELLO_NEED_UFFD))
    available = os.access("/dev/userfaultfd", os.R_OK | os.W_OK)
    assert (plain.descriptors, needy.descriptors) == (1, 2 if available else 1)


async def test_too_many_connections(start: Start) -> None:
    engine = await start(agents_max=3)
    agents = [await engine.join(FakeAgent(engine.path, {})) for _ in range(4)]
    assert [bool(agent.refused) for agent in agents] == [False, False, False, True]


async def test_threads_are_gone(start: Start) -> None:
    """The fakes end with their engine (guards the tests themselves)."""
    before = threading.active_count()
    engine = await start()
    agent = await engine.join(FakeAgent(engine.path, {}))
    await trio.to_thread.run_sync(agent.leave)
    assert threading.active_count() <= before + 2
