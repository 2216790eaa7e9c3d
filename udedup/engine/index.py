"""The index of one trust domain: which store slot, or else which candidate, has a page with this digest.

A thin cover over native/engine/index.c, which says how it works.
"""

import attrs

from udedup.engine.native import CData, ffi, lib
from udedup.engine.wire import check

SIZE_MAX = 2**64 - 1


@attrs.frozen
class Matches:
    """Reported pages that the index knows elsewhere, sorted by address."""

    array: CData
    """struct udd_match[]."""

    count: int

    def without_alone(self, agent: int) -> "Matches":
        """Those of an agent that match more than themselves."""
        array = ffi.new("struct udd_match[]", self.count)
        return Matches(array, lib.udd_matches_without_alone(agent, self.array, self.count, array))


class Index:
    """Digest → place, for all agents of a domain."""

    def __init__(self) -> None:
        self.handle = ffi.gc(lib.udd_index_create(), lib.udd_index_destroy)
        if self.handle == ffi.NULL:
            raise MemoryError

    @property
    def candidates(self) -> int:
        """Pages seen once, parked ones included."""
        return int(lib.udd_index_candidates(self.handle))

    @property
    def shared(self) -> int:
        """Store pages that can be found."""
        return int(lib.udd_index_shared(self.handle))

    @property
    def size(self) -> int:
        """Memory of the index, bytes."""
        return int(lib.udd_index_bytes(self.handle))

    def set_limit(self, agent: int, pages: int) -> None:
        """Most candidates of an agent; needed before its first look-up."""
        check(lib.udd_index_set_limit(self.handle, agent, min(pages, 0xFFFFFFFF)), "a limit")

    def look_up(self, agent: int, reports: CData, count: int, *, alone: int = lib.UDD_ALONE_CANDIDATE) -> Matches:
        """Looks up struct udd_report[]; ``alone``: what becomes of what is found nowhere else (enum udd_alone).

        Raises AgentError on an impossible address.
        """
        matches = ffi.new("struct udd_match[]", count)
        counts = ffi.new("struct udd_lookup_counts *")
        found = lib.udd_index_lookup(self.handle, agent, reports, count, alone, matches, counts)
        check(found, "an address it reported, or where it says its copy is,")
        lib.udd_matches_sort(matches, found)
        return Matches(matches, found)

    def next_round(self, agent: int) -> None:
        """An agent's linear scan reached the end of its memory."""
        lib.udd_index_next_round(self.handle, agent)

    def age(self) -> int:
        """Removes candidates not confirmed for two rounds; returns how many."""
        return int(lib.udd_index_age(self.handle))

    def forget_agent(self, agent: int) -> int:
        """Removes an agent's candidates; returns how many."""
        return int(lib.udd_index_forget_agent(self.handle, agent))

    def set_most(self, candidates: int | None) -> None:
        """Most candidates of all agents together, parked ones apart; None: without a limit."""
        lib.udd_index_set_most(self.handle, SIZE_MAX if candidates is None else candidates)

    def forget_candidates(self) -> int:
        """Removes all candidates but parked ones and gives their memory back; returns how many."""
        return int(lib.udd_index_forget_candidates(self.handle))

    def forget_segment(self, segment: int) -> int:
        """Removes what leads to a segment; returns how many digests."""
        return int(lib.udd_index_forget_segment(self.handle, segment))
