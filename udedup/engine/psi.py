"""How long tasks waited for memory, by the kernel (pressure stall information, Documentation/accounting/psi.rst there).

Of the whole machine, and of the engine's own control group (version 2) where it has one. A trigger makes the kernel
tell of a stall as it comes (POLLPRI), so that nobody has to look while there is none.
"""

import os
import select
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import attrs
import trio

from udedup.engine.headroom import GROUPS, MOUNTS, own_group

SYSTEM = Path("/proc/pressure/memory")
GROUP_FILE = "memory.pressure"

TRIGGER = b"some 100000 2000000\0"
"""Tell when some task waited for 100 ms within 2 s: the shortest time in which anybody may have it watched.

With its NUL: the kernel puts one in place of the last byte."""

TRIGGER_PART = 0.05
"""The same as a part of time."""

RARE = 5
"""With triggers one looks so many times more rarely: now and then the kernel's news get lost between two epolls."""


@attrs.frozen
class Totals:
    """Since the beginning, s."""

    some: float
    """Time in which at least one task waited for memory."""

    full: float
    """Time in which all that could have run waited for it."""


class Pressure(Protocol):
    """Where it is read."""

    def read(self) -> list[Totals]:
        """Of all that is watched; fewer from the time on when one is gone."""

    async def wait(self) -> bool:
        """Until the kernel tells of a stall (True), or it is time to look oneself (False)."""


def parse(text: str) -> Totals:
    """The content of such a file. Raises ValueError."""
    found = {}
    for line in text.splitlines():
        kind, *fields = line.split()
        found[kind] = int(dict(field.split("=") for field in fields)["total"]) / 1e6
    return Totals(found["some"], found.get("full", 0.0))


def files() -> list[Path]:
    """All that are there to be watched; none if the kernel does without."""
    wanted = [SYSTEM]
    if (own := own_group(GROUPS.read_text(), MOUNTS.read_text())) is not None:
        wanted.append(own / GROUP_FILE)
    return [path for path in wanted if readable(path)]


def readable(path: Path) -> bool:
    """Whether such a file has what it should: it may be there and yet fail, where the kernel was started without."""
    try:
        parse(path.read_text())
    except OSError:
        return False
    return True


class PressureFiles:
    """The kernel's files, with triggers where it lets us have them. A context manager."""

    def __init__(self, paths: Iterable[Path], *, period: float) -> None:
        """``period``: how often to look where there is no trigger, s. Raises OSError."""
        self._period = period
        self._descriptors: list[int] = []
        self._untold = False
        self._told = select.epoll()
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            # Not ours to write to: it will be looked at.
            self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self._untold = True
            return
        self._descriptors.append(descriptor)
        try:
            # Fails for what can't tell, such as a plain file, into which nothing must be written then.
            self._told.register(descriptor, select.EPOLLPRI)
            self._told.unregister(descriptor)
            os.write(descriptor, TRIGGER)
            self._told.register(descriptor, select.EPOLLPRI)
        except OSError:
            self._untold = True

    def __enter__(self) -> "PressureFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._told.close()

    def read(self) -> list[Totals]:
        """See Pressure. A control group that is gone is not watched any more."""
        totals = []
        # What was told until now shows in what is read.
        self._told.poll(0)
        for descriptor in list(self._descriptors):
            try:
                totals.append(parse(os.pread(descriptor, 4096, 0).decode("ascii")))
            except OSError:
                self._descriptors.remove(descriptor)
                os.close(descriptor)
        return totals

    async def wait(self) -> bool:
        """See Pressure."""
        told = False
        with trio.move_on_after(self._period if self._untold else RARE * self._period):
            await trio.lowlevel.wait_readable(self._told.fileno())
            told = True
        # Asking takes the news away, so that only errors are still to be seen: those of a group that is gone stay.
        for descriptor, event in self._told.poll(0):
            if event & select.EPOLLERR:
                self._told.unregister(descriptor)
                told = False
        return told
