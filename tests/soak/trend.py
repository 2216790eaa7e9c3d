"""Whether a number that was looked at again and again grows: for leaks, which grow for as long as one looks.

Noise and single outliers must not count, nor what is filled once and then stays. So what went before the warm-up is
over does not count; the slope is the median of those between all pairs of samples (Theil and Sen), which a third of
wild samples can't move; and the last quarter must lie above the first by more than what is allowed, too.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Final

import attrs

WARM_UP: Final = 0.25
"""Part of a run that does not count."""

LEAST_SAMPLES: Final = 8
"""Of what counts, or nothing can be said."""

ENDS: Final = 4
"""The first and the last of so many parts are compared."""

SAMPLES_MAX: Final = 300
"""More are thinned out: there are as many pairs as the square of it."""


@attrs.frozen
class Allowance:
    """How much something may grow over all that counts of a run."""

    absolute: float
    """In its own unit; or, if that is more, …"""

    part: float = 0.0
    """… so much of what it was after the warm-up."""

    def of(self, base: float) -> float:
        """What it is for something that was ``base``."""
        return max(self.absolute, self.part * base)


@attrs.frozen
class Trend:
    """What became of a number."""

    first: float
    """Median of the first quarter of what counts."""
    last: float
    """Median of the last quarter."""
    growth: float
    """By the slope, over all that counts."""
    allowed: float
    """Growth."""

    @property
    def grows(self) -> bool:
        """Whether it does, beyond doubt and beyond what is allowed."""
        return min(self.growth, self.last - self.first) > self.allowed


def trend(at: Sequence[float], values: Sequence[float], allowance: Allowance) -> Trend:
    """Judges samples: ``values`` at the places ``at``, ascending (seconds, or processes that had ended).

    Raises ValueError if there are too few.
    """
    begin = at[0] + WARM_UP * (at[-1] - at[0]) if at else 0.0
    samples = [(x, y) for x, y in zip(at, values, strict=True) if x >= begin]
    samples = samples[:: -(-len(samples) // SAMPLES_MAX)] if samples else []
    if len(samples) < LEAST_SAMPLES:
        raise ValueError(f"{len(samples)} samples after the warm-up are too few, {LEAST_SAMPLES} are needed")
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(samples, 2) if x2 > x1]
    quarter = max(1, len(samples) // ENDS)
    first = median(y for _, y in samples[:quarter])
    return Trend(
        first=first,
        last=median(y for _, y in samples[-quarter:]),
        growth=median(slopes) * (samples[-1][0] - samples[0][0]),
        allowed=allowance.of(first),
    )
