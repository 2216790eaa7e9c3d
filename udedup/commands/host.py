"""What this machine offers: probes that ask the kernel itself.

Cheap to import: used by ``udedup run`` too, wherever a refusal must be clear.
"""

import fcntl
import os
import struct
from pathlib import Path
from typing import NamedTuple

from udedup.errors import UdedupError

KERNEL_NEEDED = (6, 8)
"""The first Linux with UFFDIO_MOVE."""

USERFAULTFD_DEVICE = Path("/dev/userfaultfd")

UFFD_FEATURES = {
    "pagefault-flag-wp": 1 << 0,
    "event-remove": 1 << 3,
    "minor-shmem": 1 << 10,
    "wp-hugetlbfs-shmem": 1 << 12,
    "wp-unpopulated": 1 << 13,
    "move": 1 << 16,
}
"""Features the agent needs: name to bit of ``struct uffdio_api.features`` (linux/userfaultfd.h)."""

_USERFAULTFD_IOC_NEW = 0xAA00  # _IO(0xAA, 0x00)
_UFFDIO_API = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_UFFD_API = 0xAA
_SYS_USERFAULTFD = 323  # x86-64

AGENT_NAME = "libudedup.so"

_LIBRARY = Path(__file__).parent.parent / AGENT_NAME


class Userfaultfd(NamedTuple):
    """What a userfaultfd handshake with the kernel gave."""

    features: int
    """Bits of ``struct uffdio_api.features`` the kernel supports."""

    source: str
    """Where the descriptor came from: ``/dev/userfaultfd`` or ``userfaultfd(2)``."""

    def missing(self) -> list[str]:
        """Names of the features the agent needs and this kernel lacks."""
        return [name for name, bit in UFFD_FEATURES.items() if not self.features & bit]


def kernel_version(release: str) -> tuple[int, int]:
    """Returns (major, minor) of a kernel release such as ``6.1.0-18-amd64``; (0, 0) if it does not look like one."""
    parts = release.replace("-", ".").split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        return (0, 0)
    return (int(parts[0]), int(parts[1]))


def kernel_refusal(release: str) -> str | None:
    """Returns why a kernel of this release cannot run udedup, in one line, or None if it can."""
    if kernel_version(release) >= KERNEL_NEEDED:
        return None
    needed = ".".join(map(str, KERNEL_NEEDED))
    return (
        f"kernel {release} has no UFFDIO_MOVE, which came with Linux {needed}: boot Linux {needed} or later "
        "(Debian 12: linux-image-amd64 from bookworm-backports)"
    )


def open_userfaultfd() -> tuple[int, str]:
    """Opens a full userfaultfd (one that serves faults raised inside system calls too), as the agent does.

    Returns (descriptor, where it came from). Raises OSError when neither the device nor the system call lets us.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open(USERFAULTFD_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # Not ours to open: the system call is the other way in, for CAP_SYS_PTRACE or by vm.unprivileged_userfaultfd.
        return _userfaultfd_syscall(flags), "userfaultfd(2)"
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags), str(USERFAULTFD_DEVICE)
    finally:
        os.close(device)


def _userfaultfd_syscall(flags: int) -> int:
    import ctypes  # only here: the usual way in is the device, and `udedup run` is in a hurry

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    descriptor = int(libc.syscall(ctypes.c_long(_SYS_USERFAULTFD), ctypes.c_long(flags)))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def probe_userfaultfd() -> Userfaultfd:
    """Asks the kernel for a userfaultfd and its features. Raises OSError if it is refused."""
    descriptor, source = open_userfaultfd()
    try:
        # With no features asked for, the kernel answers with all it has.
        answer = fcntl.ioctl(descriptor, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, 0, 0))
    finally:
        os.close(descriptor)
    return Userfaultfd(features=struct.unpack("=QQQ", answer)[1], source=source)


def userfaultfd_refusal() -> str | None:
    """Returns why this user cannot have what the agent needs of userfaultfd, in one line, or None if all is there."""
    try:
        missing = probe_userfaultfd().missing()
    except OSError as error:
        return (
            f"no permission for userfaultfd as uid {os.geteuid()} ({error.strerror}): start `udedup engine` as root, "
            f"or give this user {USERFAULTFD_DEVICE} (chown or setfacl), or sysctl vm.unprivileged_userfaultfd=1"
        )
    if missing:
        return f"this kernel's userfaultfd lacks {', '.join(missing)}: boot a kernel with CONFIG_USERFAULTFD and shmem"
    return None


def require_host() -> None:
    """Raises UdedupError, in one line that says what to do, if this kernel or this user's rights do not suffice."""
    refusal = kernel_refusal(os.uname().release) or userfaultfd_refusal()
    if refusal:
        raise UdedupError(refusal)


def agent_library() -> Path:
    """Returns the absolute path of libudedup.so. Raises UdedupError if this installation has none."""
    if not _LIBRARY.is_file():
        raise UdedupError(f"{_LIBRARY} is missing: this installation was not built; run `pip install .` again")
    return _LIBRARY
