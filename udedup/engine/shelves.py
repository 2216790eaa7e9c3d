"""Which trust domain's store a reader of the mount may be served from: its own, and no other.

Whether a block comes from memory or from the disk shows in the time it takes. A reader must not learn in this way
what another domain's processes have in memory, so only the store of the domain that it is itself in is looked at, and
nothing of what is remembered is common to two domains.
"""

import os
from collections.abc import Callable, Iterable

from udedup.engine.accounting import Counters
from udedup.engine.agent import Agent
from udedup.vdi.images import Image
from udedup.vdi.openers import Opener
from udedup.vdi.shelf import Shelf


class Shelves:
    """Finds and makes the shelves, which each domain keeps."""

    def __init__(self, agents: Callable[[], Iterable[Agent]], counters: Counters) -> None:
        """``agents``: those connected now."""
        self.blocks = counters.blocks
        self._agents = agents
        self._counters = counters

    @property
    def turn(self) -> int:
        """See ShelfSource."""
        return self._counters.agents_joined

    def find(self, image: Image, opener: Opener) -> Shelf | None:
        """See ShelfSource."""
        for agent in self._agents():
            if (agent.peer.pid, agent.peer.uid) == (opener.pid, opener.uid) and opener.there:
                return agent.domain.shelf(image, self.blocks)
        return None

    def may_know_all(self, uid: int) -> bool:
        """See ShelfSource."""
        return uid in (0, os.geteuid())
