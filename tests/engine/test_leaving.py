"""Agents that are gone leave nothing in the engine, at once: not when Python next looks for garbage."""

import gc
import logging
import socket
from collections.abc import Iterator

import pytest
import trio
from engine.conftest import Running, Start
from engine.fake_agent import FakeAgent, page

from udedup.engine.agent import Agent, SharedArea
from udedup.engine.link import Link

PAGE = 4096
BASE = 1 << 32


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    # What is logged about an agent stays with pytest, and the agent with that.
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


def kept() -> dict[str, int]:
    """Objects of agents that exist, garbage included."""
    found = [type(thing) for thing in gc.get_objects()]
    return {kind.__name__: found.count(kind) for kind in (Agent, SharedArea, Link)}


async def gone(engine: Running) -> None:
    async def none() -> bool:
        return not (await engine.status())["agents"]

    await engine.until(none, "nobody is there")
    await engine.until(lambda: not any(kept().values()), f"nothing is left but {kept()}")


@pytest.mark.usefixtures("no_collector")
async def test_who_leaves_after_work_leaves_nothing(start: Start) -> None:
    engine = await start()
    for turn in range(3):
        agents = [
            FakeAgent(engine.path, {BASE + i * PAGE: page(1 + turn * 64 + i) for i in range(64)}) for _ in range(2)
        ]
        for agent in agents:
            await engine.join(agent)

        async def shared() -> bool:
            return bool((await engine.status())["pages_sharing"] == 64)

        await engine.until(shared, "merged")
        agents[0].hint(BASE, PAGE)
        assert all(kept().values())
        for agent in agents:
            await trio.to_thread.run_sync(agent.leave)
        await gone(engine)


@pytest.mark.usefixtures("no_collector")
async def test_who_is_dropped_leaves_nothing(start: Start) -> None:
    engine = await start()
    talker = FakeAgent(engine.path, {BASE: page(1)})
    await engine.join(talker)
    talker.sock.send(b"nonsense")
    await gone(engine)
    liar = FakeAgent(engine.path, {BASE: page(1)})
    await engine.join(liar)
    liar.hints.head = 1 << 60
    await gone(engine)
    assert (await engine.status())["agents_total"] == {"joined": 2, "dropped": 2, "silent": 0}


@pytest.mark.usefixtures("no_collector")
async def test_who_leaves_in_the_middle_of_a_request_leaves_nothing(start: Start) -> None:
    engine = await start(answer_seconds=30)
    agent = FakeAgent(engine.path, {BASE: page(1)})
    agent.answer = lambda *_: None  # type: ignore[method-assign]
    await engine.join(agent)
    await engine.until(lambda: bool(agent.requests), "asked")
    agent.sock.shutdown(socket.SHUT_RDWR)
    await gone(engine)


async def test_numbers_go_round(start: Start) -> None:
    """Whatever is kept by agent number stays as small as the number of agents there may be."""
    engine = await start(agents_max=2)
    sizes = []
    for _ in range(20):
        agent = FakeAgent(engine.path, {})
        await engine.join(agent)
        sizes.append((await engine.status())["index"]["bytes"])
        await trio.to_thread.run_sync(agent.leave)
        await gone(engine)
    assert max(sizes[8:]) == max(sizes[:8])
