"""The unit files against the engine they start, and an engine with the test in systemd's place."""

import configparser
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.test_metrics import UnixConnection, scrape
from support.engine import END_SECONDS, UDEDUP, Engine, read_line, udedup
from support.ledger import Ledger, mounted

import udedup as package
from udedup.engine.privileges import KEPT
from udedup.places import SYSTEM_SOCKET

UNITS = Path(package.__file__).parent / "systemd"
README = Path(__file__).parent.parent.parent / "README.md"
SERVICE, SOCKET = UNITS / "udedup.service", UNITS / "udedup.socket"


def directives(unit: Path) -> dict[str, list[str]]:
    """All values of each directive, in order."""
    return directives_of(unit.read_text())


def directives_of(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_units_are_what_systemd_reads() -> None:
    for unit in (SERVICE, SOCKET):
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.read_string(unit.read_text())
        assert "Install" in parser.sections()


def test_capabilities_are_those_the_engine_keeps() -> None:
    service = directives(SERVICE)
    assert service["CapabilityBoundingSet"] == [" ".join(capability.name.upper() for capability in KEPT)]
    assert service["NoNewPrivileges"] == ["yes"]
    assert "AmbientCapabilities" not in service


NEED_A_MOUNT_NAMESPACE = (
    "BindPaths BindReadOnlyPaths ExecPaths InaccessiblePaths MountAPIVFS MountFlags NoExecPaths PrivateDevices "
    "PrivateIPC PrivateMounts PrivateTmp PrivateUsers ProcSubset ProtectControlGroups ProtectHome ProtectKernelLogs "
    "ProtectKernelModules ProtectKernelTunables ProtectProc ProtectSystem ReadOnlyPaths ReadWritePaths RootDirectory "
    "RootImage TemporaryFileSystem DynamicUser"
)
"""systemd.exec(5): what a service mounts is then seen by nobody else."""


def test_the_mount_is_seen_by_all() -> None:
    assert directives(SERVICE).keys().isdisjoint(NEED_A_MOUNT_NAMESPACE.split())


def test_socket_is_the_default_one_and_closed_to_others() -> None:
    assert directives(SOCKET)["ListenSequentialPacket"] == [str(SYSTEM_SOCKET)]
    assert directives(SOCKET)["SocketMode"] == ["0600"]
    assert directives(SERVICE)["Type"] == ["notify"]
    assert int(directives(SERVICE)["WatchdogSec"][0]) > 0


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as an administrator has them: with the engine of this very project."""
    text = SERVICE.read_text().replace("ExecStart=udedup ", f"ExecStart={Path(sys.executable).parent / 'udedup'} ")
    (tmp_path / SERVICE.name).write_text(text)
    shutil.copy(SOCKET, tmp_path)
    return tmp_path / SERVICE.name


@pytest.mark.require("systemd")
def test_systemd_finds_nothing_wrong(installed: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(installed)], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "udedup" in line]
    assert ours == []


@pytest.mark.require("systemd")
def test_systemd_rates_the_sandbox(installed: Path) -> None:
    """Without mount namespaces a service can't be rated as fully protected; below 5 is its "medium" at worst."""
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=50", "--no-pager", str(installed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.require("systemd")
def test_a_place_for_the_mount(tmp_path: Path) -> None:
    subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", UNITS / "tmpfiles.conf"], check=True, capture_output=True
    )
    place = tmp_path / "run" / "udedup" / "disks"
    assert (place.is_dir(), place.stat().st_mode & 0o777, list(place.iterdir())) == (True, 0o755, [])


def drop_in() -> str:
    """What the README has an administrator put beside a unit of theirs."""
    found = re.search(r"```ini\n(.*?)```", README.read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.require("systemd")
def test_a_service_is_wrapped_by_a_drop_in(tmp_path: Path) -> None:
    """systemd takes it, and the command that it then starts is the wrapped one alone."""
    (tmp_path / "own.service").write_text("[Service]\nExecStart=/bin/false\n")
    folder = tmp_path / "own.service.d"
    folder.mkdir()
    wrapped = drop_in().replace("/usr/bin/redis-server /etc/redis/redis.conf", "/bin/true")
    (folder / "udedup.conf").write_text(wrapped.replace("/usr/bin/udedup", str(Path(sys.executable).parent / "udedup")))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "own.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "own.service" in line] == []
    assert directives(folder / "udedup.conf")["ExecStart"][0] == ""


@pytest.mark.require("systemd", "userfaultfd-move", "root")
def test_the_wrapped_program_is_the_main_process(tmp_path: Path, engine: Engine) -> None:
    """As the manager starts it, with the words of the drop-in and next to nothing in the environment."""
    words = directives_of(drop_in())["ExecStart"][1].split()
    assert words[:3] == ["/usr/bin/udedup", "run", "--"]
    script = "import os; print(os.getpid(), 'libudedup.so' in open('/proc/self/maps').read())"
    command = [*UDEDUP, *words[1:2], "--socket", str(engine.socket), *words[2:3], sys.executable, "-c", script]
    process = subprocess.Popen(command, env={"PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=30)
    assert output == f"{process.pid} True\n"


# ---- what the unit lets an engine do, against what it does ----


def allowed_system_calls() -> set[str]:
    """Those of the unit's filter, its groups resolved by systemd itself."""
    allowed: set[str] = set()
    todo = [*directives(SERVICE)["SystemCallFilter"][0].split(), "@default"]
    while todo:
        name = todo.pop()
        if not name.startswith("@"):
            allowed.add(name)
            continue
        listing = subprocess.run(
            ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
        )
        todo += [line.strip() for line in listing.stdout.splitlines()[1:] if line.strip() and "# " not in line]
    return allowed


CALL = re.compile(r"^\d+ +(\w+)\((.*)")


@pytest.mark.require("systemd", "strace", "fuse", "userfaultfd-move", "root")
def test_the_engine_does_nothing_that_the_unit_forbids(tmp_path: Path, ledger: Ledger) -> None:
    """From its start to its end, with a mount, agents and control clients; what it starts itself included."""
    trace, place, disk = tmp_path / "trace", tmp_path / "place", tmp_path / "disk"
    place.mkdir()
    ledger.add_mount(place)
    disk.write_bytes(os.urandom(1 << 20))
    path = str(tmp_path / "socket")
    options = ["--socket", path, "--mount", str(place), "--image", f"disk={disk}", "--sleep-millisecs", "0"]
    options += ["--metrics", str(tmp_path / "metrics")]
    process = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", str(trace), *UDEDUP, "engine", *options], stdout=subprocess.PIPE, text=True
    )
    ledger.add_process(process.pid)
    assert process.stdout is not None
    assert read_line(process.stdout, 60).startswith("ready ")
    pid = int(trace.read_text().split(maxsplit=1)[0])
    ledger.add_process(pid)
    hold = "import sys; content = open(sys.argv[1], 'rb').read(); import time; time.sleep(1)"
    command = [*UDEDUP, "run", "--socket", path, "--", sys.executable, "-c", hold, str(place / "disk")]
    programs = [subprocess.Popen(command) for _ in range(2)]
    assert json.loads(udedup("status", "--socket", path, "--json").stdout)["images"]
    assert udedup("mount", "--socket", path, f"again={disk}").returncode == 0
    assert "udedup_engine_info" in scrape(UnixConnection(tmp_path / "metrics"))
    os.kill(pid, signal.SIGHUP)
    assert [program.wait(30) for program in programs] == [0, 0]
    os.kill(pid, signal.SIGTERM)
    assert process.wait(END_SECONDS) == 0
    process.stdout.close()
    assert place not in mounted()

    calls = [match for match in map(CALL.match, trace.read_text(errors="replace").splitlines()) if match]
    names = {call[1] for call in calls}
    assert {"mount", "umount2", "memfd_create", "sendmsg"} <= names
    assert names - allowed_system_calls() == set()
    assert {call[2].split(",")[0] for call in calls if call[1] == "socket"} == {"AF_UNIX"}
    executable = [call[0] for call in calls if "PROT_WRITE|PROT_EXEC" in call[2] or is_mprotect_exec(call)]
    assert executable == []
    assert [call[0] for call in calls if call[1] in ("clone", "clone3", "unshare") and "CLONE_NEW" in call[2]] == []


def is_mprotect_exec(call: re.Match[str]) -> bool:
    return call[1] == "mprotect" and "PROT_EXEC" in call[2]


# ---- activation, news, watchdog ----


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(30)
        yield sock


@pytest.mark.require("userfaultfd-move", "root")
def test_an_engine_under_systemd(tmp_path: Path, manager: socket.socket, ledger: Ledger) -> None:
    """It serves on the given socket, clients that were there before it included, and leaves the file alone."""
    path = tmp_path / "given"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        early = subprocess.Popen([*UDEDUP, "status", "--json", "--socket", str(path)], stdout=subprocess.PIPE)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "udedup.socket",
            "WATCHDOG_USEC": "400000",
        }
        given = listener.fileno()
        redirect = f"exec 3<&{given}; " if given != 3 else ""
        script = f'{redirect}export LISTEN_PID=$$ WATCHDOG_PID=$$; exec "$@"'
        command = ["bash", "-c", script, "bash", *UDEDUP, "engine", "--socket", str(tmp_path / "other")]
        process = subprocess.Popen(
            command, env=environment, pass_fds=[given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    ledger.add_process(process.pid)
    assert manager.recv(100) == b"READY=1"
    began = time.monotonic()
    assert [manager.recv(100) for _ in range(5)] == [b"WATCHDOG=1"] * 5
    assert 0.6 <= time.monotonic() - began < 5
    output, _ = early.communicate(timeout=20)
    assert json.loads(output)["socket"] == str(path)
    process.terminate()
    out, errors = process.communicate(timeout=END_SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert out == f"ready socket={path} mount=\n"
    manager.setblocking(False)
    rest = []
    while not rest or rest[-1] != b"STOPPING=1":
        rest.append(manager.recv(100))
    assert path.exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.require("userfaultfd-move", "root")
def test_the_manager_hears_of_a_reload(tmp_path: Path, manager: socket.socket, ledger: Ledger) -> None:
    """What ExecReload does; the file is read before anything else is said (sd_notify(3))."""
    assert directives(SERVICE)["ExecReload"] == ["kill -HUP $MAINPID"]
    file = tmp_path / "udedup.toml"
    file.write_text("[limits]\npages-to-scan = 7\n")
    file.chmod(0o644)
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    path = tmp_path / "socket"
    process = subprocess.Popen(
        [*UDEDUP, "engine", "--socket", str(path), "--config", str(file)], env=environment, stdout=subprocess.DEVNULL
    )
    ledger.add_process(process.pid)
    assert manager.recv(100) == b"READY=1"
    file.write_text("[limits]\npages-to-scan = 8\n")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    process.send_signal(signal.SIGHUP)
    word, _, stamp = manager.recv(100).decode().partition("\nMONOTONIC_USEC=")
    assert word == "RELOADING=1"
    assert int(stamp) >= before
    assert manager.recv(100) == b"READY=1"
    assert json.loads(udedup("status", "--socket", path, "--json").stdout)["pages_to_scan"] == 8
    process.terminate()
    assert process.wait(END_SECONDS) == 0


@pytest.mark.require("userfaultfd-move", "root")
def test_a_stopped_engine_shows_no_life(tmp_path: Path, manager: socket.socket, ledger: Ledger) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    process = subprocess.Popen(
        [*UDEDUP, "engine", "--socket", str(tmp_path / "socket")], env=environment, stdout=subprocess.DEVNULL
    )
    ledger.add_process(process.pid)
    assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
    process.send_signal(signal.SIGSTOP)
    manager.settimeout(0.2)
    signs = 0
    while sign(manager):
        signs += 1
    assert signs <= 5
    time.sleep(1)
    assert not sign(manager)
    process.send_signal(signal.SIGCONT)
    manager.settimeout(30)
    assert manager.recv(100) == b"WATCHDOG=1"
    process.terminate()
    assert process.wait(END_SECONDS) == 0


def sign(manager: socket.socket) -> bool:
    """Whether there is a sign of life."""
    try:
        return manager.recv(100) == b"WATCHDOG=1"
    except TimeoutError:
        return False


@pytest.mark.require("userfaultfd-move", "root")
def test_bad_activation_is_one_line(tmp_path: Path) -> None:
    script = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3</dev/null'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *UDEDUP, "engine", "--socket", str(tmp_path / "socket")],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("udedup: socket activation: descriptor 3 is no socket")
    assert done.stderr.count("\n") == 1
