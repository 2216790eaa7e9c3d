"""Trust domains: pages are compared and shared only inside one.

A process's domain is the user it runs as, from the kernel, and a label that this user may use. Each domain has its own
index and its own store.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from udedup.engine.index import Index
from udedup.engine.link import Strays
from udedup.engine.store import SegmentNumbers, Store, segment_prefix
from udedup.engine.wire import AgentError

TURN_SECONDS = 0.02
"""How long an agent's pages wait for another's to be stored."""


@attrs.frozen
class DomainRules:
    """Who may use which label."""

    own_uid: int
    """The engine's user."""

    allowed: frozenset[tuple[int, str]]
    """Further (uid, label) pairs."""

    def permits(self, uid: int, label: str) -> bool:
        """Whether processes of ``uid`` may be in their user's domain ``label``; the empty one is everybody's."""
        return not label or uid in (0, self.own_uid) or (uid, label) in self.allowed

    def check(self, uid: int, label: str) -> None:
        """Raises AgentError if not."""
        if not self.permits(uid, label):
            raise AgentError(self.explain(uid, label))

    def explain(self, uid: int, label: str) -> str:
        """Why not, and what to do."""
        return (
            f"domain label {label!r} is not allowed for uid {uid}: start the engine with --allow-domain {uid}:{label}"
        )


class Domain:
    """One trust domain."""

    def __init__(self, uid: int, label: str, numbers: SegmentNumbers) -> None:
        self.uid = uid
        self.label = label
        self.index = Index()
        self.store = Store(numbers, segment_prefix(uid, label))
        self.adopting = trio.Lock()
        """Held while one segment of an earlier engine is looked at."""
        self.strays = Strays()
        """Of its agents."""
        self.recounts = 0
        """Agents whose references are being counted anew: until that is done, too few are known."""
        self._publishing = trio.Lock()

    @asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[None]:
        """While one agent's pages go into the store, others wait a little, so that its slots follow each other.

        A little only: it may be stopped in the middle. Then slots are mixed: runs are shorter, nothing is harmed.
        """
        with trio.move_on_after(TURN_SECONDS) as waiting:
            await self._publishing.acquire()
        try:
            yield
        finally:
            if not waiting.cancelled_caught:
                self._publishing.release()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.uid}:{self.label}" if self.label else str(self.uid)
