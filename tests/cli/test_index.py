"""``udedup index``, and what engines make of it: several on one host, with the same images."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import Engine, udedup
from support.users import NOBODY, as_nobody, open_way

from udedup.places import state_directory

MIB = 1 << 20
BLOCKS = MIB // 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """8 MiB and a bit, last changed a minute ago."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(8 * MIB + 100))
    then = path.stat().st_mtime_ns - 60 * 10**9
    os.utime(path, ns=(then, then))
    return path


def missing(disk: Path, *options: str | Path) -> int:
    """How many blocks there was still to digest."""
    done = udedup("index", *options, disk)
    assert (done.returncode, done.stderr) == (0, "")
    path, _, rest = done.stdout.partition(": ")
    assert path == str(disk)
    assert rest.endswith(" blocks digested\n")
    return int(rest.split()[0])


def test_digests_are_computed_once(disk: Path, tmp_path: Path) -> None:
    assert missing(disk, "--state-dir", tmp_path / "state") == 8 * BLOCKS
    assert missing(disk, "--state-dir", tmp_path / "state") == 0
    assert missing(disk, "--state-dir", tmp_path / "another") == 8 * BLOCKS
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "state").iterdir()] == [0o600]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("{place}/none.img",), "No such file"),
        (("{place}",), "is a directory"),
        (("--state-dir", "{place}/open", "{place}/disk.img"), "others may write to it"),
        (("--state-dir", "{place}/disk.img", "{place}/disk.img"), "can't be used"),
    ],
)
def test_refusals_are_one_line(disk: Path, tmp_path: Path, argv: tuple[str, ...], text: str) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    done = udedup("index", *(word.format(place=tmp_path) for word in argv))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("udedup: ")
    assert text in done.stderr


def test_place_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert state_directory() == Path("/var/lib/one")
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert state_directory() == Path("/var/lib/udedup")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/alice/state")
    assert state_directory() == Path("/home/alice/state/udedup")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/alice")
    assert state_directory() == Path("/home/alice/.local/state/udedup")


# ---- with engines ----


@pytest.mark.require("userfaultfd-move", "root", "fuse")
def test_what_an_engine_has_digested_is_kept(engine_factory: Callable[..., Engine], disk: Path, tmp_path: Path) -> None:
    """When an image is taken out of the mount, and when the engine ends."""
    state = tmp_path / "state"
    engine = engine_factory("--state-dir", str(state), images={"one": disk})
    assert engine.mount is not None
    with (engine.mount / "one").open("rb") as file:
        assert file.read(4 * MIB) == disk.read_bytes()[: 4 * MIB]
    assert engine.command("umount", "one").returncode == 0
    known = 8 * BLOCKS - missing(disk, "--state-dir", state)
    # Readahead goes further than the reader.
    assert 4 * BLOCKS <= known <= 8 * BLOCKS
    for file in state.iterdir():
        file.unlink()
    assert engine.command("mount", f"two={disk}").returncode == 0
    assert (engine.mount / "two").read_bytes() == disk.read_bytes()
    # The kernel tells of the closing later, but before it asks for this.
    assert [path.name for path in engine.mount.iterdir()] == ["two"]
    assert engine.stop() == 0
    assert missing(disk, "--state-dir", state) == 0
    assert engine.log.read_text() == ""


@pytest.mark.require("userfaultfd-move", "root", "fuse", "qemu-utils")
def test_several_engines_with_the_same_images(
    engine_factory: Callable[..., Engine], disk: Path, tmp_path: Path
) -> None:
    """One mount each, and one state directory for all of them and for ``udedup index``, at the same time."""
    qcow2 = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", qcow2], check=True)
    then = disk.stat().st_mtime_ns
    os.utime(qcow2, ns=(then, then))
    state = str(tmp_path / "state")
    engines = [engine_factory("--state-dir", state, images={"raw": disk, "qcow2": qcow2}) for _ in range(3)]
    indexing = [
        subprocess.Popen(
            [sys.executable, "-m", "udedup", "index", "--state-dir", state, disk, qcow2], stdout=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    content = disk.read_bytes()
    for engine in engines:
        assert engine.mount is not None
        for name in ("raw", "qcow2"):
            assert (engine.mount / name).read_bytes()[: len(content)] == content
    assert [process.wait(60) for process in indexing] == [0, 0]
    # Each is its own: one takes an image out, another is killed, the third goes on.
    assert engines[0].command("umount", "raw").returncode == 0
    engines[1].process.send_signal(signal.SIGKILL)
    assert engines[2].mount is not None
    assert (engines[2].mount / "raw").read_bytes() == content
    with (engines[2].mount / "qcow2").open("rb"):
        refused = engines[2].command("umount", "qcow2")
        assert refused.returncode == 1
        assert f"process {os.getpid()} (" in refused.stderr
        assert engines[0].command("umount", "qcow2").returncode == 0
    assert engines[2].stop() == 0
    assert (missing(disk, "--state-dir", state), missing(qcow2, "--state-dir", state)) == (0, 0)
    assert all(engine.log.read_text() == "" for engine in engines)


@pytest.mark.require("userfaultfd-move", "root", "fuse")
def test_engine_without_a_usable_state_directory_serves(
    engine_factory: Callable[..., Engine], disk: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, NOBODY, NOBODY)
    engine = engine_factory("--state-dir", str(state), images={"one": disk})
    assert engine.mount is not None
    assert (engine.mount / "one").read_bytes() == disk.read_bytes()
    assert engine.stop() == 0
    assert engine.log.read_text().count("\n") == 1
    assert "others may write to it" in engine.log.read_text()


@pytest.mark.require("root")
def test_another_users_sidecar_is_not_used(disk: Path, tmp_path: Path) -> None:
    """Not even if it says what is right."""
    state = tmp_path / "state"
    assert missing(disk, "--state-dir", state) == 8 * BLOCKS
    (sidecar,) = state.iterdir()
    os.chown(sidecar, NOBODY, NOBODY)
    done = udedup("index", "--state-dir", state, disk)
    assert done.returncode == 0
    assert f": {8 * BLOCKS} blocks" in done.stdout
    assert "could have been written by somebody else" in done.stderr
    assert [file.stat().st_uid for file in state.iterdir()] == [0]


@pytest.mark.require("root")
def test_users_have_states_of_their_own(disk: Path, tmp_path: Path) -> None:
    """Root's is closed to them."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    command = [*as_nobody(), sys.executable, "-m", "udedup", "index", "--state-dir"]
    refused = subprocess.run([*command, state, disk], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    open_way(tmp_path)
    disk.chmod(0o644)
    done = subprocess.run([*command, theirs / "state", disk], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
