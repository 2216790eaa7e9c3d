"""What the kernel says about memory: the check on the engine's own account."""

import os
import time
from collections.abc import Iterable

import attrs

from udedup.engine.native import ffi, lib

OWN_SECONDS = 5.0
"""Reading the engine's own smaps walks all its pages, a millisecond or more: most of what an answer to ``status``
costs, and some ask every second. So the figures may be so old."""


@attrs.frozen
class Smaps:
    """Sums over one process's /proc/PID/smaps, bytes."""

    pss: int
    """All mappings: private memory, plus shared memory divided by the number of its users."""

    store_pss: int
    """Of all mappings of store segments."""

    merged_rss: int
    """Of private mappings of store segments, that is merged runs, copies after a write included."""

    merged_anonymous: int
    """Such copies."""


def read_smaps(pid: int | None) -> Smaps:
    """Reads them for a process, None: for this one. Raises OSError."""
    descriptor = os.open(f"/proc/{'self' if pid is None else pid}/smaps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sums = ffi.new("struct udd_smaps *")
        result = lib.udd_smaps_read(descriptor, sums)
    finally:
        os.close(descriptor)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return Smaps(
        pss=sums.pss,
        store_pss=sums.store_pss,
        merged_rss=sums.merged_rss,
        merged_anonymous=sums.merged_anonymous,
    )


@attrs.define
class OwnSmaps:
    """The engine's."""

    _smaps: Smaps | None = None
    _read_at: float = 0.0

    def look(self) -> Smaps:
        """At most ``OWN_SECONDS`` old."""
        now = time.monotonic()
        if self._smaps is None or now - self._read_at > OWN_SECONDS:
            self._smaps, self._read_at = read_smaps(None), now
        return self._smaps


@attrs.frozen
class KernelView:
    """The same over all agents and the engine."""

    engine: Smaps
    agents: tuple[Smaps, ...]
    unreadable: int
    """Agents that are missing here: gone, or not ours to look at."""

    @property
    def without_store(self) -> "KernelView":
        """The same, but for the engine's part of the stores: it has those of all domains."""
        engine = attrs.evolve(self.engine, pss=self.engine.pss - self.engine.store_pss, store_pss=0)
        return attrs.evolve(self, engine=engine)

    @property
    def pss(self) -> int:
        """Bytes."""
        return self.engine.pss + sum(agent.pss for agent in self.agents)

    @property
    def saved(self) -> int:
        """Bytes that merged runs show, less what the store really takes."""
        shown = sum(agent.merged_rss - agent.merged_anonymous for agent in self.agents)
        # Copies after a write are in Pss as well.
        taken = sum(agent.store_pss - agent.merged_anonymous for agent in self.agents) + self.engine.store_pss
        return shown - taken


def look(pids: Iterable[int]) -> KernelView:
    """Reads all of them; takes milliseconds per process with many mappings, so call it in a thread."""
    agents = []
    unreadable = 0
    for pid in pids:
        try:
            agents.append(read_smaps(pid))
        except OSError:
            unreadable += 1
    return KernelView(read_smaps(None), tuple(agents), unreadable)
