"""When a linear scan that finds nothing may take it easier.

Memory that nobody writes to is the same in every round: who has looked twice has seen it. So after some rounds in which
nothing matched and next to nothing was new, the pauses get longer. What is read or written to a file is hinted all the
same; and one page that matches, a step that meets memory in motion, or a process that joins ends it at once.
"""

import attrs

ROUNDS = 3
"""A page that keeps still is looked up in the second of so many rounds, and matches what came before in the third."""

SLOWEST = 4
"""The longest pause, in multiples of the usual one."""

IN_MOTION = 16
"""Where more than one page in so many is new or has changed, memory is in motion."""


@attrs.define
class Calm:
    """See the module."""

    factor: int = 1
    """How long pauses are, in multiples of the usual."""

    _rounds: int = 0
    """Without anything found or new."""

    _changed: int = 0
    _matched: int = 0
    _joined: int = 0

    def look(self, visited: int, *, changed: int, matched: int, joined: int) -> None:
        """After a step of the scan of ``visited`` pages. Totals: pages that were new or had ``changed``, pages that
        ``matched``, agents that have ``joined``."""
        in_motion = (changed - self._changed) * IN_MOTION > visited
        if in_motion or matched != self._matched or joined != self._joined:
            self.factor, self._rounds = 1, 0
        self._changed, self._matched, self._joined = changed, matched, joined

    def end_round(self) -> None:
        """The scan has been through all memory."""
        self._rounds += 1
        if self._rounds > ROUNDS:
            self.factor = min(SLOWEST, 2 * self.factor)
