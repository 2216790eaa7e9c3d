"""A record of the processes and mounts that tests made, so that nothing outlives them, not even a killed test run.

One file per process or mount, in a folder per test run, in a folder that survives them all. A process is known by its
pid *and* its start time: a recycled pid is never ours, and a run that still goes on beside us is left alone.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

_CONNECTIONS = Path("/sys/fs/fuse/connections")
_END_SECONDS = 10.0


class Ledger:
    """The record of one test run, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    @classmethod
    def of_this_run(cls, base: Path) -> "Ledger":
        """Returns the record of the test run that this process is, among those in ``base``."""
        return cls(base / f"run-{os.getpid()}-{_start_time(os.getpid())}")

    @classmethod
    def sweep_earlier(cls, base: Path) -> None:
        """Ends what test runs left that are over themselves."""
        for folder in base.glob("run-*"):
            pid, started = map(int, folder.name.split("-")[1:])
            if _start_time(pid) != started:
                cls(folder).close()

    def close(self) -> None:
        """Sweeps and removes the record."""
        self.sweep()
        shutil.rmtree(self._folder, ignore_errors=True)  # another run may sweep the same one

    def add_process(self, pid: int) -> None:
        """Records a process that is to be gone when the tests are."""
        started = _start_time(pid)
        if started is not None:
            (self._folder / f"process-{pid}-{started}").touch()

    def add_mount(self, directory: Path) -> None:
        """Records a directory that a test mounts, or may mount, something on."""
        name = "mount-" + os.fsencode(directory).hex()[-200:]
        (self._folder / name).write_bytes(os.fsencode(directory))

    def sweep(self) -> None:
        """Kills what is left of the recorded processes, unmounts what is left of the mounts, and forgets them."""
        mounts = [Path(os.fsdecode(entry.read_bytes())) for entry in self._folder.glob("mount-*")]
        self.abort_mounts()
        for entry in self._folder.glob("process-*"):
            pid, started = map(int, entry.name.split("-")[1:])
            _kill(pid, started)
            entry.unlink(missing_ok=True)
        for directory in mounts:
            while directory in mounted():
                subprocess.run(["umount", "--lazy", "--no-canonicalize", str(directory)], check=True)
        for entry in self._folder.glob("mount-*"):
            entry.unlink(missing_ok=True)

    def abort_mounts(self) -> None:
        """Aborts the FUSE connections of all recorded mounts: whoever waits for one gets an error and goes on."""
        devices = mounted()
        for entry in self._folder.glob("mount-*"):
            device = devices.get(Path(os.fsdecode(entry.read_bytes())))
            if device is not None:
                abort_connection(device)


def mounted() -> dict[Path, int]:
    """Returns device numbers by mount point, from mountinfo: asks nothing of the mounts themselves, so never hangs."""
    devices: dict[Path, int] = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        major, minor = map(int, fields[2].split(":"))
        directory = fields[4].encode("latin-1", "surrogateescape").decode("unicode_escape")
        devices[Path(directory)] = os.makedev(major, minor)
    return devices


def abort_connection(device: int) -> None:
    """Aborts the FUSE connection behind a mount's device number."""
    abort = _CONNECTIONS / str(os.minor(device)) / "abort"
    if not abort.exists() and os.geteuid() == 0:
        # Not there without systemd. The place is its usual one, so it is left mounted.
        subprocess.run(["mount", "-t", "fusectl", "fusectl", str(_CONNECTIONS)], check=False, capture_output=True)
    if abort.exists():
        abort.write_text("1")


def _start_time(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot (proc(5), field 22); None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])


def _kill(pid: int, started: int) -> None:
    deadline = time.monotonic() + _END_SECONDS
    while _start_time(pid) == started and _alive(pid):
        os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} of an earlier test survives SIGKILL")
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Whether a process runs or sleeps; a zombie is its parent's business."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
