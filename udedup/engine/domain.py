"""Trust domains: pages are compared and shared only inside one.

A process's domain is the user it runs as, from the kernel, and a label that this user may use; where the configuration
says so, several users share one label's domain. Each domain has its own index and its own store.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from udedup.engine.index import Index
from udedup.engine.link import Strays
from udedup.engine.store import Segment, SegmentNumbers, Store, segment_prefix
from udedup.engine.wire import AgentError
from udedup.labels import OFF, PRIVATE, RESERVED

if TYPE_CHECKING:
    from udedup.vdi.images import Image
    from udedup.vdi.shelf import Shelf, ShelfCounters

TURN_SECONDS = 0.02
"""How long an agent's pages wait for another's to be stored."""

UID_MAP = Path("/proc/self/uid_map")
OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")


@attrs.frozen
class DomainKey:
    """What tells one domain from another: processes with equal keys may share."""

    uid: int | None
    """The user; None: of all users who may use the label."""

    label: str
    """Empty: none."""

    agent: int = 0
    """Number of the one agent that is in it; 0: there may be many."""

    @property
    def owner(self) -> str:
        """Whose it is, without a hyphen."""
        owner = "shared" if self.uid is None else str(self.uid)
        return f"{owner}.{self.agent}" if self.agent else owner


def unmapped_uid() -> int | None:
    """As which uid all users appear whom the engine's user namespace doesn't know; None if it knows every user."""
    fields = UID_MAP.read_text(encoding="ascii").split()
    if fields == ["0", "0", str(0xFFFFFFFF)]:
        return None
    return int(OVERFLOW_UID.read_text(encoding="ascii"))


@attrs.frozen
class DomainRules:
    """Who may use which label."""

    own_uid: int
    """The engine's user."""

    allowed: frozenset[tuple[int, str]]
    """Further (uid, label) pairs."""

    shared: frozenset[str] = frozenset()
    """Labels whose users are in one domain: those of ``allowed`` only, root and the engine's user must be named too."""

    unmapped_uid: int | None = None
    """A uid that may be anybody's (see :func:`unmapped_uid`): such processes share with themselves only."""

    def permits(self, uid: int, label: str) -> bool:
        """Whether processes of ``uid`` may ask for ``label``; the empty one and the reserved ones are everybody's."""
        return not label or label in RESERVED or uid in (0, self.own_uid) or (uid, label) in self.allowed

    def key(self, uid: int, label: str, agent: int) -> DomainKey:
        """The domain of an agent. Raises AgentError if it may not be in one."""
        if not self.permits(uid, label):
            raise AgentError(self.explain(uid, label))
        if label == OFF:
            raise AgentError("it asked to be left alone: its domain label is 'off'")
        if label == PRIVATE or uid == self.unmapped_uid:
            return DomainKey(uid, PRIVATE, agent)
        if label in self.shared and (uid, label) in self.allowed:
            return DomainKey(None, label)
        return DomainKey(uid, label)

    def explain(self, uid: int, label: str) -> str:
        """Why not, and what to do."""
        return (
            f"domain label {label!r} is not allowed for uid {uid}: name the user under [domains] in udedup.toml, "
            f"or start the engine with --allow-domain {uid}:{label}"
        )


class Domain:
    """One trust domain."""

    def __init__(self, key: DomainKey, numbers: SegmentNumbers) -> None:
        self.key = key
        self.index = Index()
        self.store = Store(numbers, segment_prefix(key.owner, key.label))
        self.adopting = trio.Lock()
        """Held while one segment of an earlier engine is looked at."""
        self.strays = Strays()
        """Of its agents."""
        self.recounts = 0
        """Agents whose references are being counted anew: until that is done, too few are known."""
        self.shelves: dict[int, Shelf] = {}
        """Of images in the engine's mount, by inode: their blocks that are in this store."""
        self.own: dict[int, Index] = {}
        """By agent: which of its own slots has what it parks (see ``Agent._take_quietly``)."""
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

    def shelf(self, image: "Image", counters: "ShelfCounters") -> "Shelf":
        """The shelf of an image in the engine's mount. Raises MemoryError."""
        from udedup.vdi.shelf import Shelf

        if image.inode not in self.shelves:
            self.shelves[image.inode] = Shelf(
                image.watch,
                image.blocks,
                image.digests,
                store=self.store.handle,
                index=self.index.handle,
                counters=counters,
            )
        return self.shelves[image.inode]

    def index_of(self, segment: Segment) -> Index:
        """What leads to the slots of a segment; to an agent's own that is gone, nothing."""
        return self.own.get(segment.owner) or Index() if segment.owner else self.index

    @property
    def label(self) -> str:
        """Of its processes; empty: none."""
        return self.key.label

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.key.owner}:{self.label}" if self.label else self.key.owner


class Domains:
    """All domains of one engine."""

    def __init__(self, rules: DomainRules, numbers: SegmentNumbers) -> None:
        self.rules = rules
        self._numbers = numbers
        self._domains: dict[DomainKey, Domain] = {}

    def __iter__(self) -> Iterator[Domain]:
        return iter(list(self._domains.values()))

    @contextmanager
    def membership(self, uid: int, label: str, agent: int) -> Iterator[Domain]:
        """The domain of an agent, for as long as it is there. Raises AgentError if it may not be in one.

        A domain that nobody else can ever be in ends with its agent.
        """
        key = self.rules.key(uid, label, agent)
        if key not in self._domains:
            self._domains[key] = Domain(key, self._numbers)
        try:
            yield self._domains[key]
        finally:
            if key.agent:
                self._domains.pop(key).store.close()
