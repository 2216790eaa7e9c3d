"""What the kernel says about memory, per process."""

from pathlib import Path

from attrs import frozen


@frozen
class Memory:
    """One process's memory, from /proc/PID/smaps_rollup."""

    rss: int
    """Resident bytes, shared pages counted in full."""

    pss: int
    """Resident bytes, each shared page divided by the number of processes that map it: these add up."""


def memory_of(pid: int) -> Memory:
    """Asks the kernel."""
    values = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) << 10
    return Memory(rss=values["Rss"], pss=values["Pss"])
