"""Directories to mount on: which are fit for it, what is mounted where, and cleaning up after a crashed engine.

Everything here may wait for file systems that don't answer: call it in a worker thread.
"""

import errno
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import attrs

from udedup.errors import UdedupError

log = logging.getLogger(__name__)

FILESYSTEM: Final = "udedup"
# Mounts of crashed engines stacked on one directory, more than which are not believable.
STALE_MAX: Final = 8
UNMOUNT_SECONDS: Final = 10
READAHEAD_KIB: Final = 1024


@attrs.frozen
class Mount:
    """One line of /proc/self/mountinfo (proc(5))."""

    device: int
    """st_dev of the files in it."""
    directory: Path
    """Where it is mounted."""
    kind: str
    """File system type, with subtype."""
    source: str
    """What is mounted, in the file system's words."""

    @property
    def ours(self) -> bool:
        """Whether an engine of ours made it."""
        return self.kind == f"fuse.{FILESYSTEM}"


def parse_mount(line: str) -> Mount:
    """Reads one line of mountinfo."""
    fields = line.split()
    separator = fields.index("-")
    major, minor = fields[2].split(":")
    return Mount(
        device=os.makedev(int(major), int(minor)),
        directory=Path(unescape(fields[4])),
        kind=fields[separator + 1],
        source=unescape(fields[separator + 2]),
    )


def unescape(text: str) -> str:
    """Undoes mountinfo's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def mount_at(directory: Path) -> Mount | None:
    """The topmost mount on ``directory`` (absolute, without symbolic links); asks nothing of the mount itself."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    found = [mount for mount in map(parse_mount, text.splitlines()) if mount.directory == directory]
    return found[-1] if found else None


def resolve(path: Path) -> Path:
    """``path`` absolute and without symbolic links, also if the last component is a mount that is dead."""
    return Path(os.path.realpath(path))


def detach(directory: Path) -> None:
    """Unmounts lazily: at once for newcomers, when the last file is closed for the rest. Raises UdedupError."""
    command = (
        ["umount", "--lazy", "--no-canonicalize", str(directory)]
        if os.geteuid() == 0
        else ["fusermount3", "-u", "-z", "--", str(directory)]
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=UNMOUNT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UdedupError(f"mount point {directory}: {command[0]} failed: {error}") from error
    if done.returncode != 0:
        raise UdedupError(f"mount point {directory}: can't be unmounted: {' '.join(done.stderr.split())}")


def prepare(path: Path) -> Path:
    """Makes sure that ``path`` can be mounted on and returns it resolved.

    A mount left by an engine that crashed is cleaned up. Raises UdedupError otherwise: missing, not a directory, not
    readable, not empty, or something else is mounted there.
    """
    for _ in range(STALE_MAX):
        directory = resolve(path)
        try:
            entries = list(directory.iterdir())
        except FileNotFoundError as error:
            raise UdedupError(f"mount point {path}: no such directory; create it first") from error
        except NotADirectoryError as error:
            raise UdedupError(f"mount point {path}: is not a directory") from error
        except OSError as error:
            mount = mount_at(directory)
            dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
            if not dead or mount is None or not mount.ours:
                raise UdedupError(f"mount point {path}: {error.strerror}{describe(mount)}") from error
            log.warning("mount point %s: unmounting what a crashed engine has left there", directory)
            detach(directory)
            continue
        mount = mount_at(directory)
        if mount is not None:
            raise UdedupError(f"mount point {path}: in use{describe(mount)}; unmount it or choose another directory")
        if entries:
            raise UdedupError(f"mount point {path}: is not empty; choose an empty directory")
        return directory
    raise UdedupError(f"mount point {path}: more than {STALE_MAX} dead mounts on it; unmount them first")


def describe(mount: Mount | None) -> str:
    """Names what is mounted, to go on with a sentence."""
    return "" if mount is None else f": {mount.source} ({mount.kind}) is mounted there"


def require_fuse(*, allow_other: bool) -> None:
    """Raises UdedupError if this process can't make FUSE mounts, saying what to do."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        todo = "load the kernel module fuse" if error.errno in (errno.ENOENT, errno.ENODEV) else "ask for access to it"
        raise UdedupError(f"no FUSE mounts here: /dev/fuse: {error.strerror}; {todo}") from error
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise UdedupError("no FUSE mounts without root: fusermount3 is missing; install the package fuse3")
    configuration = Path("/etc/fuse.conf")
    text = configuration.read_text(encoding="utf-8") if configuration.exists() else ""
    if allow_other and re.search(r"^\s*user_allow_other\s*$", text, re.MULTILINE) is None:
        raise UdedupError(f"other users can't be let in: add the line user_allow_other to {configuration}")


def raise_readahead(device: int) -> None:
    """Lets the kernel read ahead 1 MiB instead of 128 KiB on the mount; only root may, for others this does nothing.

    Must follow the mount's first answered request: the kernel sets its own value when the session is agreed on.
    """
    if os.geteuid() != 0:
        return
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        setting.write_text(f"{READAHEAD_KIB}\n", encoding="ascii")
    except OSError as error:
        log.warning("readahead of the mount stays small, sequential reads are slower: %s: %s", setting, error.strerror)
