"""Whether the linear scan lends its share of the rate to hints.

A system that reads or writes more than half of the rate lets anyone look at has pages of two processes looked at that
are equal, but seldom both of them: with half of the hints served, every second one served meets nobody. The linear scan
finds next to nothing meanwhile, as memory changes faster than it comes by. So what pays more per page looked at gets
more of the rate.
"""

import attrs

WINDOW_PAGES = 1 << 14
"""What was found among about so many pages of either kind, looked at last, counts: some seconds' at KSM's default."""

LENT = (7, 8)
"""Part of the linear scan's pages that may be lent: it never stops altogether, and is seen to pay again."""


@attrs.define
class Yield:
    """Of one kind of looking, of late: older pages count less and less."""

    visited: float = 0.0
    """Pages looked at."""

    matched: float = 0.0
    """Of them: found to be elsewhere, too."""

    seen: int = 0
    """What :meth:`note` was told last."""

    def note(self, visited: int, matched: int) -> None:
        """``visited`` further pages were looked at; ``matched`` since the beginning, which may lag behind."""
        kept = max(0.0, 1 - visited / WINDOW_PAGES)
        self.visited = self.visited * kept + visited
        self.matched = self.matched * kept + matched - self.seen
        self.seen = matched


@attrs.define
class Lending:
    """See the module."""

    hints: Yield = attrs.field(factory=Yield)
    scan: Yield = attrs.field(factory=Yield)

    def lent(self, pages: int) -> int:
        """How many of these pages of the linear scan's hints may have."""
        if self.hints.matched * self.scan.visited <= self.scan.matched * self.hints.visited:
            return 0
        return pages * LENT[0] // LENT[1]
