"""``udedup run``: neither the command nor its caller can tell, and nothing is left of an embedded engine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.engine import UDEDUP, Engine, read_line, udedup
from support.ledger import Ledger
from support.users import NOBODY, as_nobody, as_user, listener_of, open_way

PRELOADED = "grep -c libudedup.so /proc/self/maps"


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an embedded engine puts its socket; no engine of this user is found."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("UDEDUP_SOCKET", str(tmp_path / "nobody"))
    return folder


def processes_with(text: str) -> list[int]:
    """Processes that have ``text`` in their arguments (their own pids are unique to the test by its folder)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def assert_nothing_left(temp: Path, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while processes_with(str(temp)):
        assert time.monotonic() < deadline, f"left running: {processes_with(str(temp))}"
        time.sleep(0.05)
    assert list(temp.iterdir()) == []


def start(ledger: Ledger, *argv: str, ready: bool = True) -> "subprocess.Popen[str]":
    """Starts a wrapped command with an embedded engine and, if it prints a line when it is ready, waits for that."""
    process = subprocess.Popen([*UDEDUP, "run", "--", *argv], stdout=subprocess.PIPE, text=True)
    ledger.add_process(process.pid)
    assert process.stdout is not None
    if ready:
        assert read_line(process.stdout, 30) == "ready\n"
    return process


# ---- with no need of an engine ----


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [("no-such-command", 127, "command not found"), ("/etc/passwd", 126, "permission denied"), ("/", 126, "directory")],
)
def test_command_that_cannot_start(temp: Path, command: str, status: int, text: str) -> None:
    done = udedup("run", "--", command)
    assert done.returncode == status
    assert done.stderr.startswith("udedup: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert_nothing_left(temp)


@pytest.mark.require("gcc")
def test_static_program_runs_unwrapped_with_a_warning(temp: Path) -> None:
    source = temp.parent / "main.c"
    source.write_text('#include <stdlib.h>\nint main(void) { return getenv("LD_PRELOAD") ? 1 : 42; }\n')
    program = temp.parent / "static"
    subprocess.run(["gcc", "-static", "-o", str(program), str(source)], check=True)
    done = udedup("run", program)
    assert done.returncode == 42
    assert done.stderr == (
        f"udedup: {program} is statically linked: the agent cannot enter it, it runs without sharing memory\n"
    )
    assert_nothing_left(temp)


def test_setuid_program_runs_unwrapped_with_a_warning(temp: Path) -> None:
    program = Path(shutil.copy(shutil.which("env") or "/usr/bin/env", temp.parent / "env"))
    program.chmod(0o4755)
    done = udedup("run", program)
    assert done.returncode == 0
    assert "LD_PRELOAD" not in done.stdout
    assert done.stderr.startswith(f"udedup: {program} is setuid: ")
    assert done.stderr.count("\n") == 1
    assert_nothing_left(temp)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_is_no_socket_is_no_reason_for_an_engine(temp: Path, make: Callable[[Path], None]) -> None:
    path = temp.parent / "socket"
    make(path)
    done = udedup("run", "--socket", path, "true")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"udedup: {path} is no socket: name the engine's with --socket\n"
    assert_nothing_left(temp)


@pytest.mark.require("root")
def test_socket_of_others(temp: Path) -> None:
    path = temp.parent / "socket"
    open_way(temp.parent)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        command = [*as_nobody(), *UDEDUP, "run", "--socket", str(path), "true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"udedup: no permission to talk to the engine at {path}: do it as the engine's user, "
        "or start the engine with --socket-group or --socket-mode\n"
    )


@pytest.mark.require("root")
@pytest.mark.parametrize("argv", [("run", "true"), ("status",)])
def test_engine_of_another_user_in_ones_own_place(monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    for name in ("UDEDUP_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    uid = 0x10000 + os.getpid()
    path = Path(f"/tmp/udedup-{uid}.sock")
    with listener_of(NOBODY, path) as listener:
        command = [*as_user(uid), *UDEDUP, *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1 << 16) == b""
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"udedup: the engine at {path} is not this user's but that of uid 65534: name yours with --socket\n"
    )


# ---- with an engine of its own ----


@pytest.mark.require("userfaultfd-move", "root")
@pytest.mark.parametrize("status", [0, 1, 77, 255])
def test_exit_status_is_the_commands(temp: Path, status: int) -> None:
    done = udedup("run", "sh", "-c", f"exit {status}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    assert_nothing_left(temp)


@pytest.mark.require("userfaultfd-move", "root")
def test_command_is_wrapped_and_gets_its_arguments(temp: Path) -> None:
    done = udedup("run", "--", "sh", "-c", f'{PRELOADED} >/dev/null && echo "$0|$1|$2"', "--domain", "a b", "--")
    assert (done.returncode, done.stdout, done.stderr) == (0, "--domain|a b|--\n", "")


@pytest.mark.require("userfaultfd-move", "root")
def test_preload_of_the_user_stays(temp: Path) -> None:
    other = "/lib/x86_64-linux-gnu/libm.so.6"
    done = udedup("run", "sh", "-c", 'echo "$LD_PRELOAD"', env={**os.environ, "LD_PRELOAD": other})
    assert done.stdout.rstrip("\n").split(":")[1:] == [other]
    assert done.stdout.startswith("/")


@pytest.mark.require("userfaultfd-move", "root")
@pytest.mark.parametrize(("options", "told"), [((), ""), (("--keep-ksm",), "1")])
def test_agent_is_told_to_leave_memory_to_ksm(temp: Path, options: tuple[str, ...], told: str) -> None:
    assert udedup("run", *options, "--", "sh", "-c", 'echo "$UDEDUP_KEEP_KSM"').stdout == told + "\n"


@pytest.mark.require("userfaultfd-move", "root")
def test_output_and_input_are_passed_through(temp: Path) -> None:
    data = os.urandom(1 << 20)
    done = subprocess.run([*UDEDUP, "run", "cat"], input=data, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout == data, done.stderr) == (0, True, b"")


@pytest.mark.require("userfaultfd-move", "root")
def test_signals_act_as_if_unwrapped(temp: Path) -> None:
    """What Python itself changed in its own process must not reach the command (signal(7): ignored stays ignored)."""
    program = "grep -E '^Sig(Blk|Ign)' /proc/self/status"
    plain = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True)
    assert udedup("run", "sh", "-c", program).stdout == plain.stdout


@pytest.mark.require("userfaultfd-move", "root")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL])
def test_death_by_signal_is_seen_as_such(temp: Path, number: signal.Signals) -> None:
    done = udedup("run", "sh", "-c", f"kill -{int(number)} $$")
    assert done.returncode == -number
    assert done.stderr == ""
    assert_nothing_left(temp)


@pytest.mark.require("userfaultfd-move", "root")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_signals_are_passed_on(temp: Path, ledger: Ledger, number: signal.Signals) -> None:
    script = f"trap 'exit 9' {int(number)}; echo ready; while :; do sleep 0.05; done"
    process = start(ledger, "sh", "-c", script)
    process.send_signal(number)
    assert process.wait(20) == 9
    assert_nothing_left(temp)


@pytest.mark.require("userfaultfd-move", "root")
def test_interrupt_at_the_terminal_comes_once_and_leaves_the_engine(temp: Path, ledger: Ledger) -> None:
    """Ctrl-C goes to the whole foreground group: the command must see one, and still have its engine after it."""
    script = (
        "import signal, sys, time; seen = []; signal.signal(signal.SIGINT, lambda *_: seen.append(1));"
        "print('ready', flush=True); time.sleep(1.5); print(len(seen))"
    )
    master, slave = os.openpty()
    process = subprocess.Popen(
        [*UDEDUP, "run", "--", sys.executable, "-c", script],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The new session's leader takes the terminal, as a login shell does.
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    ledger.add_process(process.pid)
    os.close(slave)
    assert process.stdout is not None
    assert read_line(process.stdout, 30) == "ready\n"
    engines = processes_with(str(temp))
    os.write(master, b"\x03")
    time.sleep(0.5)
    assert processes_with(str(temp)) == engines != []
    output, errors = process.communicate(timeout=20)
    os.close(master)
    assert (process.returncode, output, errors) == (0, "1\n", "")
    assert_nothing_left(temp)


@pytest.mark.require("userfaultfd-move", "root")
def test_ended_while_the_engine_starts(temp: Path, ledger: Ledger) -> None:
    process = start(ledger, "sh", "-c", "echo started", ready=False)
    deadline = time.monotonic() + 20
    while not processes_with(str(temp)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    # Either the engine was not ready yet, or the command had just begun and got the signal itself.
    assert process.returncode == -signal.SIGTERM
    assert output in ("", "started\n")
    assert_nothing_left(temp)


@pytest.mark.require("userfaultfd-move", "root")
def test_engine_ends_with_a_wrapper_that_is_killed(temp: Path, ledger: Ledger) -> None:
    process = start(ledger, "sh", "-c", "echo ready; exec sleep 30")
    engines = processes_with(str(temp))
    assert len(engines) == 1
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    command = next(int(child) for child in children if int(child) not in engines)
    ledger.add_process(command)
    process.kill()
    process.wait(10)
    assert_nothing_left(temp, 15)
    assert Path(f"/proc/{command}/comm").read_text() == "sleep\n"  # the command goes on alone


@pytest.mark.require("userfaultfd-move", "root")
def test_command_goes_on_when_its_engine_is_killed(temp: Path, ledger: Ledger) -> None:
    process = start(ledger, "sh", "-c", "echo ready; sleep 1; exit 6")
    (engine,) = processes_with(str(temp))
    os.kill(engine, signal.SIGKILL)
    assert process.wait(20) == 6
    assert_nothing_left(temp)


@pytest.mark.require("userfaultfd-move", "root")
def test_wrapped_commands_inside_share_the_engine(temp: Path) -> None:
    inner = " ".join([*UDEDUP, "run", "sh", "-c", "'echo $UDEDUP_SOCKET'"])
    done = udedup("run", "sh", "-c", f"echo $UDEDUP_SOCKET; {inner}")
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith(str(temp))
    assert_nothing_left(temp)


@pytest.mark.require("userfaultfd-move", "root")
def test_engine_that_cannot_start_is_told_and_ends_the_matter(temp: Path) -> None:
    """The private socket's path is too long for AF_UNIX (unix(7): 108 bytes), so the engine can't serve."""
    folder = temp / ("x" * 120)
    folder.mkdir()
    done = udedup("run", "sh", "-c", "echo never", env={**os.environ, "TMPDIR": str(folder)})
    assert done.returncode == 1
    assert done.stdout == ""
    assert all(line.startswith("udedup: ") for line in done.stderr.splitlines())
    assert list(folder.iterdir()) == []


# ---- with an engine that runs ----


@pytest.mark.require("userfaultfd-move", "root")
def test_wrapper_becomes_the_command(engine: Engine) -> None:
    process = engine.wrap("sh", "-c", "echo $$; exec sleep 0.2", stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=20)
    assert output == f"{process.pid}\n"
    assert process.returncode == 0


@pytest.mark.require("userfaultfd-move", "root")
def test_signals_of_the_command_are_as_unwrapped(engine: Engine) -> None:
    program = "grep -E '^Sig(Blk|Ign)' /proc/self/status"
    plain = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True)
    wrapped = engine.wrap("sh", "-c", program, stdout=subprocess.PIPE, text=True)
    assert wrapped.communicate(timeout=20)[0] == plain.stdout


@pytest.mark.require("userfaultfd-move", "root")
def test_domains_root_may_choose(engine: Engine) -> None:
    process = engine.wrap("sh", "-c", "echo $UDEDUP_DOMAIN", domain="blue", stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=20)[0] == "blue\n"
    assert process.returncode == 0


TWICE = """
import mmap, sys
content = open(sys.argv[1], "rb").read()
twice = [mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
for memory in twice:
    memory[:] = content
sys.stdin.readline()
sys.exit(any(memory[:] != content for memory in twice))
"""


@pytest.mark.require("userfaultfd-move", "root")
def test_private_programs_share_with_themselves_only(engine: Engine, tmp_path: Path) -> None:
    """Two programs with the same 300 pages, each of them twice: two stores with one copy each."""
    content = tmp_path / "content"
    content.write_bytes(os.urandom(300 * 4096))
    options = {"domain": "private", "stdin": subprocess.PIPE}
    programs = [engine.wrap(sys.executable, "-c", TWICE, content, **options) for _ in range(2)]

    def merged(status: dict[str, Any]) -> bool:
        return [agent["pages_sharing"] >= 600 for agent in status["agents"]] == [True, True]

    status = engine.wait_until("merged", merged)
    assert status["pages_shared"] >= 600
    assert {agent["domain"] for agent in status["agents"]} == {"private"}
    for program in programs:
        program.communicate(b"\n", timeout=20)
        assert program.returncode == 0


@pytest.mark.require("userfaultfd-move", "root")
def test_domain_not_allowed_is_one_line(engine_factory: Callable[..., Engine]) -> None:
    """Another user may take only the labels the engine's configuration gives it."""
    engine = engine_factory("--socket-mode", "666", "--allow-domain", "65534:green", mount=False)
    open_way(engine.socket.parent)

    def run(label: str) -> "subprocess.CompletedProcess[str]":
        command = [*as_nobody(), *UDEDUP, "run", "--socket", str(engine.socket), "--domain", label, "--", "echo", "in"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    refused = run("red")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("udedup: domain label 'red' is not allowed for uid 65534")
    assert refused.stderr.count("\n") == 1
    allowed = run("green")
    assert (allowed.returncode, allowed.stdout, allowed.stderr) == (0, "in\n", "")
