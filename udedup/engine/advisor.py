"""How many pages a spurt visits: a fixed number, or one that an advisor sets, as KSM's ``scan-time`` advisor does.

Memory grows and shrinks; a rate that is right for a busy host wastes CPU on an idle one. With the advisor one says how
long a scan of all memory should take, and how much CPU it may cost at most, and ``pages_to_scan`` follows from that
(the kernel's Documentation/admin-guide/mm/ksm.rst, whose names and defaults these are).
"""

import math
from typing import Protocol

import attrs

SMOOTHING = 0.3
"""Weight of the newest round in the exponentially weighted moving average: one odd round must not turn everything."""


class Pace(Protocol):
    """Tells the scheduler how many pages a spurt has."""

    @property
    def pages_to_scan(self) -> int:
        """Pages of the next spurt."""

    @property
    def may_rest(self) -> bool:
        """Whether a linear scan may take longer than this makes it."""

    def end_round(self, *, seconds: float, visited: int, cpu_seconds: float) -> None:
        """The linear scan has been through all memory: in ``seconds``, sleeps included, during which ``visited`` pages
        were looked at, hinted ones included, at a cost of ``cpu_seconds``."""


@attrs.frozen
class FixedPace:
    """What the user said."""

    pages_to_scan: int

    @property
    def may_rest(self) -> bool:
        """It is a limit."""
        return True

    def end_round(self, *, seconds: float, visited: int, cpu_seconds: float) -> None:
        """Changes nothing."""


@attrs.frozen
class ScanTimeTarget:
    """What the advisor is to reach."""

    seconds: float = 200.0
    """A scan of all memory should take this long, s."""

    max_cpu: float = 70.0
    """The engine and all agents together may use so much of one processor, %: this goes before the scan time."""

    min_pages_to_scan: int = 500
    """Never fewer pages in a spurt, except to keep within ``max_cpu``."""

    max_pages_to_scan: int = 30000
    """Never more pages in a spurt."""


class ScanTimePace:
    """Sets ``pages_to_scan`` at the end of each round."""

    def __init__(self, target: ScanTimeTarget, *, pages_to_scan: int, sleep_seconds: float) -> None:
        """``pages_to_scan``: to begin with; ``sleep_seconds``: between two spurts, above 0."""
        self._target = target
        self._sleep = sleep_seconds
        self._pages = float(min(max(pages_to_scan, target.min_pages_to_scan), target.max_pages_to_scan))

    @property
    def pages_to_scan(self) -> int:
        """Pages of the next spurt."""
        return max(1, int(self._pages))

    @property
    def may_rest(self) -> bool:
        """The scan is to take as long as was said."""
        return False

    def end_round(self, *, seconds: float, visited: int, cpu_seconds: float) -> None:
        """Moves towards what would have been right for this round, within the bounds."""
        target = self._target
        right = self._pages * seconds / target.seconds
        smoothed = (1 - SMOOTHING) * self._pages + SMOOTHING * right
        self._pages = min(max(smoothed, target.min_pages_to_scan), target.max_pages_to_scan)
        if visited and cpu_seconds > 0:
            self._pages = min(self._pages, affordable(target.max_cpu, self._sleep, cpu_seconds / visited))


def affordable(max_cpu: float, sleep: float, cost: float) -> float:
    """Pages of a spurt that takes ``max_cpu`` % of the time, its sleep of ``sleep`` s included, at ``cost`` s of CPU a
    page."""
    share = max_cpu / 100
    # A spurt of n pages takes at least n * cost, then sleeps: n * cost <= share * (n * cost + sleep).
    return share * sleep / (cost * (1 - share)) if share < 1 else math.inf
