"""New settings for an engine that runs: what changes, what is left and said, and who loses a domain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from engine.conftest import Running
from engine.fake_agent import FakeAgent, page

from udedup.engine.config import EngineConfig
from udedup.engine.reload import CHANGEABLE, differences
from udedup.engine.server import run_engine

Warnings = Callable[[], list[str]]
BASE = 1 << 32


class Reloaded:
    """An engine, and the way to give it other settings."""

    def __init__(self, socket: Path, **settings: Any) -> None:
        self.config = EngineConfig(**{"socket": socket, "sleep_millisecs": 0, **settings})
        self.sender, self._receiver = trio.open_memory_channel[EngineConfig](0)
        self.scope = trio.CancelScope()
        self.running = Running(socket, self.scope)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            await run_engine(self.config, on_ready=lambda _: task_status.started(), reloads=self._receiver)

    async def reload(self, **settings: Any) -> None:
        """Returns once they were looked at: the engine takes the next ones only then."""
        self.config = attrs.evolve(self.config, **settings)
        await self.sender.send(self.config)
        await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.fixture
async def engine(socket_path: Path, nursery: trio.Nursery) -> Reloaded:
    reloaded = Reloaded(socket_path, pages_to_scan=100)
    await nursery.start(reloaded.run)
    return reloaded


async def test_the_rate_changes(engine: Reloaded) -> None:
    await engine.reload(pages_to_scan=7, sleep_millisecs=30)
    assert (await engine.running.status())["pages_to_scan"] == 7
    engine.scope.cancel()


async def test_what_cannot_change_is_said_in_one_line_and_left(engine: Reloaded, warnings: Warnings) -> None:
    await engine.reload(policy="linear", hint_slots=77, map_count=100_000, pages_to_scan=8)
    status = await engine.running.status()
    assert (status["policy"], status["pages_to_scan"]) == ("xlh", 8)
    assert warnings() == [
        "can't change while the engine runs, left as they are: hint-slots, max-map-count, policy",
        "settings changed: pages-to-scan",
    ]
    engine.scope.cancel()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"pages_to_scan": 0}, "pages to scan is 0"),
        ({"shared_domains": frozenset({"web"})}, "domain 'web' is shared, but no user may use it"),
        # Right by itself, but the mount can't come now.
        ({"mount": Path("/m"), "images": ((None, Path("/x")),)}, "images are given but no mount directory"),
    ],
)
async def test_wrong_settings_change_nothing(
    engine: Reloaded, warnings: Warnings, settings: dict[str, Any], error: str
) -> None:
    before = await engine.running.status()
    await engine.reload(**{"pages_to_scan": 9, **settings})
    assert [line for line in warnings() if line.startswith(f"settings stay as they are: {error}")]
    assert not [line for line in warnings() if "changed" in line]
    after = await engine.running.status()
    assert after["pages_to_scan"] == before["pages_to_scan"]
    engine.scope.cancel()


async def test_who_loses_a_domain_is_let_go(socket_path: Path, nursery: trio.Nursery, warnings: Warnings) -> None:
    """And who keeps it stays; newcomers go by the new rules."""
    uid = 0
    reloaded = Reloaded(
        socket_path, allowed_domains=frozenset({(uid, "web"), (uid, "fleet")}), shared_domains=frozenset({"fleet"})
    )
    await nursery.start(reloaded.run)
    running = reloaded.running
    plain, web, fleet = (FakeAgent(socket_path, {BASE: page(1)}, label=label) for label in ("", "web", "fleet"))
    for agent in (plain, web, fleet):
        await running.join(agent)
    await reloaded.reload(shared_domains=frozenset())

    async def left() -> bool:
        return len((await running.status())["agents"]) == 2

    await running.until(left, "one agent is let go")
    assert fleet.farewell == "the settings no longer put it into its domain"
    assert (plain.farewell, web.farewell) == (None, None)
    assert any("no longer put it into its domain" in line for line in warnings())
    back = FakeAgent(socket_path, {BASE: page(1)}, label="fleet")
    await running.join(back)
    assert {agent["domain"] for agent in (await running.status())["agents"]} == {"", "web", "fleet"}
    for agent in (plain, web, back):
        await trio.to_thread.run_sync(agent.leave)
    reloaded.scope.cancel()


async def test_fewer_connections(engine: Reloaded) -> None:
    first = await engine.running.join(FakeAgent(engine.config.socket, {}))
    await engine.reload(agents_max=1)
    second = FakeAgent(engine.config.socket, {})
    await engine.running.join(second)
    assert second.refused == "there are 1 connections of uid 0 already"
    await trio.to_thread.run_sync(first.leave)
    engine.scope.cancel()


def test_differences() -> None:
    one = EngineConfig()
    assert differences(one, attrs.evolve(one, pages_to_scan=3, policy="linear")) == {"pages_to_scan", "policy"}
    assert differences(one, one) == set()
    assert "policy" not in CHANGEABLE
