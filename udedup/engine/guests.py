"""What users other than root and the engine's own may take of it: connections, its time, and lines in its log.

An engine has one loop. Each of these users can have a part of it for connecting, for joining and for control requests,
and a part of the connections; one who wants more waits, and waits for nobody but itself.
"""

import logging
import math
from collections import Counter

import attrs
import trio

from udedup.engine.wire import AgentError

REST_PER_WORK = 4
"""Times what an act of a user takes, before the next act of the same user: at most a fifth of the engine's time."""

WAIT_SECONDS = 1.0
"""Who would have to wait longer is turned away: it may be gone by then."""

CONNECT_SECONDS = 0.0002
"""What a connection takes that comes to nothing."""

LINES = 20
LINES_SECONDS = 60.0
"""So many lines about one user may be logged in this time: the disk is everybody's."""

CONNECTIONS_PART = 4
"""One part in this many of all connections is the most that one user can have."""

OVERHANG = 64
"""Connections beyond that which are told why they are refused; further ones are just closed."""


@attrs.define
class Guests:
    """All users; nothing is kept of one who has neither a connection nor to wait."""

    own: frozenset[int]
    """Uids that may have all."""

    connections_max: int
    """Of all users together."""

    _connections: Counter[int] = attrs.field(factory=Counter)
    _free_at: dict[int, float] = attrs.field(factory=dict)
    """When a user may act again, s of trio's clock."""
    _lines: Counter[int] = attrs.field(factory=Counter)
    _lines_since: float = -math.inf

    def comes(self, uid: int) -> bool:
        """One more connection, which :meth:`goes` is to be told the end of; False: not this one, close it at once."""
        if self._connections[uid] >= self._most(uid) + OVERHANG or self._put_off(uid, CONNECT_SECONDS) is None:
            return False
        self._connections[uid] += 1
        return True

    def goes(self, uid: int) -> None:
        """One connection less."""
        self._connections[uid] -= 1
        if not self._connections[uid]:
            del self._connections[uid]

    def check_room(self, uid: int) -> None:
        """Raises AgentError if there are too many connections."""
        # Those that one user has beyond its part are on their way out, and must not cost others their place.
        if sum(min(count, self._most(other)) for other, count in self._connections.items()) > self.connections_max:
            raise AgentError(f"there are {self.connections_max} connections already")
        if self._connections[uid] > self._most(uid):
            raise AgentError(f"there are {self._most(uid)} connections of uid {uid} already")

    def _most(self, uid: int) -> int:
        return self.connections_max if uid in self.own else max(1, self.connections_max // CONNECTIONS_PART)

    async def turn(self, uid: int, seconds: float) -> bool:
        """Returns when a user may do something that takes ``seconds``; False, at once, if that would be late."""
        start = self._put_off(uid, seconds)
        if start is None:
            return False
        if uid not in self.own:
            await trio.sleep_until(start)
        return True

    def _put_off(self, uid: int, seconds: float) -> float | None:
        """When a user may begin what takes ``seconds``; None: it has too much waiting already."""
        now = trio.current_time()
        if uid in self.own:
            return now
        self._free_at = {other: at for other, at in self._free_at.items() if at > now}
        start = self._free_at.get(uid, now)
        if start - now > WAIT_SECONDS:
            return None
        self._free_at[uid] = start + seconds * (1 + REST_PER_WORK)
        return start

    def heard_of(self, uid: int) -> int:
        """The level at which to log what a user did wrong: a warning, but not for ever the same."""
        now = trio.current_time()
        if now - self._lines_since > LINES_SECONDS:
            self._lines.clear()
            self._lines_since = now
        self._lines[uid] += 1
        return logging.WARNING if uid in self.own or self._lines[uid] <= LINES else logging.DEBUG
