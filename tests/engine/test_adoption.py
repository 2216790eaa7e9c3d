"""Engines that come after another: they go on with its segments, but only with those that nobody else can have made."""

import contextlib
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from engine.conftest import Running, Start
from engine.fake_agent import PAGE, FakeAgent, page
from engine.test_server import BASE, memory, merge_all, pair

from udedup._native import lib
from udedup.engine import adoption
from udedup.engine.store import SEALS, segment_prefix

Warnings = Callable[[], list[str]]
PREFIX = segment_prefix(str(os.geteuid()), "")
FUTURE_WRITE = 0x10


async def succeed(
    engine: Running, start: Start, *agents: FakeAgent, **settings: Any
) -> tuple[Running, list[FakeAgent]]:
    """Ends an engine; its agents join the next one."""
    engine.scope.cancel()
    for agent in agents:
        await trio.to_thread.run_sync(agent._thread.join, 5)
    again = await start(**settings)
    heirs = [agent.successor(again.path) for agent in agents]
    for heir in heirs:
        await again.join(heir)
    return again, heirs


async def until_sharing(engine: Running, shared: int, sharing: int) -> None:
    """Waits for these counts."""
    seen = None

    async def reached() -> bool:
        nonlocal seen
        status = await engine.status()
        seen = (status["pages_shared"], status["pages_sharing"])
        return seen == (shared, sharing)

    try:
        await engine.until(reached, "shared")
    except trio.TooSlowError:
        pytest.fail(f"{seen} pages are shared and sharing, not {(shared, sharing)}")


def assert_right(*agents: FakeAgent) -> None:
    """Every page reads as what was written to it."""
    for agent in agents:
        assert all(agent.read(address) == content for address, content in agent.memory.items())


async def test_nothing_is_copied_and_newcomers_merge_with_the_old_pages(start: Start, warnings: Warnings) -> None:
    count = 4096 + 100
    engine = await start()
    agents = list(await pair(engine, count))
    inodes = {os.fstat(descriptor).st_ino for descriptor in agents[0].memfds.values()}
    for generation in range(3):
        engine, agents = await succeed(engine, start, *agents)
        await until_sharing(engine, count, (1 + generation) * count)
        newcomer = await engine.join(FakeAgent(engine.path, memory(count, base=(3 + generation) * BASE)))
        agents.append(newcomer)
        await merge_all(engine, *agents)
        status = await engine.status()
        assert status["pages_shared"] == count
        assert (status["store"]["segments"], status["store"]["adopted"]) == (2, 2)
        assert status["store"]["bytes"] == count * PAGE
        assert {os.fstat(descriptor).st_ino for descriptor in newcomer.memfds.values()} == inodes
        for agent in agents:
            assert lib.UDD_COPY not in agent.requests
        assert_right(*agents)
    assert [line for line in warnings() if "left" not in line] == []


async def test_references_are_exact(start: Start) -> None:
    engine = await start()
    engine, (first, second) = await succeed(engine, start, *await pair(engine, 300))
    await until_sharing(engine, 300, 300)
    for i in range(100):
        first.write(BASE + i * PAGE, page(50_000 + i))
    await until_sharing(engine, 300, 200)
    second.write(2 * BASE, page(60_000))
    await until_sharing(engine, 299, 200)
    await trio.to_thread.run_sync(second.leave)
    await until_sharing(engine, 200, 0)


async def test_segments_that_were_taken_over_are_retired_later(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before those who refer to them had time to come back."""
    engine = await start()
    agents = list(await pair(engine, 4096 + 100))
    for agent, base in zip(agents, (BASE, 2 * BASE), strict=True):
        for i in range(4096):
            if i % 8:
                agent.write(base + i * PAGE, page(1_000_000 + base + i))
    engine, agents = await succeed(engine, start, *agents, retire_seconds=0.05)
    await until_sharing(engine, 612, 612)
    await trio.sleep(0.3)
    assert (await engine.status())["store"]["segments"] == 2
    monkeypatch.setattr(adoption, "SETTLE_SECONDS", 0.5)
    engine, (first, second) = await succeed(engine, start, *agents, retire_seconds=0.05)

    async def retired() -> bool:
        return bool((await engine.status())["store"]["segments"] == 2)

    await engine.until(lambda: len(first.segments) == len(second.segments) == 2, "taken over")
    old = set(first.segments)
    await engine.until(
        lambda: not old <= set(first.segments) and not old <= set(second.segments), "agents let go of it"
    )
    await engine.until(retired, "the sparse one is gone")
    await until_sharing(engine, 612, 612)
    assert_right(first, second)


async def test_who_comes_back_late_is_moved_out_of_a_retiring_segment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its references are to slots that seemed dead."""
    monkeypatch.setattr(adoption, "SETTLE_SECONDS", 0)
    engine = await start()
    early = await engine.join(FakeAgent(engine.path, {**memory(4096 + 100), **memory(4096 + 100, base=4 * BASE)}))
    late = await engine.join(FakeAgent(engine.path, memory(2000, base=2 * BASE)))
    holder = await engine.join(FakeAgent(engine.path, memory(10, base=3 * BASE)))
    await merge_all(engine, early, late, holder)
    for base in (BASE, 4 * BASE):
        for i in range(4096):
            early.write(base + i * PAGE, page(2_000_000 + base + i))
    engine.scope.cancel()
    for agent in (early, late, holder):
        await trio.to_thread.run_sync(agent._thread.join, 5)
    engine = await start(retire_seconds=0.05)
    # Keeps ten slots of the first segment in use, so that it is retiring for as long as it holds on.
    holder = holder.successor(engine.path)
    stubborn = Stubborn.of(holder)
    await engine.join(stubborn)
    await engine.until(lambda: stubborn.refused_moves > 0, "retiring")
    late = await engine.join(late.successor(engine.path))
    old = set(late.segments)
    await engine.until(lambda: bool(late.placed) and not {s for s, _ in late.placed.values()} & old, "moved out")
    assert_right(late, stubborn)
    assert len(late.placed) == 2000
    stubborn.lets_go = True
    await engine.until(lambda: len(late.segments) == len({s for s, _ in late.placed.values()}), "let go")
    await until_sharing(engine, 2000, 10)


class Stubborn(FakeAgent):
    """Does not move its runs until it ``lets_go``."""

    lets_go = False
    refused_moves = 0

    @classmethod
    def of(cls, agent: FakeAgent) -> "Stubborn":
        agent.__class__ = cls
        assert isinstance(agent, cls)
        return agent

    def on_merge(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        if self.lets_go:
            return super().on_merge(count, packet)
        self.refused_moves += 1
        results = [(1 << pages) - 1 for _, pages, _, _ in self.runs(count, packet)]
        return 0, count, 0, b"".join(struct.pack("<QQQQQ", 0, 0, busy, 0, 0) for busy in results)


@pytest.mark.parametrize("parent_first", [True, False])
async def test_fork_child_without_descriptors(start: Start, parent_first: bool) -> None:
    """It holds the pages, others have the descriptors: it is asked again until one of them is here."""
    engine = await start()
    first, second = await pair(engine, 200)
    engine.scope.cancel()
    for agent in (first, second):
        await trio.to_thread.run_sync(agent._thread.join, 5)
    engine = await start(retire_seconds=0.05)
    child = second.successor(engine.path, flags=lib.UDD_HELLO_FORKED)
    child.memfds = {}
    parent = first.successor(engine.path)
    for agent in (parent, child) if parent_first else (child, parent):
        await engine.join(agent)
        await engine.until(lambda agent=agent: lib.UDD_HANDOVER in agent.requests, "asked")  # type: ignore[misc]
    await until_sharing(engine, 200, 200)
    child.write(2 * BASE, page(12345))
    await until_sharing(engine, 200, 199)
    assert [os.fstat(fd).st_ino for fd in child.memfds.values()] == [
        os.fstat(fd).st_ino for fd in parent.memfds.values()
    ]
    assert_right(child, parent)


# ---- who hands over what ----


@attrs.define
class Offer:
    """A memfd such as an engine makes, with ``flaw``; what has to stay open for that is kept in ``kept``."""

    flaw: str
    pages: list[bytes] = attrs.field(factory=lambda: [page(n) for n in range(1, 201)])
    kept: list[Any] = attrs.field(factory=list)

    def make(self) -> int:
        """The descriptor to hand over."""
        flaw = self.flaw
        name = {
            "other label": f"{segment_prefix(str(os.geteuid()), 'left')}-1",
            "other user": f"{segment_prefix(str(os.geteuid() + 1), '')}-1",
            "other name": "something-else-1",
            "no number": PREFIX,
        }.get(flaw, f"{PREFIX}-1")
        size = {"too long": 2, "too short": 0.5}.get(flaw, 1) * lib.UDD_SEGMENT_BYTES
        writable = os.memfd_create(name, os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if flaw == "huge pages" else 0))
        os.ftruncate(writable, int(size))
        if flaw != "huge pages":
            os.pwrite(writable, b"".join(self.pages), 0)
        if flaw in ("mapped", "spliced"):
            self.kept.append(mmap.mmap(writable, lib.UDD_SEGMENT_BYTES))
        if flaw == "spliced":
            self._hold_page()
        missing = {"can shrink": fcntl.F_SEAL_SHRINK, "can grow": fcntl.F_SEAL_GROW, "can write": FUTURE_WRITE}
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, SEALS & ~missing.get(flaw, 0))
        if flaw == "sealed too early":
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        if flaw == "other owner":
            os.fchown(writable, 12345, -1)
        descriptor = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
        os.close(writable)
        return descriptor

    def _hold_page(self) -> None:
        """A page in a pipe, without any mapping: whoever put it there may be a device that writes to it."""
        import ctypes

        mapping = self.kept.pop()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        reader, writer = os.pipe()
        vector = (ctypes.c_void_p * 2)(address, PAGE)
        spliced = ctypes.CDLL(None, use_errno=True).vmsplice(writer, ctypes.byref(vector), ctypes.c_ulong(1), 0)
        assert spliced == PAGE, os.strerror(ctypes.get_errno())
        self.kept += [os.fdopen(reader, "rb"), os.fdopen(writer, "wb")]
        ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(lib.UDD_SEGMENT_BYTES))


class Handing(FakeAgent):
    """Hands over the descriptors in ``offered`` and says that its pages lie in them."""

    offered: tuple[int, ...] = ()

    def on_handover(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        cursor = struct.unpack_from("<Q", packet, 24)[0]
        if cursor >= len(self.offered):
            return 0, 0, 0, bytes(16)
        self.handed = self.offered[cursor]
        return 0, 1, cursor + 1, bytes(16)

    def on_segment(self, packet: bytes, descriptors: list[int]) -> tuple[int, int, int, bytes]:
        os.close(descriptors[0])
        return 0, 0, 0, b""


@pytest.fixture
def hand_over() -> Iterator[Callable[..., FakeAgent]]:
    """Makes an agent without memory that hands descriptors over."""
    made: list[int] = []

    def hand(engine: Running, *offered: int, flags: int = lib.UDD_HELLO_REJOIN) -> FakeAgent:
        made.extend(offered)
        agent = Handing(engine.path, {}, flags=flags)
        agent.engine_id = (1, 2)
        agent.offered = offered
        return agent

    yield hand
    for descriptor in set(made):
        os.close(descriptor)


HandOver = Callable[..., FakeAgent]


@pytest.mark.parametrize(
    ("flaw", "text"),
    [
        ("none", None),
        ("mapped", "can still write"),
        ("spliced", "can still write"),
        ("other label", "another trust domain"),
        ("other user", "another trust domain"),
        ("no number", "another trust domain"),
        ("other name", "no store segment"),
        ("too long", "no store segment"),
        ("too short", "no store segment"),
        ("huge pages", "no store segment"),
        ("can shrink", "seals are missing"),
        ("can grow", "seals are missing"),
        ("can write", "seals are missing"),
        ("sealed too early", "sealed against"),
        pytest.param("other owner", "made by uid 12345", marks=pytest.mark.require("root")),
    ],
)
async def test_forged_segments(
    start: Start,
    warnings: Warnings,
    monkeypatch: pytest.MonkeyPatch,
    hand_over: HandOver,
    flaw: str,
    text: str | None,
) -> None:
    """Without a flaw it is taken over and newcomers merge with it; with one its pages are nobody else's."""
    monkeypatch.setattr(adoption, "AGAIN_SECONDS", 0.5)
    engine = await start(retire_seconds=0.05)
    offer = Offer(flaw)
    agent = hand_over(engine, offer.make())
    await engine.join(agent)
    await engine.until(lambda: agent.requests.count(lib.UDD_HANDOVER) >= 2, "handed over")
    if text is not None:
        await engine.until(lambda: bool(warnings()), "a line")
        (line,) = warnings()
        assert text in line
        assert not agent.refused
        assert agent.farewell is None
    first = await engine.join(FakeAgent(engine.path, memory(200)))
    second = await engine.join(FakeAgent(engine.path, memory(200, base=2 * BASE)))
    await merge_all(engine, first, second)
    status = await engine.status()
    assert status["store"]["adopted"] == (text is None)
    copied = lib.UDD_COPY in first.requests + second.requests
    assert copied == (text is not None)
    for thing in offer.kept:
        if isinstance(thing, mmap.mmap):
            thing[: 200 * PAGE] = bytes(200 * PAGE)
    assert_right(first, second)


async def test_what_can_be_written_no_more_is_taken_over_later(
    start: Start, warnings: Warnings, hand_over: HandOver
) -> None:
    """An engine that is still going down has its mappings for a while."""
    engine = await start(retire_seconds=0.05)
    offer = Offer("mapped")
    agent = hand_over(engine, offer.make())
    await engine.join(agent)
    await engine.until(lambda: agent.requests.count(lib.UDD_HANDOVER) >= 3, "asked again")
    assert (await engine.status())["store"]["adopted"] == 0
    offer.kept.pop().close()

    async def adopted() -> bool:
        return bool((await engine.status())["store"]["adopted"] == 1)

    await engine.until(adopted, "taken over")
    assert not warnings()


async def test_zero_pages_and_holes_are_not_published(start: Start, hand_over: HandOver) -> None:
    engine = await start()
    pages = [page(1), bytes(PAGE), page(3), page(1)]
    await engine.join(hand_over(engine, Offer("none", pages).make()))
    first = await engine.join(FakeAgent(engine.path, memory(4)))
    second = await engine.join(FakeAgent(engine.path, memory(4, base=2 * BASE)))
    await merge_all(engine, first, second)
    assert {first.placed[BASE], second.placed[2 * BASE]} == {(1, 0)}
    assert first.placed[BASE + 2 * PAGE] == (1, 2)
    assert first.placed[BASE + PAGE][0] == 2
    status = await engine.status()
    assert (status["store"]["segments"], status["store"]["bytes"]) == (2, 6 * PAGE)


async def test_one_segment_from_many(start: Start, hand_over: HandOver) -> None:
    """And the same one again and again from one of them."""
    engine = await start()
    descriptor = Offer("none").make()
    agents = [hand_over(engine, *[descriptor] * 50) for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for agent in agents:
            nursery.start_soon(engine.join, agent)
    await engine.until(lambda: all(agent.requests.count(lib.UDD_HANDOVER) == 51 for agent in agents), "handed over")
    status = await engine.status()
    assert (status["store"]["segments"], status["store"]["adopted"]) == (1, 1)
    assert len(status["agents"]) == 4


async def test_segment_of_one_domain_is_refused_in_another(
    start: Start, warnings: Warnings, hand_over: HandOver
) -> None:
    """Also if it is in use there."""
    engine = await start()
    first, _ = await pair(engine, 100)
    stranger = hand_over(engine, os.dup(first.memfds[1]))
    stranger._label = "left"
    await engine.join(stranger)
    await engine.until(lambda: bool(warnings()), "a line")
    assert "another trust domain" in warnings()[0]
    one = await engine.join(FakeAgent(engine.path, memory(100, base=3 * BASE), label="left"))
    other = await engine.join(FakeAgent(engine.path, memory(100, base=4 * BASE), label="left"))
    await merge_all(engine, first, _, one, other)
    assert (await engine.status())["pages_shared"] == 200
    assert {os.fstat(fd).st_ino for fd in one.memfds.values()}.isdisjoint(
        os.fstat(fd).st_ino for fd in first.memfds.values()
    )


async def test_too_many_segments(
    start: Start, warnings: Warnings, monkeypatch: pytest.MonkeyPatch, hand_over: HandOver
) -> None:
    monkeypatch.setattr(adoption, "INHERITED_MAX", 3)
    engine = await start()
    await engine.join(hand_over(engine, *[Offer("none", [page(n)]).make() for n in range(6)]))
    await engine.until(lambda: bool(warnings()), "a line")
    (line,) = warnings()
    assert "3 segments already" in line
    assert (await engine.status())["store"]["segments"] == 3


class NeverDone(FakeAgent):
    """Hands over without end."""

    def on_handover(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 1, struct.unpack_from("<Q", packet, 24)[0] + 1, bytes(16)


class GoesBack(FakeAgent):
    """Has a cursor that does not move."""

    def on_handover(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 1, 0, bytes(16)


class Chatty(FakeAgent):
    """Has more to say about its segment."""

    def on_handover(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 7, 1, bytes(500)


@pytest.mark.parametrize(
    ("kind", "text"), [(GoesBack, "hands 1 segments over"), (Chatty, "hands 7 segments over"), (NeverDone, None)]
)
async def test_nonsense_handed_over(
    start: Start, warnings: Warnings, monkeypatch: pytest.MonkeyPatch, kind: type[FakeAgent], text: str | None
) -> None:
    monkeypatch.setattr(adoption, "AGAIN_SECONDS", 0)
    engine = await start()
    agent = await engine.join(kind(engine.path, {}, flags=lib.UDD_HELLO_REJOIN))
    await engine.until(lambda: bool(warnings()), "a line")
    (line,) = warnings()
    assert (text or "nobody has a descriptor") in line
    assert agent.requests.count(lib.UDD_HANDOVER) == (1 if text else adoption.HANDOVERS_MAX)
    await pair(engine, 50)


def open_descriptors(*files: int) -> int:
    """How many descriptors this process has of these files, all of them together."""
    inodes = {os.fstat(file).st_ino for file in files}
    count = 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):  # that of the list itself
            count += os.fstat(int(name)).st_ino in inodes
    return count


def strange_descriptors() -> dict[str, Callable[[], int]]:
    return {
        "device": lambda: os.open("/dev/null", os.O_RDONLY),
        "folder": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
        "path only": lambda: os.open("/etc/passwd", os.O_PATH),
        "file": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
        "event": lambda: os.eventfd(0),
    }


@pytest.mark.parametrize("kind", list(strange_descriptors()))
async def test_descriptors_of_something_else(start: Start, warnings: Warnings, hand_over: HandOver, kind: str) -> None:
    engine = await start()
    strange = strange_descriptors()[kind]()
    agent = hand_over(engine, strange)
    before = open_descriptors(strange)
    await engine.join(agent)
    await engine.until(lambda: bool(warnings()), "a line")
    (line,) = warnings()
    assert "no memfd" in line
    await trio.to_thread.run_sync(agent._thread.join, 5)
    await engine.until(lambda: open_descriptors(strange) == before, "closed")
    await pair(engine, 50)


class Generous(FakeAgent):
    """Sends a descriptor with every answer."""

    gift = -1

    def answer(
        self, kind: int, count: int, packet: bytes, descriptors: list[int]
    ) -> tuple[int, int, int, bytes] | None:
        answer = super().answer(kind, count, packet, descriptors)
        self.handed = self.gift
        return answer


async def test_descriptors_nobody_asked_for(start: Start) -> None:
    engine = await start()
    agent = Generous(engine.path, memory(100))
    with Path("/dev/null").open() as null:
        agent.gift = null.fileno()
        await engine.join(agent)
        before = open_descriptors(agent.gift)
        await engine.until(lambda: len(agent.requests) > 5, "asked")
        assert open_descriptors(agent.gift) <= before
    assert agent.farewell is None


async def test_descriptors_are_given_back(start: Start, hand_over: HandOver, warnings: Warnings) -> None:
    """Also those of segments that were not taken over, and of agents that leave in the middle."""
    engine = await start()
    offers = [Offer("none", [page(1)]).make(), Offer("other label").make(), Offer("can write").make()]
    for _ in range(20):
        agent = hand_over(engine, *offers * 3)
        await engine.join(agent)
        await engine.until(lambda agent=agent: lib.UDD_HANDOVER in agent.requests, "asked")  # type: ignore[misc]
        await trio.to_thread.run_sync(agent.leave)

    async def alone() -> bool:
        return not (await engine.status())["agents"]

    await engine.until(alone, "gone")
    # Ours, and for the one that was taken over the engine's two: Python's mapping has one of its own.
    await engine.until(lambda: open_descriptors(*offers) == len(offers) + 2, "closed")
