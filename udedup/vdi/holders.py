"""Who has a file of the mount open, for people who want to take it away."""

import os
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def name_holders(name: str, device: int, inode: int, openers: Iterable[int]) -> str:
    """The processes that hold the file called ``name``, as ``12 (qemu), 34 (python3)``; waits for the mount.

    ``device`` and ``inode`` are those in the mount. Where /proc shows nobody (other users' processes to one without
    root, descriptors on their way in a socket) it is those that opened the file, ``openers``; one that has ended can
    have left it to the kernel, as losetup does.
    """
    found = [process for process in PROC.iterdir() if process.name.isdecimal() and _holds(process, name, device, inode)]
    if found:
        return ", ".join(_describe(process) for process in found)
    return ", ".join(_describe(PROC / str(pid)) for pid in sorted(openers))


def _holds(process: Path, name: str, device: int, inode: int) -> bool:
    try:
        return _has_open(process, name, device, inode) or _has_mapped(process, device, inode)
    except OSError:
        # Gone meanwhile, or not ours to look at.
        return False


def _has_open(process: Path, name: str, device: int, inode: int) -> bool:
    for entry in (process / "fd").iterdir():
        try:
            # By its name first: asking after every file would ask every file system.
            if os.path.basename(entry.readlink()) == name:  # noqa: PTH119
                status = entry.stat()
                if (status.st_dev, status.st_ino) == (device, inode):
                    return True
        except OSError:
            # Closed meanwhile.
            continue
    return False


def _has_mapped(process: Path, device: int, inode: int) -> bool:
    wanted = [f"{os.major(device):02x}:{os.minor(device):02x}", str(inode)]
    with (process / "maps").open(encoding="utf-8", errors="replace") as lines:
        return any(line.split(maxsplit=5)[3:5] == wanted for line in lines)


def _describe(process: Path) -> str:
    try:
        command = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return f"what process {process.name} opened and left to others or to the kernel (losetup -a lists loop devices)"
    return f"process {process.name} ({command})"
