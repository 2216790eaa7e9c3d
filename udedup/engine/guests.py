"""What users other than root and the engine's own may take of it: connections, and its time.

An engine has one loop. Each of these users can have a part of it for joining and for control requests, and a part of
the connections; one who wants more waits, and waits for nobody but itself.
"""

from collections import Counter

import attrs
import trio

from udedup.engine.wire import AgentError

REST_PER_WORK = 4
"""Times what an act of a user takes, before the next act of the same user: at most a fifth of the engine's time."""

WAIT_SECONDS = 1.0
"""Who would have to wait longer is turned away: it may be gone by then."""

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

    def comes(self, uid: int) -> bool:
        """One more connection; False: close it at once. Every call is followed by one of :meth:`goes`."""
        self._connections[uid] += 1
        return self._connections[uid] <= self._most(uid) + OVERHANG

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
        if uid in self.own:
            return True
        now = trio.current_time()
        self._free_at = {other: at for other, at in self._free_at.items() if at > now}
        start = self._free_at.get(uid, now)
        if start - now > WAIT_SECONDS:
            return False
        self._free_at[uid] = start + seconds * (1 + REST_PER_WORK)
        await trio.sleep_until(start)
        return True
