"""What the engine keeps of its rights: it gives up all others before it serves anybody.

Capabilities belong to threads, and a thread hands its own on to those it starts (capabilities(7)): so they are given up
while there is one thread, which is before the mount is made and before anything runs in a worker thread.
"""

import ctypes
import logging
import os
import struct
from pathlib import Path

import attrs

from udedup.prctl import prctl

log = logging.getLogger(__name__)

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_SETPCAP = 8


@attrs.frozen
class Capability:
    """One of capabilities(7)."""

    name: str

    number: int
    """In linux/capability.h."""

    mount_only: bool
    """Whether it is for the mount and given up if there is none."""

    purpose: str
    """What the engine needs it for."""


KEPT = (
    Capability("cap_sys_ptrace", 19, False, "reading /proc/PID/smaps of other users' processes for `udedup status`"),
    Capability("cap_sys_admin", 21, True, "mounting the images, and unmounting them at the end"),
    Capability("cap_dac_read_search", 2, True, "opening images that root names but does not own"),
)
"""All that is ever kept. The rest of what root's engine does it does as the owner: opening /dev/userfaultfd for agents,
raising vm.max_map_count and putting it back, removing its socket."""


@attrs.frozen
class Privileges:
    """Of one thread, from /proc/PID/status."""

    effective: int
    """Capabilities, a bit for each."""

    permitted: int

    inheritable: int

    bounding: int

    no_new_privs: bool
    """Whether no program it starts can give it more."""

    @classmethod
    def of(cls, status: Path) -> "Privileges":
        """Reads them from ``/proc/…/status``. Raises OSError."""
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return cls(
            effective=int(fields["CapEff"], 16),
            permitted=int(fields["CapPrm"], 16),
            inheritable=int(fields["CapInh"], 16),
            bounding=int(fields["CapBnd"], 16),
            no_new_privs=fields["NoNewPrivs"] == "1",
        )


def kept(*, mount: bool) -> tuple[Capability, ...]:
    """What an engine keeps, as far as it has it."""
    return tuple(capability for capability in KEPT if mount or not capability.mount_only)


def drop(*, mount: bool) -> None:
    """Gives up all but what :func:`kept` names. Raises RuntimeError if there are threads that would keep the rest.

    A mount that isn't root's is unmounted by fusermount3, which is setuid: only then programs may still give rights.
    """
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("privileges can be dropped only while there is one thread")
    before = Privileges.of(Path("/proc/self/status"))
    wanted = sum(1 << capability.number for capability in kept(mount=mount)) & before.permitted
    if before.effective >> _CAP_SETPCAP & 1:
        for number in range(before.bounding.bit_length()):
            if before.bounding & ~wanted & 1 << number:
                prctl(_PR_CAPBSET_DROP, number)
    _capset(wanted)
    if os.geteuid() == 0 or not mount:
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
    after = Privileges.of(Path("/proc/self/status"))
    names = [capability.name for capability in KEPT if after.permitted >> capability.number & 1]
    log.debug("kept %s; no new privileges: %s", ", ".join(names) or "no capability", after.no_new_privs)


def _capset(capabilities: int) -> None:
    """Makes them this thread's effective and permitted ones, and none inheritable or ambient. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    if libc.capset(header, data) < 0:
        raise OSError(ctypes.get_errno(), f"capabilities can't be dropped: {os.strerror(ctypes.get_errno())}")
