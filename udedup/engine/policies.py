"""How pages are chosen: the policies by name. Nothing heavy is imported here, the command line needs the names.

- ``linear``: KSM's; memory is scanned in turns.
- ``xlh``: hint spurts and scan spurts take turns, with the given ratio (XLH, USENIX ATC 2013). While more hints come
  than that lets it serve, and the pages they name match more often than those of the scan, they get most of the scan's
  spurts, too (see lending.py).
- ``eager``: the same, but hints are served at once, out of the allowance of up to half a minute ahead, which the scan
  gives back later; and a block of an image is put into the store, and its reader merged with it, at its first read, so
  that the next reader finds it there (as Satori, USENIX ATC 2009, does at the block device). The scan looks a page up
  at its first sight of it, too, not only in the next round if it has kept still: what a kernel unpacks into its memory
  at boot is seldom written again.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import NamedTuple

EAGER_AHEAD_SECONDS = 30.0
"""A system that starts reads a few hundred MB faster than KSM's default rate takes them in."""

RATIO_MAX = 1000
"""Of hint spurts and of scan spurts: whichever is the lesser part would hardly ever come to its turn beyond that."""


class Policy(NamedTuple):
    """A policy in the scheduler's terms."""

    hint_runs: int
    """Spurts for hints, before …"""

    scan_runs: int
    """… so many of the linear scan. What hints leave over goes to the scan, too."""

    ahead_seconds: float = 0.0
    """How much of the rate limit's future hints may use up, in seconds of it."""

    shares_first_read: bool = False
    """Whether an image block that is in one place only is shared with the store."""

    first_sight: bool = False
    """Whether the linear scan looks up pages that it sees for the first time."""

    lends: bool = True
    """Whether hints may have the linear scan's spurts, too, while it finds less."""

    rests: bool = True
    """Whether the linear scan may make longer pauses once it finds nothing."""

    def spurts(self) -> Iterator[bool]:
        """For ever: whether the next spurt takes hints first."""
        return cycle([True] * self.hint_runs + [False] * self.scan_runs)


POLICIES: Mapping[str, Callable[[int, int], Policy]] = {
    "linear": lambda _hint_runs, _scan_runs: Policy(0, 1, rests=False),
    "xlh": Policy,
    "eager": lambda hint_runs, scan_runs: Policy(
        hint_runs, scan_runs, EAGER_AHEAD_SECONDS, shares_first_read=True, first_sight=True
    ),
}
"""Made from the ratio of hint spurts to scan spurts."""
