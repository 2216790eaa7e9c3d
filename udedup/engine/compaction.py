"""Which segments of a store to retire, so that what dies in it comes back.

A page that nobody refers to any more is not lost at once: who comes next with the same content merges with it. So holes
are left alone for a while. But processes come and go, and each may leave a page or two that live on in an otherwise
dead segment, where no single segment need be nearly empty for the store as a whole to be half dead. Hence two rules:

- a full segment with less than a quarter of its pages in use is retired at once: that costs little and gives much; one
  with the pages that an agent has parked (see ``Agent._take_quietly``), full or not, with less than three quarters:
  whatever others turn out to have leaves it;
- a store of which too little has been in use for a while is compacted, the emptiest segments first, a bounded step at a
  time, until enough of it is in use.
"""

from collections.abc import Collection, Sequence

import attrs

SPARSE = 0.25
"""Part of a full segment that must be in use, or it is retired at once."""

OWN_SPARSE = 0.75
"""Likewise of one with parked pages …"""

OWN_LEAST = 256
"""… once so many of its slots are used."""

LIVE_LEAST = 0.75
"""Part of a store that should be in use …"""

LIVE_AFTER = 0.85
"""… and after it was compacted: the next time is not soon."""

PATIENCE = 10.0
"""How long less may be in use, and the pause between two steps, s."""

DEAD_LEAST = 64
"""Pages: fewer dead ones are not worth the trouble, unless nothing lives at all."""

STEP_REFERENCES = 1 << 15
"""Mappings of pages that a step moves at most; one segment may have more."""


@attrs.frozen
class Fill:
    """A segment that may be retired."""

    number: int
    used: int
    """Pages written."""
    live: int
    """Of them, in use."""
    references: int
    """Mappings of these."""
    growing: bool = False
    """Whether new pages still go there."""
    own: bool = False
    """Whether it is for the pages that one agent has parked."""

    @property
    def sparse(self) -> bool:
        """Whether it is to be retired whatever the others are."""
        if self.growing and (not self.own or self.used < OWN_LEAST):
            return False
        return not self.used or self.live < (OWN_SPARSE if self.own else SPARSE) * self.used


def is_thin(fills: Collection[Fill]) -> bool:
    """Whether too little of a store is in use."""
    used, live = sum(fill.used for fill in fills), sum(fill.live for fill in fills)
    return used > 0 and live < LIVE_LEAST * used and (live == 0 or used - live >= DEAD_LEAST)


def step(fills: Sequence[Fill]) -> list[int]:
    """Numbers of the segments to retire next in a thin store."""
    used, live = sum(fill.used for fill in fills), sum(fill.live for fill in fills)
    references = 0
    chosen: list[int] = []
    for fill in sorted((fill for fill in fills if fill.used), key=lambda fill: fill.live / fill.used):
        references += fill.references
        if (live >= LIVE_AFTER * used and live) or fill.live == fill.used or (chosen and references > STEP_REFERENCES):
            break
        chosen.append(fill.number)
        used -= fill.used - fill.live
    return chosen


class Compaction:
    """Of one store: when it is time for a step."""

    def __init__(self) -> None:
        self._thin_since: float | None = None
        self._growing: dict[int, int] = {}
        """Pages written so far to the segments that new ones go to, by number."""

    def choose(self, fills: Sequence[Fill], now: float, *, patience: float = PATIENCE) -> list[int]:
        """Numbers of the segments to retire now (s); to be asked again and again."""
        chosen = [fill.number for fill in fills if fill.sparse]
        # Pages just written wait for their first mappings: a segment that has new ones is not judged yet.
        before, self._growing = self._growing, {fill.number: fill.used for fill in fills if fill.growing}
        rest = [
            fill for fill in fills if not fill.sparse and (not fill.growing or before.get(fill.number) == fill.used)
        ]
        if not is_thin(rest):
            self._thin_since = None
            return chosen
        if self._thin_since is None:
            self._thin_since = now
        if now - self._thin_since < patience:
            return chosen
        self._thin_since = now
        return chosen + step(rest)
