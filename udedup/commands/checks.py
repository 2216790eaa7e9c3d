"""The points ``udedup doctor`` looks at: each asks the machine itself and says what to do if the answer is no."""

import os
import platform
import resource
import shutil
from collections.abc import Callable
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl
from pathlib import Path

from attrs import frozen

from udedup.commands.elf import read_elf
from udedup.commands.host import UFFD_FEATURES, agent_library, kernel_refusal, userfaultfd_refusal
from udedup.engine.psi import SYSTEM, readable
from udedup.errors import UdedupError

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python's fcntl has it from 3.13 on
_FUSE_DEVICE = Path("/dev/fuse")
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_MAX_MAP_COUNT_DEFAULT = 65530  # include/linux/mm.h
_LIBC_ONLY = {"libc.so.6", "ld-linux-x86-64.so.2"}
_DESCRIPTORS_LEAST = 1024
"""Descriptors an engine should be allowed: one per program, one per 16 MiB of the store, and its own."""


@frozen
class Check:
    """One point, and what was found."""

    name: str
    """What was looked at, in a few words."""

    passed: bool
    """Whether it is as it should be."""

    essential: bool
    """Whether udedup cannot work at all without it."""

    found: str
    """What the machine answered."""

    advice: str | None
    """What to do about it; None if it passed."""


def examine() -> list[Check]:
    """Makes all checks, in the order in which their failures are worth mending."""
    return [check() for check in _CHECKS]


def _check(name: str, found: str, advice: str | None = None, *, essential: bool = True) -> Check:
    """A check that failed exactly if there is something to advise."""
    return Check(name=name, passed=advice is None, essential=essential, found=found, advice=advice)


def _architecture() -> Check:
    machine = platform.machine()
    name, version = platform.libc_ver()
    good = machine == "x86_64" and name == "glibc"
    advice = "the agent patches glibc's x86-64 code: use such a machine and system"
    return _check("architecture", f"{machine}, {name or 'not glibc'} {version}", None if good else advice)


def _kernel() -> Check:
    release = os.uname().release
    return _check("kernel", release, kernel_refusal(release))


def _userfaultfd() -> Check:
    refusal = userfaultfd_refusal()
    return _check("userfaultfd", "refused" if refusal else f"open, has {', '.join(UFFD_FEATURES)}", refusal)


def _memfd() -> Check:
    descriptor = os.memfd_create("udedup-doctor", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)
    except OSError as error:
        return _check("sealed memfd", str(error), "boot a kernel that has F_SEAL_FUTURE_WRITE (Linux 5.1 or later)")
    finally:
        os.close(descriptor)
    return _check("sealed memfd", "seals are accepted")


def _agent() -> Check:
    try:
        library = agent_library()
    except UdedupError as error:
        return _check("agent library", "not found", str(error))
    elf = read_elf(library)
    if elf is None or not elf.x86_64:
        return _check("agent library", f"{library} is no x86-64 library", "build again: pip install .")
    more = [name for name in elf.needed if name not in _LIBC_ONLY]
    advice = "it may link libc only, or it changes what it enters: build it again without LDFLAGS of your own"
    return _check("agent library", f"{library} links {', '.join(elf.needed) or 'nothing'}", advice if more else None)


def _native() -> Check:
    try:
        import udedup._native as native
    except ImportError as error:
        return _check("engine library", str(error), "build again, with libxxhash-dev installed: pip install .")
    return _check("engine library", str(native.__file__))


def _fuse() -> Check:
    if not os.access(_FUSE_DEVICE, os.R_OK | os.W_OK):
        advice = "modprobe fuse, and give this user /dev/fuse; without it `udedup engine --mount` cannot show images"
        return _check("FUSE", f"no access to {_FUSE_DEVICE}", advice, essential=False)
    fusermount = shutil.which("fusermount3")
    if fusermount is None:
        return _check("FUSE", "fusermount3 is not installed", "apt-get install fuse3", essential=False)
    return _check("FUSE", f"{_FUSE_DEVICE}, {fusermount}", essential=False)


def _qemu_nbd() -> Check:
    found = shutil.which("qemu-nbd")
    advice = (
        "apt-get install qemu-utils; without it no VMDK, VHD, VHDX, nor compressed or encrypted qcow2 can be mounted"
    )
    return _check("qemu-nbd", found or "not installed", None if found else advice, essential=False)


def _mappings() -> Check:
    limit = int(_MAX_MAP_COUNT.read_text())
    low = limit < _MAX_MAP_COUNT_DEFAULT
    advice = (
        f"each run of shared pages is a mapping of its own: sysctl vm.max_map_count={_MAX_MAP_COUNT_DEFAULT} or more"
    )
    return _check("vm.max_map_count", str(limit), advice if low else None, essential=False)


def _descriptors() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < _DESCRIPTORS_LEAST
    advice = f"ulimit -n {_DESCRIPTORS_LEAST} before `udedup engine`: one descriptor per program and per 16 MiB shared"
    return _check("open files", f"{soft} (at most {hard})", advice if low else None, essential=False)


def _address_space() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    unlimited = soft == resource.RLIM_INFINITY
    advice = "ulimit -v unlimited: each program maps up to the whole store beside its own memory"
    found = "unlimited" if unlimited else f"{soft} bytes"
    return _check("address space", found, None if unlimited else advice, essential=False)


def _pressure() -> Check:
    found = readable(SYSTEM)
    advice = "boot with psi=1; without it the engine can't tell when memory is short, and works as if it never were"
    return _check(
        "memory pressure",
        str(SYSTEM) if found else "the kernel does not tell",
        None if found else advice,
        essential=False,
    )


_CHECKS: tuple[Callable[[], Check], ...] = (
    _architecture,
    _kernel,
    _userfaultfd,
    _memfd,
    _agent,
    _native,
    _fuse,
    _qemu_nbd,
    _mappings,
    _descriptors,
    _address_space,
    _pressure,
)
