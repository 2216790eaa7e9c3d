"""Quiet breaks in the engine: what was looked at is in the store, but nobody sees more there than what he shares."""

import os
from pathlib import Path

import pytest
import trio
from engine.conftest import Running, Start
from engine.fake_agent import PAGE, FakeAgent, page
from engine.test_server import BASE, Copies, memory

from udedup._native import lib


class Quiet(FakeAgent):
    """Asks for quiet breaks."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        flags = int(str(keywords.pop("flags", 0))) | lib.UDD_HELLO_QUIET
        super().__init__(*arguments, flags=flags, **keywords)  # type: ignore[arg-type]


class QuietCopies(Copies, Quiet):
    """With the copies that real agents leave."""


def fork(parent: FakeAgent) -> Quiet:
    """A child of a process; it is still to join."""
    child = Quiet(Path(parent.sock.getpeername()), dict(parent.memory), flags=lib.UDD_HELLO_FORKED)
    child.engine_id, child.placed, child.segments = parent.engine_id, dict(parent.placed), dict(parent.segments)
    child.memfds = {number: os.dup(descriptor) for number, descriptor in parent.memfds.items()}
    return child


async def parked(engine: Running, *agents: FakeAgent) -> None:
    """Waits until all pages of all agents are in the store."""
    await engine.until(lambda: all(len(agent.placed) == len(agent.memory) for agent in agents), "all in the store")


def intact(*agents: FakeAgent) -> bool:
    """Does every page read as it was written?"""
    return all(agent.read(address) == content for agent in agents for address, content in agent.memory.items())


def visible(agent: FakeAgent) -> set[bytes]:
    """Contents of all pages of all segments that the engine gave an agent."""
    return {
        segment[offset : offset + PAGE]
        for segment in agent.segments.values()
        for offset in range(0, lib.UDD_SEGMENT_BYTES, PAGE)
    }


@pytest.mark.parametrize("kind", [Quiet, QuietCopies])
async def test_pages_that_nobody_else_has_are_parked(start: Start, kind: type[FakeAgent]) -> None:
    engine = await start()
    agent = await engine.join(kind(engine.path, memory(1500)))
    await parked(engine, agent)
    assert intact(agent)
    # In long runs, as they lie in memory.
    assert len(agent.run_lengths) <= 1500 // lib.UDD_RUN_MAX + 4
    status = await engine.status()
    assert (status["pages_shared"], status["pages_sharing"], status["bytes_saved"]) == (0, 0, 0)
    assert status["pages_unshared"] == 1500
    assert status["store"]["live_bytes"] == 1500 * PAGE
    assert (lib.UDD_COPY in agent.requests) == (kind is Quiet)


async def test_only_who_asks_for_it_or_all(start: Start) -> None:
    engine = await start()
    loud = await engine.join(FakeAgent(engine.path, memory(50)))
    quiet = await engine.join(Quiet(engine.path, memory(50, first=1000)))
    await parked(engine, quiet)
    await trio.sleep(0.2)
    assert not loud.placed


async def test_an_engine_that_is_quiet_is_so_for_all(start: Start) -> None:
    engine = await start(quiet_breaks=True)
    agent = await engine.join(FakeAgent(engine.path, memory(50)))
    await parked(engine, agent)


@pytest.mark.parametrize("second_kind", [Quiet, QuietCopies, FakeAgent])
async def test_parked_pages_are_found_and_shared(start: Start, second_kind: type[FakeAgent]) -> None:
    """By whoever comes to have the same, long after the linear scan has seen them last."""
    engine = await start(retire_seconds=0.05)
    first = await engine.join(Quiet(engine.path, memory(1000)))
    await parked(engine, first)
    rounds = (await engine.status())["full_scans"]

    async def aged() -> bool:
        return bool((await engine.status())["full_scans"] > rounds + 3)

    await engine.until(aged, "candidates that are not looked at would be forgotten")
    second = await engine.join(second_kind(engine.path, memory(1000, base=2 * BASE)))

    async def shared() -> bool:
        status = await engine.status()
        return (status["pages_shared"], status["pages_sharing"], status["pages_unshared"]) == (1000, 1000, 0)

    await engine.until(shared, "shared")
    assert [first.placed[BASE + i * PAGE] for i in range(1000)] == [
        second.placed[2 * BASE + i * PAGE] for i in range(1000)
    ]
    assert intact(first, second)

    async def given_back() -> bool:
        return bool((await engine.status())["store"]["bytes"] == 1000 * PAGE)

    await engine.until(given_back, "the place where they were parked")


async def test_nobody_sees_what_is_parked(start: Start) -> None:
    """A process can read all of the segments it is given: there is nothing in them but what several have."""
    engine = await start()
    first = await engine.join(QuietCopies(engine.path, memory(600)))
    await parked(engine, first)
    # Every third page is the same.
    other = {2 * BASE + i * PAGE: page(1 + i if i % 3 == 0 else 10_000 + i) for i in range(600)}
    second = await engine.join(QuietCopies(engine.path, other))
    third = await engine.join(FakeAgent(engine.path, memory(600, base=3 * BASE, first=20_000)))

    async def shared() -> bool:
        return bool((await engine.status())["pages_sharing"] == 200)

    await engine.until(shared, "shared")
    await parked(engine, second)
    common = {page(1 + i) for i in range(0, 600, 3)}
    nothing = {bytes(PAGE)}
    assert visible(second) & visible(first) == common | nothing
    assert visible(second) - nothing <= set(other.values())
    assert visible(first) - nothing <= set(first.memory.values())
    assert visible(third) - nothing == set()
    assert intact(first, second, third)


async def test_self_sharing(start: Start) -> None:
    engine = await start()
    agent = await engine.join(QuietCopies(engine.path, memory(300) | memory(300, base=2 * BASE)))

    async def shared() -> bool:
        status = await engine.status()
        return (status["pages_shared"], status["pages_sharing"]) == (300, 300)

    await engine.until(shared, "shared")
    await parked(engine, agent)
    assert intact(agent)


async def test_written_pages_are_parked_anew(start: Start) -> None:
    """What they had is forgotten: neither index nor store grows."""
    engine = await start(retire_seconds=0.05)
    agent = await engine.join(QuietCopies(engine.path, memory(400)))
    for lap in range(1, 9):
        await parked(engine, agent)
        for i in range(0, 400, 2):
            agent.write(BASE + i * PAGE, page(1000 * lap + i))
    await parked(engine, agent)
    assert intact(agent)

    async def settled() -> bool:
        status = await engine.status()
        return bool(status["pages_unshared"] == 400 and status["store"]["bytes"] <= (400 + 256) * PAGE / 0.75)

    await engine.until(settled, "one candidate for each page")


class Pinned(QuietCopies):
    """None of its pages can be merged: devices have them."""

    def on_merge(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        results = b"".join(
            (0).to_bytes(16, "little") + ((1 << pages) - 1).to_bytes(8, "little") + bytes(16)
            for _, pages, _, _ in self.runs(count, packet)
        )
        return 0, count, 0, results


async def test_pages_that_can_t_be_merged_don_t_fill_the_store(start: Start) -> None:
    engine = await start(retire_seconds=0.05)
    agent = await engine.join(Pinned(engine.path, memory(6000)))
    most = 0
    with trio.move_on_after(2):
        while True:
            most = max(most, (await engine.status())["store"]["bytes"])
    assert agent.requests.count(lib.UDD_MERGE) > 10
    assert most <= 2 * lib.UDD_SEGMENT_BYTES
    # Others of the domain are served as ever.
    quiet = await engine.join(Quiet(engine.path, memory(100, base=2 * BASE, first=100_000)))
    await parked(engine, quiet)


async def test_a_child_sees_nothing_that_its_parent_parks_later(start: Start) -> None:
    engine = await start()
    parent = await engine.join(Quiet(engine.path, memory(300)))
    await parked(engine, parent)
    child = fork(parent)
    before = set(child.segments)
    await engine.join(child)
    await engine.until(lambda: child.requests.count(lib.UDD_RUNS) >= 2, "counted")
    for i in range(300):
        parent.write(BASE + i * PAGE, page(5000 + i))
    await parked(engine, parent)
    later = {segment for segment, _ in parent.placed.values()}
    assert not later & before
    assert not later & set(child.segments)
    assert intact(parent, child)


async def test_a_child_is_not_moved_to_what_its_parent_parks(start: Start) -> None:
    """Not even when the segment that it has from its parent is retired."""
    engine = await start(retire_seconds=0.05)
    parent = await engine.join(Quiet(engine.path, memory(600)))
    await parked(engine, parent)
    child = fork(parent)
    (old,) = child.segments
    await engine.join(child)
    await engine.until(lambda: child.requests.count(lib.UDD_RUNS) >= 2, "counted")
    for lap in range(2):
        for i in range(500):
            parent.write(BASE + i * PAGE, page(5000 * (lap + 1) + i))
            if lap == 0:
                child.write(BASE + i * PAGE, page(50_000 + i))
        await parked(engine, parent, child)
    await engine.until(lambda: old not in {segment for segment, _ in child.placed.values()}, "moved")
    before = {page(i + 1) for i in range(600)} | {bytes(PAGE)}
    assert visible(child) - before <= set(child.memory.values())
    assert intact(parent, child)


async def test_lost_drop_records_leave_no_stale_candidates(start: Start) -> None:
    engine = await start()
    agent = await engine.join(Quiet(engine.path, memory(300)))
    await parked(engine, agent)
    with agent._lock:
        for i in range(200):
            del agent.placed[BASE + i * PAGE]
            agent.memory[BASE + i * PAGE] = page(70_000 + i)
        agent.stats.drops_lost += 1

    async def counted() -> bool:
        return bool((await engine.status())["pages_unshared"] == 300)

    await parked(engine, agent)
    await engine.until(counted, "one candidate for each page")
    other = await engine.join(Quiet(engine.path, memory(300, base=2 * BASE)))
    await parked(engine, other)

    async def shared() -> bool:
        return bool((await engine.status())["pages_sharing"] == 100)

    await engine.until(shared, "what was parked all the time is still found")
    assert intact(agent, other)


async def test_who_goes_leaves_nothing(start: Start) -> None:
    engine = await start(retire_seconds=0.05)
    for _ in range(3):
        agent = await engine.join(Quiet(engine.path, memory(500)))
        await parked(engine, agent)
        await trio.to_thread.run_sync(agent.leave)

        async def empty() -> bool:
            status = await engine.status()
            return bool(status["store"]["segments"] == status["pages_unshared"] == 0)

        await engine.until(empty, "nothing is left")


class Crowded(QuietCopies):
    """Has few mappings left: short runs are not shared."""

    def join(self) -> FakeAgent:
        joined = super().join()
        if not self.refused:
            self.stats.vmas = self.vmas
        return joined

    vmas = 60_000


async def test_short_runs_are_parked_when_mappings_are_short(start: Start) -> None:
    """What others have, too, must not be left out where the rest is in the store."""
    engine = await start()
    first = await engine.join(FakeAgent(engine.path, memory(400)))
    await trio.sleep(0.3)
    # Single pages that are the same.
    content = {2 * BASE + i * PAGE: page(1 + i if i % 5 == 0 else 10_000 + i) for i in range(400)}
    second = await engine.join(Crowded(engine.path, content))
    await parked(engine, second)
    await trio.sleep(0.2)
    assert intact(first, second)
    # Of the newcomer's pages hardly one lies in a run of its own.
    assert len(second.run_lengths) < 30


async def test_the_next_engine_does_not_take_parked_pages_for_shared_ones(start: Start) -> None:
    engine = await start()
    first = await engine.join(Quiet(engine.path, memory(200)))
    await parked(engine, first)
    name = Path(f"/proc/self/fd/{next(iter(first.memfds.values()))}").readlink().name
    assert "+own-" in name
    engine.scope.cancel()
    await trio.to_thread.run_sync(first._thread.join, 5)
    after = await start()
    first = await after.join(first.successor(after.path))
    second = await after.join(Quiet(after.path, memory(200, base=2 * BASE)))
    await parked(after, second)
    await trio.sleep(0.3)
    assert (await after.status())["store"]["adopted"] == 0
    assert visible(second) - {bytes(PAGE)} == set(second.memory.values())
    assert intact(first, second)
