"""Wrapped programs in control groups that limit their memory: who is charged for what, and who dies of it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper
from agent.puppet import Puppet
from support.cgroup import Group, memory_group
from support.engine import Engine, start_engine
from support.ledger import Ledger

PROGRAM = Path(__file__).parent / "programs" / "puppet.c"
PAGES = 5000
PAGE = 4096
AGENT_BYTES = 16 << 20
"""More than an agent takes for itself."""

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root", "memory-groups")
Start = Callable[..., Puppet]


@pytest.fixture
def own_engine(tmp_path: Path, ledger: Ledger) -> Engine:
    return start_engine(tmp_path, ledger, "--sleep-millisecs", "0", mount=False)


@pytest.fixture
def puppet(compile_c: Callable[..., Path], ledger: Ledger) -> Start:
    program = compile_c(PROGRAM, "-Inative")

    def start(engine: Engine | None, group: Group | None = None) -> Puppet:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [*(() if group is None else group.prefix), program]
        return Puppet(Wrapper(engine, ledger).start(*command, extra={"SALT": "77", "PAGES": str(PAGES)}, **pipes))

    return start


def write_until_killed(puppet: Puppet) -> int:
    """Returns how many pages it has written to."""
    assert puppet.process.stdin is not None
    for page in range(PAGES):
        try:
            puppet.write(page)
        except (AssertionError, BrokenPipeError):
            assert puppet.process.wait(10) == -signal.SIGKILL
            puppet.process.stdin.close()
            return page
    raise AssertionError("it was not killed")


def test_who_is_charged(own_engine: Engine, puppet: Start) -> None:
    """For its own copies a process's group; for what is shared the engine's, which alone makes store pages."""
    with memory_group(f"charged-{os.getpid()}") as group:
        bare = puppet(None, group)
        without = group.charged
        bare.end()
        outside, inside = puppet(own_engine), puppet(own_engine, group)
        for each in (outside, inside):
            each.until_merged(PAGES)
        assert without > PAGES * PAGE
        assert group.charged < without - PAGES * PAGE + AGENT_BYTES
        for page in range(PAGES // 2):
            inside.write(page)
        # Each of its own copies is its own again.
        assert group.charged > PAGES // 2 * PAGE
        assert inside.is_right()
        assert group.kills == 0
        outside.end()
        inside.end()


def test_program_that_is_killed_for_its_memory_harms_nobody(own_engine: Engine, puppet: Start) -> None:
    other = puppet(own_engine)
    for round_ in range(3):
        with memory_group(f"killed-{os.getpid()}-{round_}") as group:
            victim = puppet(own_engine, group)
            for each in (other, victim):
                each.until_merged(PAGES - round_)
            group.limit(group.charged + (2 << 20))
            pages = write_until_killed(victim)
            # Not before the copies of what it wrote to, which are its own, had no room.
            assert pages > 100
            assert group.kills >= 1
        assert other.is_right()
        assert other.merged() >= PAGES - round_
        own_engine.wait_until("without it", lambda status: len(status["agents"]) == 1)
        other.write(round_)
    newcomer = puppet(own_engine)
    newcomer.until_merged(PAGES - 3)
    for each in (other, newcomer):
        assert each.is_right()
        each.end()
    own_engine.wait_until("empty", lambda status: status["pages_shared"] == 0)
    assert own_engine.stop() == 0
    assert own_engine.log.read_text() == ""


def test_programs_killed_while_they_merge(own_engine: Engine, puppet: Start) -> None:
    """At whatever point of a transaction that comes: the others keep every byte, and the engine its counts."""
    others = [puppet(own_engine), puppet(own_engine)]
    for each in others:
        each.until_merged(PAGES)
    for part in (0.95, 0.8, 0.6):
        with memory_group(f"merging-{os.getpid()}-{int(100 * part)}") as group:
            victim = puppet(own_engine, group)
            deadline = time.monotonic() + 20
            while group.charged > part * PAGES * PAGE:
                assert time.monotonic() < deadline, (group.charged, victim.stats())
            # From here on it merges, its writes break what is merged, and there is no room for all that is broken.
            group.limit(group.charged + (1 << 18))
            write_until_killed(victim)
            assert group.kills >= 1
        assert all(each.is_right() for each in others)
    own_engine.wait_until("without them", lambda status: len(status["agents"]) == 2)
    for each in others:
        assert each.merged() == PAGES
        each.end()
    own_engine.wait_until("empty", lambda status: status["pages_shared"] == 0)
    assert own_engine.stop() == 0
