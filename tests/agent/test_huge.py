"""Transparent huge pages: those with few pages to merge stay whole, the others are split and merged; contents stay."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from agent.conftest import Wrapper
from support.engine import Engine, read_line
from support.ledger import Ledger

PROGRAM = Path(__file__).parent / "programs" / "huge.c"
HUGE_KB = 2048
HUGE_PAGES = 8
"""Of the program; each with 512 pages."""

LOOKS = 6
"""Times the scan goes through all memory before nothing changes any more."""

SECONDS = 60.0

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root", "huge-pages")


@attrs.define
class Memory:
    """What /proc/PID/smaps says of the program's memory, kB."""

    resident: int = 0
    huge: int = 0
    store: int = 0


def memory_of(pid: int, start: int, end: int) -> Memory:
    found, name = Memory(), ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if "-" in word:
            inside = start <= int(word.partition("-")[0], 16) < end
            name = rest
        elif inside and word == "Rss:":
            found.resident += int(rest.split()[0])
            found.store += int(rest.split()[0]) if "udedup-store" in name else 0
        elif inside and word == "AnonHugePages:":
            found.huge += int(rest.split()[0])
    return found


@pytest.fixture
def settle(
    compile_c: Callable[..., Path], engine_factory: Callable[..., Engine], ledger: Ledger
) -> Callable[..., list[Memory]]:
    """Runs the program twice under an engine until all is merged that will be; gives the memory of each.

    With ``wanted`` it waits longer for that: a round leaves out who is slow, and the kernel may be busy with a page.
    """

    def run(threshold: int, equal: int, zero: int, wanted: Memory | None = None) -> list[Memory]:
        options = ("--sleep-millisecs", "0", "--huge-page-threshold", str(threshold))
        engine = engine_factory(*options, mount=False)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        program = compile_c(PROGRAM)
        # A huge page that is being filled is mostly zero pages.
        engine.process.send_signal(signal.SIGSTOP)
        programs = [Wrapper(engine, ledger).start(program, str(equal), str(zero), **pipes) for _ in range(2)]
        places = []
        for each in programs:
            assert each.stdout is not None
            places.append([int(word, 16) for word in read_line(each.stdout, SECONDS).split()[1:]])
        engine.process.send_signal(signal.SIGCONT)
        joined = engine.wait_until("joined", lambda status: len(status["agents"]) == len(programs))
        engine.wait_until("scanned", lambda status: bool(status["full_scans"] >= joined["full_scans"] + LOOKS))
        deadline = time.monotonic() + SECONDS
        while True:
            found = [memory_of(each.pid, *place) for each, place in zip(programs, places, strict=True)]
            if wanted is None or found == [wanted] * len(found) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for each in programs:
            each.communicate("\n", timeout=SECONDS)
            assert each.returncode == 0
        return found

    return run


@pytest.mark.parametrize(("equal", "zero"), [(7, 0), (0, 7), (3, 4)])
def test_few_pages_do_not_split_huge_pages(settle: Callable[..., list[Memory]], equal: int, zero: int) -> None:
    for memory in settle(8, equal, zero):
        assert memory == Memory(HUGE_PAGES * HUGE_KB, HUGE_PAGES * HUGE_KB, 0)


@pytest.mark.parametrize(
    ("threshold", "equal", "zero"), [(8, 8, 0), (8, 0, 8), (8, 4, 4), (8, 200, 100), (1, 1, 0), (1, 0, 1), (0, 1, 1)]
)
def test_huge_pages_are_split_for_enough_pages(
    settle: Callable[..., list[Memory]], threshold: int, equal: int, zero: int
) -> None:
    wanted = Memory(HUGE_PAGES * (HUGE_KB - 4 * zero), 0, HUGE_PAGES * 4 * equal)
    for memory in settle(threshold, equal, zero, wanted):
        assert memory == wanted
