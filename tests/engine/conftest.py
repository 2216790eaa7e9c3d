"""An engine in the test's own trio loop, on a socket of its own, and fake agents in threads."""

import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from engine.fake_agent import FakeAgent

from udedup.engine.config import EngineConfig
from udedup.engine.control import request
from udedup.engine.server import run_engine

PATIENCE = 60.0
"""For what must come about, s: a machine may be busy with much else."""


@attrs.define
class Running:
    """An engine under test."""

    path: Path
    scope: trio.CancelScope
    agents: list[FakeAgent] = attrs.field(factory=list)

    async def join(self, agent: FakeAgent) -> Any:
        """Lets a fake agent join."""
        self.agents.append(agent)
        return await trio.to_thread.run_sync(agent.join)

    async def ask(self, **message: object) -> Any:
        """A control request."""
        return await trio.to_thread.run_sync(request, self.path, message)

    async def status(self) -> Any:
        """Without the slow part."""
        return await self.ask(op="status", kernel=False)

    async def until(self, condition: Callable[[], bool | Awaitable[bool]], what: str) -> None:
        """Waits for something that must come about."""
        with trio.fail_after(PATIENCE):
            while True:
                result = condition()
                if not isinstance(result, bool):
                    result = await result
                if result:
                    return
                await trio.sleep(0.01)
        raise AssertionError(what)


Start = Callable[..., Any]


@pytest.fixture
def socket_path() -> Iterator[Path]:
    # Short: a socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="udedup-test-", dir="/tmp") as folder:
        yield Path(folder) / "socket"


async def start_engine(nursery: trio.Nursery, config: EngineConfig) -> Running:
    """Runs an engine in ``nursery``; returns once it serves."""
    ready = trio.Event()
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await run_engine(config, on_ready=lambda _: ready.set())

    nursery.start_soon(run)
    with trio.fail_after(PATIENCE):
        await ready.wait()
    return Running(config.socket, scope)


@pytest.fixture
def start(socket_path: Path, nursery: trio.Nursery) -> Start:
    """Call it with settings (no rate limit by default); gives a running engine."""

    async def begin(**settings: Any) -> Running:
        return await start_engine(nursery, EngineConfig(**{"socket": socket_path, "sleep_millisecs": 0, **settings}))

    return begin


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Gives the engine's log lines from "info" on."""
    caplog.set_level(logging.INFO, "udedup.engine")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("udedup.engine")]
