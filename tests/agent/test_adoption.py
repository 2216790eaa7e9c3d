"""Real programs and engines that come one after the other: what is merged stays so, and goes on being shared."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent.conftest import LIBRARY, Wrapper
from agent.fake_engine import HEADER, FakeEngine
from agent.puppet import Puppet
from support.cgroup import memory_limited
from support.engine import Engine, start_engine
from support.ledger import Ledger

from udedup._native import lib

PROGRAM = Path(__file__).parent / "programs" / "puppet.c"
PAGES = 5000
"""More than a segment has."""
OPTIONS = ("--sleep-millisecs", "0")

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")
Start = Callable[..., Puppet]


@pytest.fixture
def puppet(compile_c: Callable[..., Path], ledger: Ledger) -> Start:
    program = compile_c(PROGRAM, "-Inative")

    def start(engine: Engine, **extra: str) -> Puppet:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        extra = {"SALT": "77", "PAGES": str(PAGES), **extra}
        return Puppet(Wrapper(engine, ledger).start(program, extra=extra, **pipes))

    return start


def segments_of(pid: int) -> Counter[int]:
    """By the inode of the segment, how many pages of a process are mapped to it."""
    pages: Counter[int] = Counter()
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith("/memfd:udedup-store") and words[1].endswith("p"):
            start, end = (int(address, 16) for address in words[0].split("-"))
            pages[int(words[4])] += (end - start) // 4096
    return pages


def sharing(engine: Engine, shared: int, mapped: int) -> dict[str, Any]:
    """Waits until so many pages are shared by so many mappings, 1% of them excepted; returns the status."""

    def reached(status: dict[str, Any]) -> bool:
        return bool(
            status["pages_shared"] >= 0.99 * shared
            and status["pages_shared"] + status["pages_sharing"] >= 0.99 * mapped
        )

    return engine.wait_until(f"sharing {shared} pages {mapped} times", reached)


def test_three_engines_in_a_row(tmp_path: Path, ledger: Ledger, puppet: Start) -> None:
    engine = start_engine(tmp_path, ledger, *OPTIONS, mount=False)
    puppets = [puppet(engine), puppet(engine)]
    for each in puppets:
        each.until_merged(PAGES)
    before = sharing(engine, PAGES, 2 * PAGES)
    old = segments_of(puppets[0].process.pid)
    assert len(old) >= 2
    for generation in range(3):
        engine.stop(signal.SIGKILL)
        assert all(each.is_right() for each in puppets)
        engine = start_engine(tmp_path, ledger, *OPTIONS, mount=False)
        after = sharing(engine, before["pages_shared"], len(puppets) * PAGES)
        assert after["store"]["adopted"] >= len(old)
        assert after["store"]["bytes"] <= 1.01 * before["store"]["bytes"]
        newcomer = puppet(engine)
        newcomer.until_merged(PAGES)
        puppets.append(newcomer)
        for each in puppets:
            assert each.is_right()
            assert each.merged() >= 0.99 * PAGES
        # The newcomer's pages were not copied either, but for some of its libraries' that were not shared before.
        used = segments_of(newcomer.process.pid)
        assert sum(used[inode] for inode in old) >= 0.99 * PAGES, generation
        assert engine.status()["store"]["bytes"] <= 1.01 * before["store"]["bytes"]
    for number, each in enumerate(puppets):
        for page in range(number, PAGES, 50):
            each.write(page)
    assert all(each.is_right() for each in puppets)
    engine.wait_until("counted", lambda status: status["breaks"]["pages"] >= len(puppets) * PAGES // 50)
    for each in puppets:
        each.end()
    engine.wait_until("empty", lambda status: status["pages_shared"] == 0)
    assert engine.stop() == 0
    assert "keeps a segment" not in engine.log.read_text()


@pytest.mark.require("memory-groups")
def test_engine_that_is_killed_for_its_memory(tmp_path: Path, ledger: Ledger, puppet: Start) -> None:
    """What it had stored until then is the next one's."""
    engine = start_engine(tmp_path, ledger, *OPTIONS, mount=False)
    with memory_limited(engine.pid, 16 << 20):
        puppets = [puppet(engine, PAGES="20000"), puppet(engine, PAGES="20000")]
        assert engine.process.wait(60) == -signal.SIGKILL
    assert all(each.is_right() for each in puppets)
    engine = start_engine(tmp_path, ledger, *OPTIONS, mount=False)
    after = sharing(engine, 20_000, 40_000)
    assert after["store"]["adopted"] >= 1
    for each in puppets:
        assert each.is_right()
        each.end()
    engine.stop()


def test_fork_child_of_a_process_whose_engine_is_gone(tmp_path: Path, ledger: Ledger, puppet: Start) -> None:
    """It has no descriptors; those of the other process serve it, too."""
    engine = start_engine(tmp_path, ledger, *OPTIONS, mount=False)
    first, second = puppet(engine), puppet(engine)
    for each in (first, second):
        each.until_merged(PAGES)
    engine.stop(signal.SIGKILL)
    child = int(first.ask("fork"))
    os.kill(first.process.pid, signal.SIGSTOP)  # the parent does not come back
    try:
        engine = start_engine(tmp_path, ledger, *OPTIONS, mount=False)
        engine.wait_until("joined", lambda status: len(status["agents"]) >= 2)

        def counted(status: dict[str, Any]) -> bool:
            return any(agent["pid"] == child and agent["pages_sharing"] >= 0.99 * PAGES for agent in status["agents"])

        engine.wait_until("counted", counted)
        assert first.is_right()
        for page in range(0, PAGES, 100):
            first.write(page)
        assert first.is_right()
        assert second.is_right()
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    first.end()
    second.end()
    engine.wait_until("empty", lambda status: status["pages_shared"] == 0)
    engine.stop()


def test_engine_that_stops_for_longer_than_it_waits_for_answers(tmp_path: Path, ledger: Ledger, puppet: Start) -> None:
    """It does not take its own absence for theirs."""
    engine = start_engine(tmp_path, ledger, *OPTIONS, mount=False)
    puppets = [puppet(engine), puppet(engine)]
    for each in puppets:
        each.until_merged(PAGES)
    sharing(engine, PAGES, 2 * PAGES)
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        until = time.monotonic() + 13  # EngineConfig.answer_seconds is 10
        while time.monotonic() < until:
            assert puppets[0].write(int(until - time.monotonic())) < 1.0
            time.sleep(0.5)
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    sharing(engine, PAGES - 14, 2 * PAGES - 14)
    late = puppet(engine)
    late.until_merged(PAGES)
    for each in [*puppets, late]:
        assert each.is_right()
        each.end()
    assert engine.stop() == 0
    assert engine.log.read_text() == ""


def test_engine_of_another_version_is_left_alone(
    tmp_path: Path, ledger: Ledger, compile_c: Callable[..., Path]
) -> None:
    """It refuses once; the program goes on alone and does not ask again."""
    engine = FakeEngine(tmp_path / "socket")
    environment = {"SALT": "77", "LD_PRELOAD": str(LIBRARY), "UDEDUP_SOCKET": str(engine.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    program = compile_c(PROGRAM, "-Inative")
    puppet = Puppet(Wrapper(None, ledger).start(program, extra=environment, **pipes))
    reason = b"it speaks version 3 of the protocol, this engine speaks 2".ljust(lib.UDD_REASON_MAX, b"\0")
    engine.take_hello()
    engine.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_REFUSED, 0, 0, 0, 0) + reason)
    engine.hang_up()
    assert not engine.is_called_within(5)
    merging, _, said = puppet.stats()
    assert not merging
    assert "speaks version 3" in said
    puppet.write(3)
    assert puppet.is_right()
    puppet.end()
    engine.close()
