"""``udedup engine`` and what talks to it: start, end, and every refusal in one line with nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import UDEDUP, Engine, udedup
from support.ledger import Ledger, mounted

pytestmark = pytest.mark.require("userfaultfd-move", "root")
MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MEGABYTE))
    return path


@pytest.fixture
def place(tmp_path: Path, ledger: Ledger) -> Path:
    """A directory to mount on."""
    folder = tmp_path / "place"
    folder.mkdir()
    ledger.add_mount(folder)
    return folder


def assert_refused(done: "subprocess.CompletedProcess[str]", *texts: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("udedup: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(text in done.stderr for text in texts), done.stderr


# ---- life and end ----


@pytest.mark.require("fuse")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_and_ends_in_order(engine_factory: Callable[..., Engine], disk: Path, number: signal.Signals) -> None:
    engine = engine_factory(images={"one": disk})
    assert engine.mount is not None
    assert engine.mount in mounted()
    assert (engine.mount / "one").read_bytes() == disk.read_bytes()
    assert engine.stop(number) == 0
    assert engine.mount not in mounted()
    assert not engine.socket.exists()
    assert engine.log.read_text() == ""


@pytest.mark.require("fuse")
def test_ready_line_names_socket_and_mount(tmp_path: Path, place: Path, ledger: Ledger) -> None:
    command = [*UDEDUP, "engine", "--socket", str(tmp_path / "socket"), "--mount", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ledger.add_process(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready socket={tmp_path / 'socket'} mount={place}\n"
        process.terminate()
        assert process.wait(20) == 0
        assert process.stdout.read() == ""


def test_ends_although_signals_were_blocked_by_its_parent(tmp_path: Path, ledger: Ledger) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        process = subprocess.Popen(
            [*UDEDUP, "engine", "--socket", str(tmp_path / "socket")], stdout=subprocess.PIPE, text=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        ledger.add_process(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        process.terminate()
        assert process.wait(20) == 0


def test_engine_for_a_process_that_is_gone_does_not_start(tmp_path: Path) -> None:
    assert_refused(udedup("engine", "--socket", tmp_path / "socket", "--parent", "1"), "1 that wanted this engine")
    assert not (tmp_path / "socket").exists()


# ---- sockets ----


def test_second_engine_on_one_socket(engine_factory: Callable[..., Engine]) -> None:
    engine = engine_factory(mount=False)
    assert_refused(udedup("engine", "--socket", engine.socket), str(engine.socket), "runs on")
    assert engine.status()["agents"] == []


def test_socket_left_by_a_killed_engine_is_replaced(engine_factory: Callable[..., Engine], ledger: Ledger) -> None:
    engine = engine_factory(mount=False)
    engine.process.kill()
    engine.process.wait(10)
    assert engine.socket.exists()
    with subprocess.Popen([*UDEDUP, "engine", "--socket", str(engine.socket)], stdout=subprocess.PIPE) as second:
        ledger.add_process(second.pid)
        assert second.stdout is not None
        assert second.stdout.readline().startswith(b"ready ")
        second.terminate()


def test_socket_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
        theirs.bind(str(path))
        os.chown(path, 65534, 65534)
        assert_refused(udedup("engine", "--socket", path), str(path), "65534")
    assert path.is_socket()


def test_socket_path_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    assert_refused(udedup("engine", "--socket", path), str(path))
    assert path.read_text() == "precious"


def test_socket_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(udedup("engine", "--socket", tmp_path / "none" / "socket"), str(tmp_path / "none"))


def test_socket_path_too_long(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    assert_refused(udedup("engine", "--socket", folder / "socket"), str(folder))
    assert list(folder.iterdir()) == []


# ---- mounts and images ----


@pytest.mark.require("fuse")
def test_mount_point_in_use(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    engine = engine_factory()
    assert engine.mount is not None
    assert_refused(udedup("engine", "--socket", tmp_path / "other", "--mount", engine.mount), str(engine.mount))
    assert not (tmp_path / "other").exists()
    assert engine.mount in mounted()


@pytest.mark.require("fuse")
def test_mount_point_of_another_file_system(tmp_path: Path, place: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
    (place / "precious").touch()
    assert_refused(udedup("engine", "--socket", tmp_path / "socket", "--mount", place), str(place))
    assert (place / "precious").exists()
    assert not (tmp_path / "socket").exists()


@pytest.mark.require("fuse")
@pytest.mark.parametrize("kind", ["missing", "file"])
def test_mount_point_that_is_no_directory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.touch()
    assert_refused(udedup("engine", "--socket", tmp_path / "socket", "--mount", path), str(path))
    assert not (tmp_path / "socket").exists()


def bad_image(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "unreadable":
        path.write_bytes(b"x" * 4096)
        path.chmod(0)
    elif kind == "fifo":
        os.mkfifo(path)
    return path


BAD_IMAGES = ["missing", "directory", "unreadable", "fifo"]

# Root without the right to pass over permissions: such a root can't read a file of mode 000.
WITHOUT_OVERRIDE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.require("fuse")
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_at_the_start(tmp_path: Path, place: Path, kind: str) -> None:
    image = bad_image(tmp_path, kind)
    arguments = ["engine", "--socket", str(tmp_path / "socket"), "--mount", str(place), "--image", str(image)]
    command = [*WITHOUT_OVERRIDE, *UDEDUP, *arguments]
    assert_refused(subprocess.run(command, capture_output=True, text=True, check=False, timeout=30), str(image))
    assert not (tmp_path / "socket").exists()
    assert place not in mounted()


@pytest.mark.require("fuse")
@pytest.mark.parametrize("kind", [kind for kind in BAD_IMAGES if kind != "unreadable"])
def test_bad_image_later(engine_factory: Callable[..., Engine], disk: Path, tmp_path: Path, kind: str) -> None:
    engine = engine_factory(images={"one": disk})
    image = bad_image(tmp_path, kind)
    assert_refused(engine.command("mount", image), str(image))
    assert [found["name"] for found in engine.status()["images"]] == ["one"]


@pytest.mark.require("fuse")
@pytest.mark.parametrize("how", ["truncated", "replaced", "written"])
def test_image_that_changes(engine_factory: Callable[..., Engine], disk: Path, how: str) -> None:
    """What is read is what the file held when it was added, or holds now, or an error; the others are served on."""
    other = disk.with_name("other.img")
    other.write_bytes(os.urandom(MEGABYTE))
    engine = engine_factory(images={"one": disk, "two": other})
    assert engine.mount is not None
    before = disk.read_bytes()
    if how == "truncated":
        os.truncate(disk, 4096)
    elif how == "replaced":
        new = disk.with_name("new.img")
        new.write_bytes(os.urandom(MEGABYTE))
        new.rename(disk)
    else:
        with disk.open("r+b") as file:
            file.write(os.urandom(MEGABYTE))
    try:
        found = (engine.mount / "one").read_bytes()
    except OSError:
        found = None
    assert found in {"truncated": (None,), "replaced": (None, before), "written": (None, disk.read_bytes())}[how]
    assert (engine.mount / "two").read_bytes() == other.read_bytes()
    assert engine.process.poll() is None


@pytest.mark.require("fuse")
def test_images_are_added_while_it_runs(engine_factory: Callable[..., Engine], disk: Path) -> None:
    engine = engine_factory()
    assert engine.mount is not None
    done = engine.command("mount", disk, "--image", f"again={disk}")
    assert (done.returncode, done.stdout) == (0, f"{engine.mount / 'disk.img'}\n{engine.mount / 'again'}\n")
    assert (engine.mount / "again").read_bytes() == disk.read_bytes()
    assert_refused(engine.command("mount", f"again={disk}"), "again")


@pytest.mark.require("fuse")
def test_images_are_taken_out(engine_factory: Callable[..., Engine], disk: Path) -> None:
    """By name, by path in the mount, by the image's own path; not while somebody reads."""
    engine = engine_factory(images={"one": disk, "two": disk})
    assert engine.mount is not None
    with (engine.mount / "one").open("rb"):
        done = engine.command("umount", "one")
        assert_refused(done, f"process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})")
        assert engine.command("umount", "--image", "two").returncode == 0
    assert (engine.mount / "one").exists()
    assert not (engine.mount / "two").exists()
    assert engine.command("umount", engine.mount / "one").returncode == 0
    assert engine.command("mount", disk).returncode == 0
    assert engine.command("umount", os.path.relpath(disk)).returncode == 0
    assert list(engine.mount.iterdir()) == []
    assert_refused(engine.command("umount", "one"), "not in the mount")


@pytest.mark.require("fuse", "qemu-utils")
def test_qcow2_with_a_backing_file_elsewhere(engine_factory: Callable[..., Engine], disk: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tops"
    folder.mkdir()
    for name in ("a", "b"):
        path = folder / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", path], check=True)
    assert_refused(engine_factory().command("mount", folder / "a.qcow2"), "--allow-backing")
    engine = engine_factory("--allow-backing", str(disk.parent), "--image", str(folder / "a.qcow2"))
    assert engine.mount is not None
    done = engine.command("mount", folder / "b.qcow2")
    assert (done.returncode, done.stdout) == (0, f"{engine.mount / 'b.raw'}\n")
    for name in ("a.raw", "b.raw"):
        assert (engine.mount / name).read_bytes() == disk.read_bytes()
    assert {image["format"] for image in engine.status()["images"]} == {"qcow2"}


@pytest.mark.require("fuse", "qemu-utils")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_helpers_end_with_the_engine(
    engine_factory: Callable[..., Engine], disk: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "disk.vmdk"
    subprocess.run(["qemu-img", "convert", "-O", "vmdk", disk, path], check=True)
    engine = engine_factory(images={"disk": path})
    assert engine.mount is not None
    assert (engine.mount / "disk").read_bytes()[: disk.stat().st_size] == disk.read_bytes()
    (helper,) = [process for process in Path("/proc").glob("[0-9]*") if is_helper_of(engine.pid, process)]
    engine.stop(number)
    deadline = time.monotonic() + 10
    while (helper / "exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_helper_of(engine: int, process: Path) -> bool:
    try:
        text = (process / "stat").read_text()
    except OSError:
        return False
    return text.split("(")[1].startswith("qemu-nbd)") and int(text.rpartition(")")[2].split()[1]) == engine


def test_no_mount_to_show_images_in(engine_factory: Callable[..., Engine], disk: Path) -> None:
    assert_refused(engine_factory(mount=False).command("mount", disk), "--mount")


# ---- what it tells ----

TOTALS = {
    *("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "pages_scanned", "full_scans", "zero_pages"),
    *("bytes_saved", "general_profit", "hints", "merges", "breaks", "lead_time_seconds", "cpu_seconds", "store"),
    *("agents", "images"),
}
HOLD = """
import random, sys
held = bytearray(random.Random(5).randbytes(8 << 20))
print('ready', flush=True)
sys.stdin.readline()
print(held == random.Random(5).randbytes(8 << 20))
"""


def test_status_has_the_promised_names(engine: Engine) -> None:
    status = engine.status()
    assert set(status) >= TOTALS
    assert set(status["hints"]) >= {"place", "content", "dropped", "visited", "merged"}
    assert set(status["merges"]) >= {"pages", "runs", "mismatch", "busy", "gone", "no_vma"}
    assert set(status["breaks"]) >= {"pages", "events"}
    assert set(status["lead_time_seconds"]) == {"p50", "p90", "p99"}
    assert set(status["cpu_seconds"]) == {"engine", "agents"}
    assert set(status["store"]) >= {"segments", "bytes", "live_bytes"}


def test_programs_share_and_get_back_their_memory(engine: Engine) -> None:
    """Two wrapped programs with the same 8 MiB: shown in the status, both forms; given back; and still right."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    programs = [engine.wrap(sys.executable, "-c", HOLD, **options) for _ in range(2)]
    for program in programs:
        assert program.stdout.readline() == "ready\n"
    status = engine.wait_until("8 MiB saved", lambda status: status["bytes_saved"] >= 7 * MEGABYTE)
    agents = {agent["pid"]: agent for agent in status["agents"]}
    assert agents.keys() >= {program.pid for program in programs}
    for program in programs:
        agent = agents[program.pid]
        assert agent.keys() >= {"uid", "domain", "command", "runs", "vmas", "merging", "reason"}
        assert agent["pages_sharing"] >= 7 * MEGABYTE // 4096
        assert agent["uid"] == os.getuid()

    # What the engine counts, zero pages left out, is what the kernel counts. The two are not read in the same moment:
    # they agree once there is nothing left to merge.
    engine.wait_until(
        "agreement with the kernel",
        lambda status: abs(status["kernel"]["saved_bytes"] - 4096 * status["pages_sharing"]) < MEGABYTE,
    )

    table = engine.command("status")
    assert table.returncode == 0
    assert all(str(program.pid) in table.stdout for program in programs)
    assert "by the engine's account" in table.stdout
    assert "by the kernel's account" in table.stdout

    done = engine.command("unmerge", str(programs[0].pid))
    assert done.returncode == 0
    assert int(done.stdout.split()[0]) >= 7 * MEGABYTE // 4096
    found = {agent["pid"]: agent for agent in engine.status()["agents"]}
    assert found[programs[0].pid]["pages_sharing"] == 0
    assert not found[programs[0].pid]["merging"]
    assert engine.command("unmerge").returncode == 0
    assert engine.status()["pages_sharing"] == 0

    assert engine.command("unmerge", "--resume").returncode == 0
    engine.wait_until("8 MiB saved again", lambda status: status["bytes_saved"] >= 7 * MEGABYTE)
    for program in programs:
        output, _ = program.communicate("\n", timeout=30)
        assert output == "True\n"
        assert program.returncode == 0


@pytest.mark.parametrize("command", ["unmerge", "pause"])
def test_a_process_that_is_not_wrapped(engine: Engine, command: str) -> None:
    assert_refused(engine.command(command, str(os.getpid())), str(os.getpid()))


def test_pause(engine: Engine) -> None:
    program = engine.wrap(
        sys.executable, "-c", f"kept = bytes(range(256)) * 16 * ({MEGABYTE} // 4096); input()", stdin=subprocess.PIPE
    )
    engine.wait_until("merged", lambda status: any(agent["pages_sharing"] for agent in status["agents"]))
    done = engine.command("pause", str(program.pid))
    assert (done.returncode, done.stdout) == (0, "1 programs are paused\n")
    (agent,) = engine.status()["agents"]
    assert (agent["paused"], agent["merging"], agent["reason"]) == (True, False, "paused on request")
    assert agent["pages_sharing"] > 0
    assert engine.command("pause", "--resume").stdout == "1 programs may share memory again\n"
    (agent,) = engine.status()["agents"]
    assert (agent["paused"], agent["reason"]) == (False, "")
    assert engine.command("pause").stdout == "1 programs are paused\n"
    program.communicate(b"\n", timeout=30)


def test_reader_that_leaves_early_is_no_error_message(engine: Engine) -> None:
    command = " ".join([*UDEDUP, "status", "--json", "--socket", str(engine.socket)])
    done = subprocess.run(["sh", "-c", f"{command} | true"], capture_output=True, text=True, check=False, timeout=30)
    assert done.stderr == ""


def test_what_listens_is_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        assert_refused(udedup("status", "--socket", path), str(path))
        assert_refused(udedup("run", "--socket", path, "echo", "never"), str(path))


def test_json_status_is_the_engines_answer(engine: Engine) -> None:
    from udedup.engine.control import request

    shown = json.loads(engine.command("status", "--json").stdout)
    asked = request(engine.socket, {"op": "status"})
    assert shown.keys() == asked.keys()
    assert shown["socket"] == str(engine.socket)
