"""What the machine must offer, and the refusals when it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.engine import UDEDUP, udedup
from support.users import NOBODY, as_nobody

from udedup.commands import host


@pytest.mark.parametrize(
    ("release", "expected"),
    [("6.8.0", (6, 8)), ("6.1.0-18-amd64", (6, 1)), ("6.18-rc1", (6, 18)), ("7.0", (7, 0)), ("odd", (0, 0))],
)
def test_kernel_version(release: str, expected: tuple[int, int]) -> None:
    assert host.kernel_version(release) == expected


def test_only_kernels_with_move_pass() -> None:
    assert host.kernel_refusal("6.8.0") is None
    assert host.kernel_refusal("6.10.1") is None
    assert host.kernel_refusal("10.0") is None
    refusal = host.kernel_refusal("6.7.12-amd64")
    assert refusal is not None
    assert refusal.startswith("kernel 6.7.12-amd64 has no UFFDIO_MOVE")
    assert "6.8" in refusal


@pytest.mark.parametrize("argv", [("run", "true"), ("engine",)])
def test_old_kernel_is_one_line(argv: tuple[str, ...], tmp_path: Path) -> None:
    # The kernel itself says it is a 2.6 then, to this process and its children (personality UNAME26).
    command = ["setarch", "x86_64", "--uname-2.6", *UDEDUP, argv[0], "--socket", str(tmp_path / "socket"), *argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("udedup: kernel 2.6.")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def nobody_runs(*argv: str | Path) -> "subprocess.CompletedProcess[str]":
    """Runs the command as a user without rights."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("UDEDUP", "XDG"))}
    command = [*as_nobody(), *UDEDUP, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, env=environment)


@pytest.mark.require("root", "userfaultfd-move")
@pytest.mark.parametrize("argv", [("run", "true"), ("engine",)])
def test_no_permission_for_userfaultfd_is_one_line(argv: tuple[str, ...], open_folder: Path) -> None:
    require_closed_userfaultfd()
    done = nobody_runs(argv[0], "--socket", open_folder / "socket", *argv[1:])
    assert done.returncode == 1
    assert done.stderr.startswith(f"udedup: no permission for userfaultfd as uid {NOBODY}")
    assert done.stderr.count("\n") == 1
    assert list(open_folder.iterdir()) == []


def require_closed_userfaultfd() -> None:
    device = Path("/dev/userfaultfd")
    opened = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0"
    if opened or (device.exists() and device.stat().st_mode & 0o006):
        pytest.skip("this machine lets every user have userfaultfd")


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that belongs to that user."""
    folder = tmp_path / "open"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    return folder


@pytest.mark.require("userfaultfd-move", "fuse")
def test_doctor_is_content_here() -> None:
    done = udedup("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    checks = json.loads(udedup("doctor", "--json").stdout)
    assert {check["name"] for check in checks} >= {"kernel", "userfaultfd", "FUSE", "agent library", "vm.max_map_count"}
    assert all(check["passed"] == (check["advice"] is None) for check in checks)


@pytest.mark.require("root", "userfaultfd-move")
def test_doctor_tells_what_to_do() -> None:
    require_closed_userfaultfd()
    done = nobody_runs("doctor", "--json")
    assert done.returncode == 1
    failed = {check["name"]: check for check in json.loads(done.stdout) if not check["passed"]}
    assert "udedup engine` as root" in failed["userfaultfd"]["advice"]
    assert failed["userfaultfd"]["essential"]


def test_doctor_sees_limits() -> None:
    program = 'ulimit -n 256; ulimit -v 8000000; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", program, "sh", *UDEDUP, "doctor", "--json"], capture_output=True, text=True, check=False
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["open files"]["found"].startswith("256 ")
    assert "ulimit -n" in checks["open files"]["advice"]
    assert checks["address space"]["found"] == f"{8000000 << 10} bytes"


def test_starting_is_quick_without_trio() -> None:
    """``udedup run`` is in every start of a wrapped program: it must not import what only the engine needs."""
    program = "import sys, udedup.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"trio", "attrs", "msgspec", "rich", "subprocess", "ctypes", "_cffi_backend"}.isdisjoint(done.stdout.split())
