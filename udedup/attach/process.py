"""What ``/proc`` tells of a program."""

import os
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from udedup.errors import UdedupError

_AUXILIARY = struct.Struct("=QQ")
_STAT_FLAGS, _STAT_STACK_START = 6, 25
"""Fields of /proc/PID/stat (proc_pid_stat(5)) behind the command's name, counted from 0."""


class Mapping(NamedTuple):
    """One line of ``/proc/PID/maps``."""

    start: int
    """Its first address."""

    end: int
    """The address behind its last."""

    executable: bool
    """Whether code runs there."""

    offset: int
    """Where in the file it begins, bytes."""

    inode: int
    """Of the file; 0: there is none."""

    path: str
    """Of the file, as the program's namespace has it; or what the kernel calls it; or empty."""

    @property
    def deleted(self) -> bool:
        """Whether the file has been deleted or replaced since."""
        return self.path.endswith(" (deleted)")


class Process:
    """A program, by its pid. Its files are read when they are asked for, and again each time unless said otherwise."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.folder = Path("/proc") / str(pid)

    @cached_property
    def status(self) -> dict[str, str]:
        """Fields of ``/proc/PID/status``, as they were at first. Raises UdedupError if there is no such process."""
        try:
            lines = (self.folder / "status").read_text(errors="replace").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            raise UdedupError(f"there is no process {self.pid}") from None
        fields = (line.partition(":") for line in lines)
        return {name: value.strip() for name, _, value in fields}

    def __str__(self) -> str:
        return f"process {self.pid} ({self.status['Name']})"

    def _stat(self, field: int) -> int:
        return int((self.folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[field])

    @property
    def flags(self) -> int:
        """The kernel's ``PF_…`` bits."""
        return self._stat(_STAT_FLAGS)

    @property
    def stack_start(self) -> int:
        """Where its first thread's stack begins, from above; 0 for who may not know."""
        return self._stat(_STAT_STACK_START)

    def maps(self) -> list[Mapping]:
        """Its mappings, in order. Raises OSError for who may not know."""
        return list(self._read_maps())

    def _read_maps(self) -> Iterator[Mapping]:
        with (self.folder / "maps").open(errors="surrogateescape") as file:
            for line in file:
                addresses, permissions, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
                start, end = (int(address, 16) for address in addresses.split("-"))
                yield Mapping(start, end, permissions[2] == "x", int(offset, 16), int(inode), path[0] if path else "")

    def root(self, path: str | Path) -> Path:
        """Returns by which path we see what is ``path`` to the program."""
        return self.folder / "root" / str(path).lstrip("/")

    def auxiliary(self) -> dict[int, int]:
        """What the kernel told it when it started, by type (getauxval(3)). Raises OSError for who may not know."""
        data = (self.folder / "auxv").read_bytes()
        return dict(_AUXILIARY.iter_unpack(data[: len(data) - len(data) % _AUXILIARY.size]))

    def limit(self, name: str) -> int | None:
        """Returns the soft limit that ``/proc/PID/limits`` calls so, None if there is none."""
        for line in (self.folder / "limits").read_text().splitlines():
            if line.startswith(name):
                value = line[len(name) :].split()[0]
                return None if value == "unlimited" else int(value)
        raise KeyError(name)

    def tasks(self) -> list[Path]:
        """The folders of its threads."""
        return list((self.folder / "task").iterdir())

    def read(self, address: int, size: int) -> bytes:
        """Reads its memory. Raises OSError for who may not, and UdedupError if there is none."""
        with (self.folder / "mem").open("rb", buffering=0) as memory:
            data = os.pread(memory.fileno(), size, address)
        if len(data) != size:
            raise UdedupError(f"{self} ends")
        return data
