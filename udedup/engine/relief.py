"""What the engine does about memory pressure (``udedup.engine.pressure``)."""

import gc
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import attrs

from udedup.engine.advisor import Pace, affordable
from udedup.engine.domain import Domain
from udedup.engine.hints import HintStack
from udedup.engine.native import lib
from udedup.engine.pressure import Level, PressureState
from udedup.engine.shortage import Shortage

log = logging.getLogger(__name__)

CANDIDATES_MOST = 1 << 16
"""Candidates of a domain while the level is FULL: 2.7 MB of index."""

BOOST = 4
"""So many times as many pages are scanned, if they cost no more CPU than …"""

CPU_MOST = 70.0
"""… so many percent of one processor (KSM's ``advisor_max_cpu``), where no advisor says otherwise."""

COST_ASSUMED = 10e-6
"""CPU of a page before the first scan of all memory has told, s."""


class Digested(Protocol):
    """An image in the mount."""

    @property
    def openers(self) -> object:
        """True if somebody has it open."""

    def forget_digests(self) -> None:
        """Gives the memory of its digests back."""


class EagerPace:
    """Another pace, or more than that while there is pressure."""

    def __init__(self, pace: Pace, state: PressureState, *, sleep_seconds: float, max_cpu: float) -> None:
        """``sleep_seconds``: between two spurts; 0: there is no rate that could be raised. ``max_cpu``: %."""
        self._pace = pace
        self._state = state
        self._sleep = sleep_seconds
        self._max_cpu = max_cpu
        self._cost = COST_ASSUMED
        self._boosted = False

    @property
    def pages_to_scan(self) -> int:
        """Pages of the next spurt."""
        pages = self._pace.pages_to_scan
        if not self._sleep or self._state.level == Level.NONE:
            return pages
        self._boosted = True
        return max(pages, int(min(BOOST * pages, affordable(self._max_cpu, self._sleep, self._cost))))

    @property
    def may_rest(self) -> bool:
        """Not while memory is short."""
        return self._pace.may_rest and self._state.level == Level.NONE

    def end_round(self, *, seconds: float, visited: int, cpu_seconds: float) -> None:
        """Passes it on, unless the round was not made at that pace."""
        if visited and cpu_seconds > 0:
            self._cost = cpu_seconds / visited
        if not self._boosted:
            self._pace.end_round(seconds=seconds, visited=visited, cpu_seconds=cpu_seconds)
        self._boosted = False


@attrs.frozen
class Caches:
    """What can be given back, and who does that."""

    domains: Callable[[], Iterable[Domain]]
    hints: HintStack
    images: Callable[[], Iterable[Digested]]
    shortage: Shortage
    retire: Callable[[], None]
    """Gives sparse segments back."""

    def ease(self, level: Level, before: Level) -> None:
        """See pressure.Relief."""
        critical = level == Level.FULL
        self.shortage.caches_may_grow = not critical
        for domain in self.domains():
            domain.index.set_most(CANDIDATES_MOST if critical else None)
        if critical and before != Level.FULL:
            self._drop()
        if level > before:
            self.retire()

    def _drop(self) -> None:
        """Once each time it gets critical: what comes in afterwards is bounded, and the best that there is to go by."""
        candidates = sum(domain.index.forget_candidates() for domain in self.domains())
        hints = self.hints.clear()
        for image in self.images():
            if not image.openers:
                image.forget_digests()
        gc.collect()
        lib.udd_memory_trim()
        log.warning("memory is critically short: dropped %d candidates and %d hints", candidates, hints)
