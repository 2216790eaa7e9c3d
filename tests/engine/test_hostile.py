"""Hostile clients of another user beside an engine: others get what they got before, and its memory stays small."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
from engine.fake_agent import PAGE, FakeAgent, page
from engine.hostile import KINDS
from support.engine import Engine
from support.users import as_nobody, open_way

pytestmark = pytest.mark.require("userfaultfd-move", "root")
TESTS = Path(__file__).parent.parent
BASE = 0x10000000
PAGES = 500
SAMPLES = 12
TRIES = 3
"""Measurements of which one must be good: somebody else may be at work on this machine, too."""

SPARE_HINT, SPARE_SCAN = 0.2, 1.0
"""Beyond twice and three times as long as usual, s."""

PAUSE = 0.25
"""Between two hints, s: who gives few is not made to wait for those who give many."""


@contextmanager
def attacked(engine: Engine, kind: str) -> Iterator[None]:
    """Another user's client is at work."""
    open_way(engine.socket.parent)
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    attacker = subprocess.Popen(
        ["chrt", "--idle", "0", *as_nobody(), sys.executable, "-m", "engine.hostile", str(engine.socket), kind],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(1.5)
        assert attacker.poll() is None
        yield
        assert attacker.poll() is None
    finally:
        attacker.kill()
        attacker.wait()


@attrs.frozen
class Service:
    """What two agents of an engine got."""

    hinted: float
    """Median time from a hint to the merge of its page, s."""

    scanned: float
    """Median time in which the linear scan merges memory that is new, s."""


def measure(engine: Engine) -> Service:
    """Two honest agents of our own user."""
    first = FakeAgent(engine.socket, {BASE + i * PAGE: page(1 + i) for i in range(PAGES)}).join()
    second = FakeAgent(engine.socket, {2 * BASE + i * PAGE: page(1 + i) for i in range(PAGES)}).join()

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert first.farewell is None, first.farewell
            assert second.farewell is None, second.farewell
            assert time.monotonic() < deadline, (first.requests[-20:], second.requests[-20:], engine.status())
            time.sleep(0.0005)

    try:
        wait_for(lambda: len(first.placed) == len(second.placed) == PAGES)
        scans = []
        for lap in range(8):
            for i in range(PAGES):
                content = page(10_000 * (lap + 1) + i)
                first.write(BASE + i * PAGE, content)
                second.write(2 * BASE + i * PAGE, content)
            began = time.monotonic()
            wait_for(lambda: len(first.placed) == len(second.placed) == PAGES)
            scans.append(time.monotonic() - began)
        hints = []
        for i in range(SAMPLES):
            address = 2 * BASE + i * PAGE
            time.sleep(PAUSE)
            second.write(address, first.memory[BASE + i * PAGE])
            began = time.monotonic()
            second.hint(address, PAGE)
            wait_for(lambda address=address: address in second.placed)
            hints.append(time.monotonic() - began)
        for agent in (first, second):
            assert all(agent.read(address) == content for address, content in agent.memory.items())
        return Service(statistics.median(hints), statistics.median(scans))
    finally:
        first.leave()
        second.leave()


ALL = [kind for kind in KINDS if kind not in ("honest", "forger", "replayer", "unread", "smuggler")]
"""Those are dropped soon, and come and go; tests/bench/hostile.py has them, too."""

PACED = ["flooder", "dawdler", "endless", "hoarder", "come-and-go"]
"""Those to whom the engine's rate could matter."""


@pytest.fixture(scope="module")
def normal() -> dict[str, Service]:
    """What is got beside an honest process of the same size, by ``sleep_millisecs``: measured once for all kinds."""
    return {}


@pytest.mark.parametrize(("sleep", "kind"), [("0", kind) for kind in ALL] + [("20", kind) for kind in PACED])
def test_others_are_served_as_before(
    engine_factory: Callable[..., Engine], normal: dict[str, Service], kind: str, sleep: str
) -> None:
    """What is measured is what the engine does, not the processor time that a busy process takes: it has the rest.

    The bounds are wide, for other tests may run beside; tests/bench/hostile.py measures.
    """
    engine = engine_factory("--socket-mode", "666", "--sleep-millisecs", sleep, mount=False)
    for _ in range(TRIES):
        if sleep not in normal:
            with attacked(engine, "honest"):
                normal[sleep] = measure(engine)
        before = normal[sleep]
        with attacked(engine, kind):
            during = measure(engine)
            memory = resident(engine.pid)
        print(f"{kind}, sleep {sleep} ms: normally {before}, now {during}, engine {memory >> 20} MiB")
        assert memory < 200 << 20
        if during.hinted <= 2 * before.hinted + SPARE_HINT and during.scanned <= 3 * before.scanned + SPARE_SCAN:
            break
        # The machine may be busier than it was.
        del normal[sleep]
    else:
        pytest.fail(f"beside {kind}: {during}; beside an honest one: {before}")
    assert engine.process.poll() is None


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
