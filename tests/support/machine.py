"""What this machine can do for the tests, asked of the machine itself and independently of ``udedup doctor``."""

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from support.cgroup import memory_controller

_UFFDIO_API = 0xC018AA3F
_UFFD_FEATURE_MOVE = 1 << 16
_SYS_USERFAULTFD = 323


def _userfaultfd_move() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC)
    if descriptor < 0:
        return f"userfaultfd(2): {os.strerror(ctypes.get_errno())}"
    try:
        api = (ctypes.c_uint64 * 3)(0xAA, 0, 0)
        if libc.ioctl(descriptor, ctypes.c_ulong(_UFFDIO_API), ctypes.byref(api)) < 0:
            return f"UFFDIO_API: {os.strerror(ctypes.get_errno())}"
        return None if api[1] & _UFFD_FEATURE_MOVE else "the kernel has no UFFDIO_MOVE"
    finally:
        os.close(descriptor)


def _fuse() -> str | None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no access to /dev/fuse"
    return _program("fusermount3")()


def _root() -> str | None:
    return None if os.geteuid() == 0 else f"uid is {os.geteuid()}"


def _kvm() -> str | None:
    return None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no access to /dev/kvm"


def _program(name: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
        return None if found else f"{name} is not installed"

    return probe


def _huge_pages() -> str | None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists():
        return "the kernel has no transparent huge pages"
    return f"{enabled} says never" if "[never]" in enabled.read_text() else None


def _memory_groups() -> str | None:
    controller = memory_controller()
    if controller is None:
        return "no memory controller in /sys/fs/cgroup"
    return None if os.access(controller.folder, os.W_OK) else f"{controller.folder} is not writable"


_PROBES: dict[str, Callable[[], str | None]] = {
    "userfaultfd-move": _userfaultfd_move,
    "huge-pages": _huge_pages,
    "fuse": _fuse,
    "memory-groups": _memory_groups,
    "root": _root,
    "kvm": _kvm,
    "qemu": _program("qemu-system-x86_64"),
    "qemu-utils": _program("qemu-nbd"),
    "gcc": _program("gcc"),
    "spin": _program("spin"),
    "redis": _program("redis-server"),
    "sqlite3": _program("sqlite3"),
    "stress-ng": _program("stress-ng"),
    "memtester": _program("memtester"),
    "setcap": _program("setcap"),
    "strace": _program("strace"),
    "systemd": _program("systemd-analyze"),
    "bash": _program("bash"),
    "zsh": _program("zsh"),
    "fish": _program("fish"),
    "mandoc": _program("mandoc"),
    "chromium": _program("chromium-headless-shell"),
    "mke2fs": _program("mke2fs"),
    "fuse2fs": _program("fuse2fs"),
    "cpython-tests": lambda: (
        None if Path("/usr/lib/python3.11/test/test_mmap.py").exists() else "libpython3.11-testsuite is not installed"
    ),
}


def examine() -> dict[str, str | None]:
    """Returns, for every capability a test can require, None if it is there, else why it is not."""
    return {name: probe() for name, probe in _PROBES.items()}


def missing_is_failure() -> bool:
    """Whether a missing capability fails a test rather than skips it: on a CI machine where we are root."""
    return os.environ.get("CI") == "true" and os.geteuid() == 0
