"""``udedup top`` in a terminal: keys, other sizes, and a terminal that is as it was after every end."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.answers import Answers
from support.engine import UDEDUP, Engine, udedup
from support.statuses import Busy, agent
from support.terminal import ProgramInTerminal

from udedup.top.screen import KEYS

INTERVAL = "0.05"


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="udedup-test-", dir="/tmp") as folder:
        yield Path(folder) / "socket"


class Faked:
    """An engine that always works, and does as it is told with the first of its processes."""

    def __init__(self, path: Path) -> None:
        self.silent = False
        self.paused = False
        self._busy = Busy(30)
        self.answers = Answers(path, self._answer)

    @property
    def deeds(self) -> list[dict[str, Any]]:
        """What was asked for, but for its status."""
        return [asked for asked in self.answers.requests if asked["op"] != "status"]

    def _answer(self, asked: dict[str, Any]) -> object:
        while self.silent:
            time.sleep(0.01)
        match asked["op"]:
            case "status":
                status = self._busy()
                first = agent(1, paused=self.paused, merging=not self.paused, reason="paused on request" * self.paused)
                return msgspec.structs.replace(status, agents=[first, *status.agents])
            case "pause" | "merge":
                self.paused = asked["op"] == "pause"
                return 1
            case "unmerge" if asked["pid"] == 1:
                return 1234
        raise ValueError("it is not to be had")


@pytest.fixture
def faked(path: Path) -> Iterator[Faked]:
    engine = Faked(path)
    yield engine
    engine.silent = False
    engine.answers.close()


Open = Callable[..., ProgramInTerminal]


@pytest.fixture
def top(path: Path, faked: Faked) -> Iterator[Open]:
    """Call it with more options; gives `udedup top` once it shows something."""
    opened: list[ProgramInTerminal] = []

    def start(*options: str, **size: int) -> ProgramInTerminal:
        command = [*UDEDUP, "top", "--socket", str(path), "--interval", INTERVAL, "--sort", "pid", *options]
        program = ProgramInTerminal(command, **size)
        opened.append(program)
        program.until(lambda screen: screen[-1] == KEYS, "drawn")
        return program

    yield start
    for program in opened:
        program.__exit__(None, None, None)


def last(text: str) -> Callable[[list[str]], bool]:
    return lambda screen: text in screen[-1]


def both(selected: str, remark: str) -> Callable[[list[str]], bool]:
    """What is said of the selected process, and in the last line. The state may be seen before the deed is done."""
    return lambda screen: screen[-2].startswith(selected) and remark in screen[-1]


def test_it_shows_rates_and_what_is_saved(top: Open) -> None:
    program = top()
    assert not program.restored
    screen = program.until(lambda screen: "scanned 20,000/s of 50,000" in screen[4], "rates")
    assert (len(screen), screen[-1]) == (24, KEYS)
    assert screen[9].split()[0] == "1029"
    program.until(lambda screen: screen[2].count("▇") > 3, "a trend")


def test_q_ends_it(top: Open) -> None:
    program = top()
    program.send("q")
    assert program.end() == 0
    assert program.restored


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_end_it(top: Open, number: signal.Signals) -> None:
    program = top()
    assert program.end(number) == 128 + number
    assert program.restored
    assert "Traceback" not in program.written


def test_ctrl_c_ends_it(top: Open) -> None:
    program = top()
    program.send("\x03")
    assert program.end() == 128 + signal.SIGINT
    assert program.restored


def test_a_crash_leaves_the_terminal_as_it_was(path: Path, faked: Faked) -> None:
    program = (
        "import udedup.top.live as live, udedup.cli as cli, sys\nlive.screen = None\nsys.exit(cli.main(sys.argv[1:]))"
    )
    with ProgramInTerminal([sys.executable, "-c", program, "top", "--socket", str(path)]) as terminal:
        assert terminal.end() == 1
        assert terminal.restored
        # The traceback comes after, where it can be read.
        assert "TypeError" in terminal.written.rpartition("\x1b[?1049l")[2]


def test_the_terminal_goes(top: Open) -> None:
    program = top()
    program.hang_up()
    # It may see that before the kernel's signal comes, or after, or be about to end when it comes.
    assert program.end() in (1, 128 + signal.SIGHUP, -signal.SIGHUP)


def test_other_sizes(top: Open) -> None:
    program = top()
    for columns, lines in ((120, 50), (40, 10), (5, 2), (80, 24)):
        program.resize(columns, lines)
        screen = program.until(
            lambda screen, lines=lines, columns=columns: len(screen) == lines and screen[-1] == KEYS[:columns].rstrip(),
            f"{columns}x{lines}",
        )
        assert max(map(len, screen)) <= columns
    program.send("q")
    assert program.end() == 0


def test_selecting_pausing_and_resuming(top: Open, faked: Faked) -> None:
    program = top()
    program.send("p")
    program.until(last("select a process first"), "told to select")
    program.send("\x1b[F")
    program.until(lambda screen: screen[-2].startswith("1 worker-1: active"), "selected")
    program.send("p")
    program.until(both("1 worker-1: paused on request", "1 is paused"), "paused")
    program.send("p")
    program.until(both("1 worker-1: active", "1 may merge again"), "resumed")
    assert faked.deeds == [{"op": "pause", "pid": 1}, {"op": "merge", "pid": 1}]


def test_unmerging(top: Open, faked: Faked) -> None:
    program = top()
    program.send("\x1b[Fu")
    program.until(last("unmerge 1? y/n"), "asked")
    program.send("n")
    program.until(last("left as it is"), "left")
    assert faked.deeds == []
    program.send("u")
    program.until(last("unmerge 1? y/n"), "asked")
    program.send("y")
    program.until(last("1: 1,234 pages are private again"), "told")
    assert faked.deeds == [{"op": "unmerge", "pid": 1}]
    program.send("\x1b[Huy")
    program.until(last("it is not to be had"), "refused")


def test_sorting(top: Open) -> None:
    program = top()
    program.send("r")
    program.until(lambda screen: screen[9].split()[0] == "1", "turned round")
    program.send("<r")
    program.until(lambda screen: " not me" in screen[9], "by state, turned round")


def test_an_engine_that_does_not_answer_is_noticed_and_waited_for(top: Open, faked: Faked) -> None:
    program = top()
    faked.silent = True
    program.until(last("the engine has not answered for"), "noticed")
    program.send("\x1b[B")
    program.until(lambda screen: screen[-2].startswith("1029 "), "keys meanwhile")
    faked.silent = False
    program.until(last(KEYS), "well again")


def test_an_engine_that_goes_is_waited_for(top: Open, faked: Faked, path: Path) -> None:
    program = top()
    path.unlink()
    faked.silent = True
    program.until(last("the engine has not answered"), "noticed")
    again = Faked(path)
    faked.silent = False
    program.until(last(KEYS), "well again")
    again.answers.close()


def test_ctrl_z_gives_the_terminal_back_meanwhile(path: Path, faked: Faked) -> None:
    # A shell of its own, as otherwise nobody could let it go on, and the kernel would not stop it.
    script = (
        f"set -m; {' '.join(UDEDUP)} top --socket {path} --interval {INTERVAL}; stty -a >/dev/tty; echo stopped; fg"
    )
    with ProgramInTerminal(["bash", "--norc", "-c", script]) as terminal:
        terminal.until(last(KEYS), "drawn")
        terminal.send("\x1a")
        terminal.until(lambda screen: "stopped\r" in terminal.written, "stopped")
        said = terminal.written[terminal.written.index("\x1b[?1049l") :]
        assert " icanon" in said
        assert " echo " in said
        terminal.until(lambda _: "\x1b[?1049h" in terminal.written.rpartition("stopped")[2], "goes on")
        terminal.until(last(KEYS), "drawn again")
        terminal.send("q")
        assert terminal.end() == 0


# ---- without a terminal ----


def test_no_terminal_is_one_line(path: Path, faked: Faked) -> None:
    done = udedup("top", "--socket", path, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "udedup: no terminal to draw on: use `udedup top --once`, or `udedup status`\n"


def test_a_terminal_that_cannot_draw_is_one_line(path: Path, faked: Faked) -> None:
    with ProgramInTerminal([*UDEDUP, "top", "--socket", str(path)], env={**os.environ, "TERM": "dumb"}) as terminal:
        assert terminal.end() == 1
        assert terminal.written.startswith("udedup: no terminal to draw on")
        assert terminal.restored


def test_once_is_plain_text(path: Path, faked: Faked) -> None:
    done = udedup("top", "--once", "--interval", INTERVAL, "--socket", path, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "scanned 20,000/s of 50,000" in done.stdout
    assert done.stdout.count("worker-") == 31
    assert "\x1b" not in done.stdout
    # Names that the encoding has not are no reason to fail.
    faked.paused = True
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = udedup("top", "--once", "--interval", INTERVAL, "--socket", path, env=ascii_only)
    assert (done.returncode, "paused on request" in done.stdout) == (0, True)


@pytest.mark.parametrize("options", [("--once",), ()])
def test_no_engine(path: Path, options: tuple[str, ...]) -> None:
    with ProgramInTerminal([*UDEDUP, "top", *options, "--socket", str(path)]) as terminal:
        assert terminal.end() == 1
        assert terminal.written.startswith(f"udedup: no engine listens at {path}: start one")
        assert terminal.written.count("\n") == 1
        assert terminal.restored


@pytest.mark.require("userfaultfd-move", "root")
def test_a_real_engine(engine: Engine) -> None:
    program = engine.wrap(sys.executable, "-c", "import time; kept = b'same' * (1 << 20); time.sleep(1000)")
    try:
        engine.wait_until("joined", lambda status: bool(status["agents"]))
        command = [*UDEDUP, "top", "--socket", str(engine.socket), "--interval", INTERVAL]
        with ProgramInTerminal(command, columns=120) as top:
            top.until(lambda screen: len(screen) > 9 and f"{program.pid} " in screen[9], "listed")
            top.send("jp")
            top.until(both(f"{program.pid} ", "is paused"), "paused")
            assert engine.status()["agents"][0]["paused"]
            top.send("p")
            top.until(both(f"{program.pid} ", "may merge again"), "resumed")
            top.until(lambda screen: "active" in screen[9], "shown so")
            top.send("uy")
            top.until(both(f"{program.pid} ", "pages are private again"), "unmerged")
            top.until(lambda screen: "unmerged on request" in screen[9], "shown so")
            assert engine.status()["agents"][0]["pages_sharing"] == 0
            top.send("q")
            assert top.end() == 0
        done = engine.command("top", "--once", "--interval", INTERVAL)
        assert (done.returncode, str(program.pid) in done.stdout) == (0, True)
    finally:
        program.kill()
        program.wait()
