"""The table in which agents built with faults (tests/torture/faults) count the system calls they let fail."""

import errno
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

SLOT: Final = struct.Struct("=QQ8Q8iqQ40s")
"""``struct slot`` of tests/torture/faults/faults.c."""

SLOTS: Final = 4096
CALLS: Final = {
    0: "read",
    5: "fstat",
    7: "poll",
    8: "lseek",
    9: "mmap",
    10: "mprotect",
    11: "munmap",
    16: "ioctl",
    17: "pread64",
    18: "pwrite64",
    25: "mremap",
    28: "madvise",
    35: "nanosleep",
    41: "socket",
    42: "connect",
    46: "sendmsg",
    47: "recvmsg",
    72: "fcntl",
    80: "chdir",
    157: "prctl",
    202: "futex",
    233: "epoll_ctl",
    257: "openat",
    281: "epoll_pwait",
    291: "epoll_create1",
    314: "sched_setattr",
    315: "sched_getattr",
    323: "userfaultfd",
    436: "close_range",
}
"""x86-64's numbers of the calls in the list of faults.c."""

IOCTLS: Final = {
    0xC020AA00: "UFFDIO_REGISTER",
    0xC028AA05: "UFFDIO_MOVE",
    0xC018AA06: "UFFDIO_WRITEPROTECT",
    0xC020AA07: "UFFDIO_CONTINUE",
    0xC018AA3F: "UFFDIO_API",
    0xAA00: "USERFAULTFD_IOC_NEW",
    0xC0686611: "PROCMAP_QUERY",
    0xC0606610: "PAGEMAP_SCAN",
}


@attrs.frozen
class Fault:
    """One errno of one call in one function of the agent."""

    call: str
    """The system call, with the operation of ``ioctl``."""
    function: str
    """The function that makes it."""
    error: str
    """The errno's name."""
    times: int
    """How often it was injected."""
    calls: int
    """How often the call was made, or would have been."""


class FaultTable:
    """The table's file; agents find it by ``UDEDUP_TEST_FAULTS``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(SLOT.size * SLOTS))
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), SLOT.size * SLOTS, prot=mmap.PROT_READ)

    def read(self) -> list[Fault]:
        """What was injected so far, by call, function and errno."""
        return sorted(self._faults(), key=lambda fault: (fault.call, fault.function, fault.error))

    def _faults(self) -> Iterator[Fault]:
        for at in range(0, len(self._map), SLOT.size):
            key, calls, *rest = SLOT.unpack_from(self._map, at)
            if not key:
                continue
            times, errors, (number, request, name) = rest[:8], rest[8:16], rest[16:]
            call = CALLS[number]
            if call == "ioctl":
                call += f"({IOCTLS[request]})"
            for count, error in zip(times, errors, strict=True):
                if error:
                    yield Fault(call, name.rstrip(b"\0").decode(), errno.errorcode[error], count, calls)


def fault_table(faults: list[Fault]) -> list[str]:
    """The table for people; what could have failed but never did is in it, too."""
    lines = [f"{'system call':<27} {'made in':<26} {'fails with':<13} {'times':>8} {'of':>10}"]
    lines += [f"{f.call:<27} {f.function:<26} {f.error:<13} {f.times:>8,} {f.calls:>10,}" for f in faults]
    injected = sum(fault.times for fault in faults)
    different = sum(fault.times > 0 for fault in faults)
    lines.append(f"{injected:,} faults injected, {different} of {len(faults)} kinds")
    return lines
