"""Control groups that limit the memory of processes under test, and hogs that make it short there."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path("/sys/fs/cgroup")
PRESSURE: Final = "memory.pressure"
EMPTY_SECONDS: Final = 10.0
"""How long a group may take to be empty once its processes have ended."""

CHUNK: Final = 1 << 18
HOG_BYTES: Final = 16 << 20
"""That a hog holds: a small part of a small group would be too little for anybody to go on in."""

# Reads a file over and over: with less room than it has, each read waits for another page to go.
_HOG: Final = f"""
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(file).st_size
held = b"x" * {HOG_BYTES}
print("ready", flush=True)
sys.stdin.readline()
while True:
    for offset in range(0, size, {CHUNK}):
        os.pread(file, {CHUNK}, offset)
"""


@attrs.frozen
class Controller:
    """Where the kernel has memory control groups."""

    version: int
    folder: Path
    limit: str
    """Name of the file that takes the limit."""

    usage: str
    """Name of the file that says what is charged."""

    events: str
    """Name of the file with the line "oom_kill N"."""

    files: tuple[str, ...]
    """Which lines of memory.stat are cached files."""


_CONTROLLERS: Final = (
    Controller(
        1,
        ROOT / "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.oom_control",
        ("total_inactive_file", "total_active_file"),
    ),
    Controller(2, ROOT, "memory.max", "memory.current", "memory.events", ("inactive_file", "active_file")),
)


def memory_controller() -> Controller | None:
    """In either version of control groups; None if groups can't be made."""
    for controller in _CONTROLLERS:
        enabled = controller.folder / "cgroup.subtree_control"
        if controller.limit == "memory.max":
            if not enabled.exists() or "memory" not in enabled.read_text().split():
                continue
        elif not (controller.folder / controller.limit).exists():
            continue
        return controller
    return None


def _pressure_root() -> Path | None:
    """Where version 2 is mounted: groups there tell their own pressure, whichever version limits memory."""
    return next((root for root in (ROOT, ROOT / "unified") if (root / "cgroup.subtree_control").exists()), None)


def no_pressure() -> str | None:
    """Why a group's memory pressure can't be made and seen here; None: it can."""
    root = _pressure_root()
    if root is None:
        return f"no control groups of version 2 below {ROOT}"
    if not os.access(root, os.W_OK):
        return f"{root} is not writable"
    try:
        Path("/proc/pressure/memory").read_text()
    except OSError as error:
        return f"the kernel tells no memory pressure: {error.strerror}"
    return None if memory_controller() is not None else f"no memory controller below {ROOT}"


@attrs.frozen
class Group:
    """One control group, in every hierarchy that matters."""

    controller: Controller
    memory: Path
    """Its folder at the memory controller."""

    folders: tuple[Path, ...]
    """All its folders."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words before a command that is to run in it from its first moment on."""
        enter = "".join(f"echo $$ >'{folder}/cgroup.procs' && " for folder in self.folders)
        return ("sh", "-c", f'{enter}exec "$@"', "sh")

    @property
    def pressure(self) -> Path:
        """The file that tells it."""
        return next(folder / PRESSURE for folder in self.folders if (folder / PRESSURE).exists())

    @property
    def charged(self) -> int:
        """Bytes."""
        return int((self.memory / self.controller.usage).read_text())

    @property
    def unreclaimable(self) -> int:
        """Of that, what is no cached file, bytes."""
        stat = dict(line.split() for line in (self.memory / "memory.stat").read_text().splitlines())
        return self.charged - sum(int(stat[name]) for name in self.controller.files)

    @property
    def kills(self) -> int:
        """Processes that the kernel has ended for the limit."""
        lines = (self.memory / self.controller.events).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def limit(self, size: int) -> None:
        """What is charged may not exceed so many bytes from now on."""
        (self.memory / self.controller.limit).write_text(str(size))

    def add(self, pid: int) -> None:
        """What ``pid`` allocates from now on is charged to it."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))


@contextmanager
def memory_group(name: str, limit: int | None = None) -> Iterator[Group]:
    """Makes one; its processes must have ended when the block does. ``limit``: bytes."""
    controller = memory_controller()
    assert controller is not None
    memory = controller.folder / f"udedup-test-{name}"
    root = _pressure_root()
    folders = [memory] if root in (None, controller.folder) else [memory, root / memory.name]
    try:
        for folder in folders:
            folder.mkdir()
        group = Group(controller, memory, tuple(folders))
        if limit is not None:
            group.limit(limit)
        yield group
    finally:
        for folder in folders:
            if folder.exists():
                _remove(folder)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + EMPTY_SECONDS
    while True:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def memory_limited(pid: int, limit: int) -> Iterator[Group]:
    """What ``pid`` allocates from now on may not exceed ``limit`` bytes. It must have ended when this does."""
    with memory_group(str(pid), limit) as group:
        group.add(pid)
        yield group


def thrash_file(path: Path, size: int) -> Path:
    """A file of so many bytes for :func:`hogs`, that no group has been charged for yet."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@contextmanager
def hogs(group: Group, file: Path, count: int, *, left: float) -> Iterator[None]:
    """So many processes in the group read a file that has more than the group has room for.

    The group gets a limit of which only the part ``left`` is not taken up by what the kernel can't throw out.
    """
    command = [*group.prefix, sys.executable, "-c", _HOG, str(file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        group.limit(int(group.unreclaimable / (1 - left)))
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
