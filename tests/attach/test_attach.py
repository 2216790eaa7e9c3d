"""Programs that run already share their memory, stop sharing it, and notice nothing of either."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attach.conftest import PROGRAMS, detach, end_in_order
from support.engine import Engine, udedup
from support.users import as_nobody

from udedup.attach.session import Held

PAGES = 300
HELD_MOST = 5.0
"""Of a machine that does nothing else it is milliseconds; this one may be very busy, s."""

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")

Start = Callable[..., "subprocess.Popen[str]"]
Attach = Callable[..., Held]


def sharing(engine: Engine, *pids: int) -> Callable[[dict[str, Any]], bool]:
    """Whether all of these share something."""
    return lambda status: {a["pid"] for a in status["agents"] if a["pages_sharing"]} >= set(pids)


def keepers(start: Start, count: int = 2) -> list["subprocess.Popen[str]"]:
    return [start(sys.executable, PROGRAMS / "keeper.py", str(PAGES), str(10 * at + 10)) for at in range(count)]


def test_the_commands(start: Start, attached_engine: Engine) -> None:
    programs = keepers(start)
    pids = [program.pid for program in programs]
    for pid in pids:
        done = attached_engine.command("attach", str(pid))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"process {pid} shares its memory from now on. It was held for ")
    attached_engine.wait_until("sharing", sharing(attached_engine, *pids))
    name = Path(f"/proc/{pids[0]}/comm").read_text().strip()
    again = attached_engine.command("attach", str(pids[0]))
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"udedup: process {pids[0]} ({name}) shares its memory already: see `udedup status`\n"
    for pid in pids:
        done = udedup("detach", pid)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"process {pid} has its memory for itself. ")
    attached_engine.wait_until("gone", lambda status: not {a["pid"] for a in status["agents"]} & set(pids))
    again = udedup("detach", pids[0])
    assert again.returncode == 1
    assert again.stderr == f"udedup: process {pids[0]} ({name}) does not share its memory any more\n"
    for program in programs:
        assert "memfd:udedup" not in Path(f"/proc/{program.pid}/maps").read_text()
        end_in_order(program)


def test_an_ordinary_user(start: Start, attached_engine: Engine) -> None:
    """With the user's own program, and root's engine."""
    program = start(*as_nobody(), sys.executable, PROGRAMS / "keeper.py", PAGES, 10)
    for words in (["attach", "--socket", attached_engine.socket], ["detach"]):
        command = [*as_nobody(), sys.executable, "-m", "udedup", *map(str, words), str(program.pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
    end_in_order(program)


def test_a_wrapped_program(engine_factory: Callable[..., Engine], start: Start, attached_engine: Engine) -> None:
    """It can be taken out, and then join another engine."""
    engine = engine_factory("--sleep-millisecs", "0", mount=False)
    wrap = [sys.executable, "-m", "udedup", "run", "--socket", engine.socket, "--"]
    programs = [start(*wrap, sys.executable, PROGRAMS / "keeper.py", PAGES, at) for at in (10, 20)]
    pids = [program.pid for program in programs]
    engine.wait_until("sharing", sharing(engine, *pids))
    assert attached_engine.command("attach", str(pids[0])).returncode == 1
    for pid in pids:
        assert udedup("detach", pid).returncode == 0
        done = attached_engine.command("attach", str(pid))
        assert done.returncode == 0, done.stderr
    attached_engine.wait_until("sharing", sharing(attached_engine, *pids))
    for program in programs:
        end_in_order(program)


def test_many_threads(compile_c: Callable[..., Path], start: Start, attach: Attach, attached_engine: Engine) -> None:
    """Two hundred, which do everything that can be interrupted wrongly."""
    crowd = start(compile_c(PROGRAMS / "crowd.c", "-pthread"), "200")
    for number in range(3):
        held = attach(crowd.pid)
        assert held.threads >= 200
        assert held.all < HELD_MOST
        if number == 0:
            attached_engine.wait_until("sharing", sharing(attached_engine, crowd.pid))
        detach(crowd.pid)
    assert end_in_order(crowd).endswith("alarms\n")


def test_again_and_again(start: Start, attach: Attach) -> None:
    programs = keepers(start)
    for _ in range(6):
        for program in programs:
            attach(program.pid)
        for program in programs:
            detach(program.pid)
    tasks = len(list(Path(f"/proc/{programs[0].pid}/task").iterdir()))
    assert tasks == 3, "the program's thread, and the two that the agent has once and for all"
    for program in programs:
        end_in_order(program)


def test_who_attaches_is_killed(compile_c: Callable[..., Path], start: Start, attach: Attach) -> None:
    """At any moment; the program goes on, and can be attached to by the next."""
    crowd = start(compile_c(PROGRAMS / "crowd.c", "-pthread"), "40", "tolerant")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    for _ in range(12):
        attacher = start(sys.executable, PROGRAMS / "attacher.py", str(crowd.pid), "/nowhere")
        time.sleep(moments.uniform(0, 0.012))
        attacher.send_signal(signal.SIGKILL)
        attacher.wait(20)
        assert crowd.poll() is None
    # What was begun before may not be done yet.
    attach(crowd.pid)
    detach(crowd.pid)
    end_in_order(crowd)


def test_children_of_programs(start: Start, attach: Attach, attached_engine: Engine) -> None:
    """One born while its parent was attached joins by itself; one born later can be attached to."""
    parent = start(sys.executable, PROGRAMS / "parent.py")
    assert parent.stdin is not None
    assert parent.stdout is not None

    def bear() -> int:
        print("bear", file=parent.stdin, flush=True)
        return int(parent.stdout.readline())  # type: ignore[union-attr]

    attach(parent.pid)
    first = bear()
    attached_engine.wait_until("joined", lambda status: first in {a["pid"] for a in status["agents"]})
    detach(parent.pid)
    second = bear()
    attach(second)
    detach(first)
    attach(first)
    pids = {a["pid"] for a in attached_engine.status()["agents"]}
    assert {first, second} <= pids
    assert parent.pid not in pids
    end_in_order(parent)
