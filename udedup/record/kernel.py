"""The kernel's side: KSM's switches and counters, CPU time and memory of processes."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from udedup.errors import UdedupError

KSM: Final = Path("/sys/kernel/mm/ksm")
KSM_STOP: Final = "0"
KSM_RUN: Final = "1"
KSM_UNMERGE: Final = "2"

CLOCK_OF_PROCESS: Final = 2
"""Low bits of the clock id that stands for the CPU time of another process (the kernel's posix-timers_types.h)."""


def process_cpu(pid: int) -> float:
    """CPU time of a running process, s: user and system, all threads. Raises OSError if it is gone."""
    return time.clock_gettime(~pid << 3 | CLOCK_OF_PROCESS)


@attrs.frozen
class Memory:
    """One process's memory, from /proc/PID/smaps_rollup."""

    rss: int
    """Resident bytes, shared pages counted in full."""

    pss: int
    """Resident bytes, each shared page divided by the number of processes that map it: these add up."""


def process_memory(pid: int) -> Memory:
    """Asks the kernel. Raises OSError if the process is gone."""
    values = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) << 10
    return Memory(rss=values["Rss"], pss=values["Pss"])


def ksm_counter(name: str) -> int:
    """One of KSM's numbers in /sys/kernel/mm/ksm."""
    return int((KSM / name).read_text())


def ksmd_cpu() -> float:
    """CPU time of ksmd, s: the first number of its schedstat, which counts in ns."""
    return int(Path(f"/proc/{ksmd_pid()}/schedstat").read_text().split()[0]) / 1e9


def ksmd_pid() -> int:
    """The kernel's thread. Raises UdedupError if there is none."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # Anybody can take the name; only kernel threads have no command line.
            if (entry / "comm").read_text() == "ksmd\n" and not (entry / "cmdline").read_bytes():
                return int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise UdedupError("this kernel has no ksmd")


def why_no_ksm() -> str | None:
    """What keeps :func:`ksm` from working here, as one line; None: nothing."""
    if not (KSM / "run").exists():
        return "this kernel has no KSM"
    if os.geteuid() != 0:
        return "setting it going takes root"
    if (KSM / "run").read_text().strip() == KSM_RUN:
        return f"it is in use on this machine: `echo {KSM_UNMERGE} >{KSM}/run` first"
    return None


@contextmanager
def ksm(settings: Mapping[str, int]) -> Iterator[None]:
    """Sets KSM loose on what asks for it, with ``settings`` by name; undoes everything at the end.

    Raises UdedupError where :func:`why_no_ksm` tells why.
    """
    problem = why_no_ksm()
    if problem:
        raise UdedupError(f"KSM: {problem}")
    before = {name: (KSM / name).read_text() for name in (*settings, "run")}
    try:
        for name, value in settings.items():
            (KSM / name).write_text(str(value))
        (KSM / "run").write_text(KSM_RUN)
        yield
    finally:
        (KSM / "run").write_text(KSM_UNMERGE)
        for name, text in before.items():
            (KSM / name).write_text(text)
