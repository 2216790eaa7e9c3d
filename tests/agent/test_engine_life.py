"""Engines that stop, die, end and come back: their agents' processes go on, and come back to the next one."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper
from agent.puppet import PAGES, Puppet
from support.engine import Engine, start_engine
from support.ledger import Ledger

PROGRAM = Path(__file__).parent / "programs" / "puppet.c"

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")
Start = Callable[..., Puppet]


@pytest.fixture
def own_engine(tmp_path: Path, ledger: Ledger) -> Engine:
    return start_engine(tmp_path, ledger, "--sleep-millisecs", "0", "--allow-domain", "0:left", mount=False)


@pytest.fixture
def puppet(compile_c: Callable[..., Path], ledger: Ledger) -> Start:
    program = compile_c(PROGRAM, "-Inative")

    def start(engine: Engine, **extra: str) -> Puppet:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return Puppet(Wrapper(engine, ledger).start(program, extra={"SALT": "77", **extra}, **pipes))

    return start


def test_other_process_is_untouched(own_engine: Engine, puppet: Start) -> None:
    one, other = puppet(own_engine), puppet(own_engine)
    for each in (one, other):
        each.until_merged()
    for page in (0, 13, 14, 63):
        one.write(page)
    assert one.is_right()
    assert other.is_right()
    assert other.merged() == PAGES
    one.end()
    assert other.is_right()
    assert other.merged() == PAGES
    other.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_engine_that_ends(
    own_engine: Engine, puppet: Start, tmp_path: Path, ledger: Ledger, number: signal.Signals
) -> None:
    puppets = [puppet(own_engine), puppet(own_engine)]
    for each in puppets:
        each.until_merged()
    own_engine.stop(number)
    for each in puppets:
        assert each.is_right()
        assert each.merged() == PAGES
        each.write(5)
        each.write(40)
        assert each.is_right()
        assert each.merged() <= PAGES - 2
    kept = [each.merged() for each in puppets]
    again = start_engine(tmp_path, ledger, "--sleep-millisecs", "0", mount=False)
    again.wait_until("rejoined", lambda status: len(status["agents"]) == 2)
    for each, before in zip(puppets, kept, strict=True):
        each.until(merging=True)
        assert each.merged() >= before
        assert each.is_right()
    late = [puppet(again), puppet(again)]
    for each in late:
        each.until_merged()
    for each in [*puppets, *late]:
        each.write(20)
        assert each.is_right()
        each.end()
    again.stop()


def test_stopped_engine_delays_nobody(own_engine: Engine, puppet: Start) -> None:
    puppets = [puppet(own_engine), puppet(own_engine)]
    for each in puppets:
        each.until_merged()
    os.kill(own_engine.pid, signal.SIGSTOP)
    try:
        until = time.monotonic() + 3
        slowest = 0.0
        for page in range(0, PAGES, 3):
            slowest = max(slowest, *(each.write(page) for each in puppets))
            time.sleep(max(0.0, (until - time.monotonic()) / (PAGES - page)))
        assert all(each.is_right() for each in puppets)
        late = puppet(own_engine)  # one that cannot join now
        late.write(1)
        assert late.is_right()
    finally:
        os.kill(own_engine.pid, signal.SIGCONT)
    assert slowest < 1.0
    late.until_merged(PAGES // 2)
    for each in [*puppets, late]:
        each.end()


def test_domains_share_nothing(own_engine: Engine, puppet: Start) -> None:
    alone = puppet(own_engine, UDEDUP_DOMAIN="left")
    pair = [puppet(own_engine), puppet(own_engine)]
    for each in pair:
        each.until_merged()
    alone.until(merging=True)
    # A page of the other domain has had its chance when one of its own has been merged.
    second = puppet(own_engine, UDEDUP_DOMAIN="left", SALT="78")
    third = puppet(own_engine, UDEDUP_DOMAIN="left", SALT="78")
    alone.ask("advise")
    second.until_merged()
    third.until_merged()
    assert alone.merged() == 0
    for each in [alone, *pair, second, third]:
        assert each.is_right()
        each.end()


def test_statistics_say_that_the_engine_is_gone(own_engine: Engine, puppet: Start) -> None:
    alone = puppet(own_engine)
    alone.until(merging=True)
    own_engine.stop()
    alone.until(merging=False)
    alone.end()


def test_short_lived_processes_leave_nothing(own_engine: Engine, ledger: Ledger) -> None:
    wrapper = Wrapper(own_engine, ledger)

    def descriptors() -> int:
        return len(list(Path(f"/proc/{own_engine.pid}/fd").iterdir()))

    def no_agents() -> int:
        own_engine.wait_until("without agents", lambda status: not status["agents"])
        return descriptors()

    def run_many() -> None:
        for _ in range(25):
            running = [wrapper.start("/bin/true") for _ in range(4)]
            assert [process.wait(30) for process in running] == [0] * 4

    run_many()
    before = no_agents()
    run_many()
    # What it sets up once it has by now; from here on nothing may grow.
    assert no_agents() <= before
