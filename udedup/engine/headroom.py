"""How much memory is left before there is a shortage: in the machine, and in the engine's own control groups.

Programs wait for memory where there is plenty of it as well (``udedup.engine.psi``): for pages of files that somebody
had thrown out in good time, with DAMON, ``memory.reclaim`` or ``drop_caches``, and that are read in again. That is not
what caches are to be dropped for.
"""

import errno
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUPS = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")


def part_left() -> float:
    """The part of memory that can be had without taking it from anybody: where that is least, between 0 and 1."""
    groups, mounts = GROUPS.read_text(), MOUNTS.read_text()
    parts = [of_machine(MEMINFO.read_text())]
    for version, group in ((2, own_group(groups, mounts)), (1, own_memory_group(groups, mounts))):
        parts += [] if group is None else of_groups(group, version)
    return min(parts)


def of_machine(meminfo: str) -> float:
    """By the content of MEMINFO."""
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in meminfo.splitlines())}
    return sizes["MemAvailable"] / sizes["MemTotal"]


def own_group(groups: str, mounts: str) -> Path | None:
    """The directory of our own group (version 2), by the content of GROUPS and MOUNTS; None: we are in none."""
    return _own_directory(groups, mounts, controller="", kind="cgroup2")


def own_memory_group(groups: str, mounts: str) -> Path | None:
    """Likewise of version 1."""
    return _own_directory(groups, mounts, controller="memory", kind="cgroup")


def _own_directory(groups: str, mounts: str, *, controller: str, kind: str) -> Path | None:
    names = (line.split(":", 2)[1:] for line in groups.splitlines())
    path = next((path for controllers, path in names if controller in controllers.split(",")), "/")
    if path == "/" or path.startswith("/.."):
        return None
    for line in mounts.splitlines():
        fields = line.split()
        # After the dash: type, source, options of the file system (proc(5)).
        found, _, options = fields[fields.index("-") + 1 :]
        if found == kind and fields[3] == "/" and (not controller or controller in options.split(",")):
            return Path(fields[4] + path)
    return None


def of_groups(group: Path, version: int) -> Iterator[float]:
    """The part left of each limit that a group is under, its parents' included."""
    while True:
        try:
            found = _of_group_2(group) if version == 2 else _of_group_1(group)
        except OSError as error:
            # The top, a group without the controller, or one that is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return
        yield found
        group = group.parent


def _of_group_2(group: Path) -> float:
    limits = [(group / name).read_text().strip() for name in ("memory.max", "memory.high")]
    stat = _stat(group)
    easy = stat["file"] - stat["shmem"] + stat["slab_reclaimable"]
    limit = min((int(limit) for limit in limits if limit != "max"), default=0)
    return _part(limit, int((group / "memory.current").read_text()), easy)


def _of_group_1(group: Path) -> float:
    stat = _stat(group)
    easy = stat["total_inactive_file"] + stat["total_active_file"]
    limit = int((group / "memory.limit_in_bytes").read_text())
    return _part(limit, int((group / "memory.usage_in_bytes").read_text()), easy)


def _stat(group: Path) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, (group / "memory.stat").read_text().splitlines())}


def _part(limit: int, used: int, easy: int) -> float:
    """``easy``: bytes of ``used`` that can be had back at once. ``limit`` 0: none."""
    return min(1.0, max(0, limit - used + easy) / limit) if limit else 1.0
