"""What a running engine keeps of its rights, seen from outside, and that it can still do what it has to."""

import json
import mmap
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.engine import UDEDUP, Engine, read_line
from support.ledger import Ledger, mounted
from support.users import NOBODY, as_nobody, open_way

from udedup.engine.privileges import KEPT, Privileges, kept

pytestmark = pytest.mark.require("userfaultfd-move", "root")
README = Path(__file__).parent.parent.parent / "README.md"
LINUX_CAPABILITY_H = Path("/usr/include/linux/capability.h")


def privileges(pid: int) -> set[Privileges]:
    """Of all threads."""
    return {Privileges.of(task / "status") for task in Path(f"/proc/{pid}/task").iterdir()}


def mask(*, mount: bool) -> int:
    """What is documented, as far as this test itself has it."""
    documented = sum(1 << capability.number for capability in kept(mount=mount))
    return documented & Privileges.of(Path("/proc/self/status")).permitted


def test_numbers_are_the_kernels() -> None:
    numbers = dict(line.split()[1:3] for line in LINUX_CAPABILITY_H.read_text().splitlines() if "#define CAP_" in line)
    assert {capability.name.upper(): str(capability.number) for capability in KEPT}.items() <= numbers.items()


def test_readme_names_what_is_kept() -> None:
    rows = [line.split("|")[1:3] for line in README.read_text().splitlines() if line.startswith("| CAP_")]
    documented = {name.strip().lower(): "only with `--mount`" in purpose for name, purpose in rows}
    assert documented == {capability.name: capability.mount_only for capability in KEPT}


@pytest.mark.require("fuse")
@pytest.mark.parametrize("mount", [False, True])
def test_what_is_documented_is_kept_and_nothing_else(engine_factory: Callable[..., Engine], mount: bool) -> None:
    engine = engine_factory("--log-level", "debug", mount=mount)
    engine.status()  # brings worker threads to life
    expected = mask(mount=mount)
    assert privileges(engine.pid) == {Privileges(expected, expected, 0, expected, True)}
    assert "kept " + ", ".join(c.name for c in KEPT if expected >> c.number & 1) in engine.log.read_text()
    assert (engine.mount in mounted()) is mount
    assert engine.stop(signal.SIGTERM) == 0
    assert engine.mount not in mounted()
    assert not engine.socket.exists()


@pytest.mark.require("fuse")
def test_images_of_others_are_added(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    """Root can name a file that belongs to a guest's user, who keeps it to himself."""
    engine = engine_factory()
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(8192))
    os.chown(disk, NOBODY, NOBODY)
    disk.chmod(0o600)
    assert engine.command("mount", disk).returncode == 0
    assert engine.mount is not None
    assert (engine.mount / "disk.img").read_bytes() == disk.read_bytes()


@pytest.mark.require("fuse")
def test_others_are_let_in_only_if_told_so(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    """Into the mount, where they may read what they may read anyway, and to the socket."""
    public, secret = tmp_path / "public", tmp_path / "secret"
    for disk, mode in ((public, 0o644), (secret, 0o600)):
        disk.write_bytes(os.urandom(8192))
        disk.chmod(mode)
    images = {"public": public, "secret": secret}
    closed, opened = (
        engine_factory(images=images),
        engine_factory("--allow-other", "--socket-mode", "666", images=images),
    )
    for engine in (closed, opened):
        open_way(engine.socket.parent)
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]

    def reads(engine: Engine, name: str) -> bool:
        assert engine.mount is not None
        done = subprocess.run([*drop, "cat", str(engine.mount / name)], capture_output=True, check=False)
        return done.stdout == images[name].read_bytes()

    def status(engine: Engine) -> int:
        asked = [*as_nobody(), *UDEDUP, "status", "--socket", str(engine.socket)]
        return subprocess.run(asked, capture_output=True, check=False).returncode

    assert [reads(closed, name) for name in images] == [False, False]
    assert [reads(opened, name) for name in images] == [True, False]
    assert [status(closed), status(opened)] == [1, 0]


def test_map_limit_is_put_back(engine_factory: Callable[..., Engine]) -> None:
    setting = Path("/proc/sys/vm/max_map_count")
    before = int(setting.read_text())
    engine = engine_factory("--max-map-count", str(before + 1), mount=False)
    try:
        assert int(setting.read_text()) == before + 1
        assert engine.stop() == 0
        assert int(setting.read_text()) == before
    finally:
        setting.write_text(f"{before}\n")


def test_engine_of_root_sees_the_memory_of_others(engine_factory: Callable[..., Engine]) -> None:
    """The kernel's numbers of a wrapped process that is another user's."""
    engine = engine_factory("--socket-mode", "666", "--sleep-millisecs", "0", mount=False)
    open_way(engine.socket.parent)
    holders = [engine.wrap(*as_nobody(), "sh", "-c", "read line", stdin=subprocess.PIPE) for _ in range(2)]

    def seen(status: dict[str, Any]) -> bool:
        # They join before and after each `exec`; between these they are nobody's.
        agents = [(agent["uid"], agent["command"]) for agent in status["agents"]]
        return agents == [(NOBODY, "sh -c read line")] * 2 and status["kernel"]["unreadable"] == 0

    status = engine.wait_until("two agents of uid 65534, with their memory", seen)
    assert status["kernel"]["pss_bytes"] > status["memory"]["engine"]
    for holder in holders:
        holder.communicate(b"\n", timeout=20)


# ---- an ordinary user's engine ----


def with_open_userfaultfd(tmp_path: Path) -> list[str]:
    """A command that runs another where every user may open /dev/userfaultfd, in a mount namespace of its own."""
    number = Path("/dev/userfaultfd").stat().st_rdev
    device = tmp_path / "userfaultfd"
    make = f"mknod -m 666 {device} c {os.major(number)} {os.minor(number)}"
    script = f'{make} && mount --bind {device} /dev/userfaultfd && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


@pytest.fixture
def namespace(tmp_path: Path) -> list[str]:
    if not Path("/dev/userfaultfd").exists():
        pytest.skip("this kernel has no /dev/userfaultfd")
    command = with_open_userfaultfd(tmp_path)
    check = "import os; os.open('/dev/userfaultfd', os.O_RDWR)"
    tried = subprocess.run(
        [*command, *as_nobody(), UDEDUP[0], "-c", check], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"no device of another mode can be made here: {tried.stderr.splitlines()[-1]}")
    (tmp_path / "userfaultfd").unlink()
    return command


@pytest.fixture
def unprivileged() -> Iterator[None]:
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd")
    before = setting.read_text()
    setting.write_text("1")
    yield
    setting.write_text(before)


@pytest.mark.usefixtures("unprivileged")
def test_an_ordinary_users_engine_serves_its_processes_without_the_device(tmp_path: Path, ledger: Ledger) -> None:
    """Nor does it warn of a device that nobody needs."""
    serves_its_processes(tmp_path, [], ledger)
    assert "userfaultfd" not in (tmp_path / "log").read_text()


def test_an_ordinary_users_engine_serves_its_processes(
    tmp_path: Path, namespace: Sequence[str], ledger: Ledger
) -> None:
    serves_its_processes(tmp_path, namespace, ledger)


def serves_its_processes(tmp_path: Path, namespace: Sequence[str], ledger: Ledger) -> None:
    """Where the system lets it: it keeps no capability at all, and two of its programs share their memory."""
    folder = tmp_path / "mine"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    open_way(tmp_path)
    shared = folder / "content"
    shared.write_bytes(os.urandom(200 * mmap.PAGESIZE))
    become = [*namespace, *as_nobody()]
    command = [*become, *UDEDUP, "engine", "--socket", str(folder / "socket"), "--sleep-millisecs", "0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("UDEDUP", "XDG"))}
    with (tmp_path / "log").open("w") as log:
        engine = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    ledger.add_process(engine.pid)
    assert engine.stdout is not None
    assert read_line(engine.stdout, 30).startswith("ready "), (tmp_path / "log").read_text()
    found = privileges(engine.pid)
    assert {(p.effective, p.permitted, p.inheritable, p.no_new_privs) for p in found} == {(0, 0, 0, True)}
    assert (folder / "socket").stat().st_mode & 0o777 == 0o600

    holder = "import sys; content = open(sys.argv[1], 'rb').read(); print(flush=True); sys.stdin.readline()"
    program = [*UDEDUP, "run", "--socket", str(folder / "socket"), "--", UDEDUP[0], "-c", holder, str(shared)]
    programs = []
    for _ in range(2):
        (tmp_path / "userfaultfd").unlink(missing_ok=True)
        programs.append(
            subprocess.Popen([*become, *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        )
        ledger.add_process(programs[-1].pid)
        assert programs[-1].stdout is not None
        programs[-1].stdout.readline()
    wrapped = Engine(engine, folder / "socket", None, tmp_path / "log", ledger)
    wrapped.wait_until("sharing", lambda status: status["pages_sharing"] >= 200)
    for process in programs:
        process.communicate(b"\n", timeout=20)
        assert process.returncode == 0
    assert wrapped.stop() == 0
    engine.stdout.close()


def test_doctor_finds_an_open_device_good(tmp_path: Path, namespace: Sequence[str]) -> None:
    """And says without it what to do (see test_host)."""
    done = subprocess.run(
        [*namespace, *as_nobody(), *UDEDUP, "doctor", "--json"], capture_output=True, text=True, check=False
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["userfaultfd"]["passed"]
