"""One agent as the engine sees it: its connection, its shared area, its references, and the work done with it.

All requests to an agent are made by one task, :meth:`Agent.work`, from a bounded queue of jobs: an agent that is slow
or stopped delays its own jobs only. An agent that breaks the rules makes that task raise, and the server drops it.
"""

import contextlib
import errno
import logging
import math
import os
import struct
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import attrs
import trio

from udedup.engine import hugepages, planner
from udedup.engine.accounting import Counters
from udedup.engine.adoption import Handover
from udedup.engine.domain import Domain
from udedup.engine.hints import Hinted, HintRing
from udedup.engine.hugepages import Areas, HugePages
from udedup.engine.index import Index, Matches
from udedup.engine.link import Answer, Link, Peer
from udedup.engine.native import CData, ffi, lib
from udedup.engine.planner import Fresh, Runs, Targets
from udedup.engine.shortage import Shortage
from udedup.engine.store import Segment
from udedup.engine.wire import (
    COPIED_BYTES,
    CURSOR_TAIL,
    HEADER,
    HUGE_ANSWER_BYTES,
    ITEMS_MAX,
    PAGE,
    RANGE_BYTES,
    REPORT_BYTES,
    REPORTS_BYTES,
    REPORTS_MAX,
    RESULT_BYTES,
    RUN_BYTES,
    SCAN_MAX,
    SCAN_TAIL,
    SEGMENT_SLOTS,
    SEGMENT_TAIL,
    AgentError,
    Hello,
    check,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

QUEUE_JOBS = 64
"""Jobs that may wait for an agent."""

RUNS_MAX = 1 << 20
"""Runs of one process; the kernel allows 65530 mappings unless raised."""

LOOK, RECOUNT = 0, 1
"""Why UDD_RUNS is asked: header.value of the request."""

SKIPS_MAX = 2 * SCAN_MAX * lib.UDD_SKIPS_PER_VISIT
"""More pages than an agent may pass over in one step."""

UNMERGE_SECONDS = 300.0

AREA_SECONDS = 120.0
"""Least age at which it is asked again how much of a shared area is there, for those who ask often: it takes 0.1 ms."""

CANDIDATES_PER_PAGE = 2
"""Candidates an agent may have per resident page: stale ones wait for two rounds."""

PUBLISH_AT_ONCE = 64
"""Pages that go into the store while nobody else has a turn: 512 would take 2 ms."""

PUBLISH_SECONDS = 2.0
"""In that time an agent may have as many pages published as it may have candidates."""

RESIDENT_UNKNOWN = 1 << 20
"""Resident pages taken for granted where the kernel's number can't be read."""


@attrs.frozen
class Scanned:
    """What one step of the linear scan did."""

    visited: int
    """Pages, charged against the rate limit."""

    wrapped: bool
    """Whether the agent's turn is over: the end of its memory was reached, or more was visited than it can have."""


class Job(Protocol):
    """What an agent's queue holds."""

    async def redeem(self) -> None:
        """Does it."""

    def abandon(self) -> None:
        """It will not be done."""


class Ticket(Generic[T]):
    """A job in an agent's queue."""

    def __init__(self, job: Callable[[], Awaitable[T]]) -> None:
        self.result: T | None = None
        """None until the job is done."""
        self._job = job
        self._done = trio.Event()

    async def redeem(self) -> None:
        """Does the job."""
        try:
            self.result = await self._job()
        finally:
            self._done.set()

    def abandon(self) -> None:
        """It will not be done any more: nobody need wait for it."""
        self._done.set()

    async def wait(self, patience: float) -> None:
        """Until the job is done, or failed, or ``patience`` s are over (it goes on then)."""
        with trio.move_on_after(patience):
            await self._done.wait()


class Others(Protocol):
    """How an agent passes work on to the others."""

    def offer_merge(self, targets: Targets) -> None:
        """Has another agent's pages merged, soon; drops it if that one is overloaded or gone."""

    def count_huge(self, targets: Targets) -> None:
        """Tells another agent that its pages would merge if more of somebody else's huge page did."""


class SharedArea:
    """The memory an agent and the engine share (native/common/wire.h)."""

    def __init__(self, descriptor: int) -> None:
        """Maps it; the descriptor stays the caller's. Raises OSError if there is no memory for it."""
        # Not Python's mmap, which keeps a descriptor of its own for as long as the object is referred to.
        self._memory = ffi.gc(lib.udd_area_map(descriptor), lib.udd_area_unmap)
        if self._memory == ffi.NULL:
            raise OSError(errno.ENOMEM, "no memory for a shared area")
        base = ffi.cast("char *", self._memory)
        self.stats = ffi.cast("struct udd_stats *", base + lib.UDD_SHARED_STATS)
        self.hints = HintRing(ffi.cast("struct udd_hint_ring *", base + lib.UDD_SHARED_HINTS))
        self.drops = ffi.cast("struct udd_drop_ring *", base + lib.UDD_SHARED_DROPS)
        self.copies = base + lib.UDD_SHARED_COPY

    @property
    def resident_bytes(self) -> int:
        """How much of it is in memory."""
        resident: int = lib.udd_area_resident(self._memory)
        return resident

    def drop_copies(self) -> None:
        """Gives back the memory of the copies, which nobody may need any more. Raises AgentError."""
        error = lib.udd_area_drop_copies(self._memory)
        if error:
            raise AgentError(f"the memory of its shared area can't be given back: {os.strerror(-error)}")

    @property
    def reason(self) -> str:
        """Why the agent does not merge, in its own words."""
        raw = bytes(ffi.buffer(self.stats.reason)).split(b"\0", 1)[0].decode(errors="replace")
        return "".join(character if character.isprintable() else "?" for character in raw)


class Agent:
    """See the module."""

    def __init__(
        self,
        *,
        number: int,
        peer: Peer,
        hello: Hello,
        domain: Domain,
        link: Link,
        area: SharedArea,
        vma_limit: int,
        huge_page_threshold: int,
        counters: Counters,
        others: Others,
        newest_segment: Callable[[], int],
        shares_first_read: bool,
        quiet: bool,
        shortage: Shortage,
    ) -> None:
        self.number = number
        self.peer = peer
        self.command = hello.command
        self.domain = domain
        self.area = area
        self.vma_limit = vma_limit
        self.scope = trio.CancelScope()
        """Around its tasks."""
        self.failure: AgentError | None = None
        """Set by :meth:`fail`."""
        self.volatile = 0
        """Pages that changed, in its last complete round."""
        self.paused = ""
        """Why the engine leaves it alone on request; empty: it does not."""
        self._link = link
        self._counters = counters
        self._others = others
        self._newest_segment = newest_segment
        self._shares_first_read = shares_first_read
        self._quiet = quiet
        """Whether how long a write takes must not tell if somebody else has the page: see :meth:`_take_quietly`."""
        self._shortage = shortage
        self._holder = ffi.gc(lib.udd_holder_create(domain.store.handle), lib.udd_holder_destroy)
        if self._holder == ffi.NULL:
            raise MemoryError
        if quiet:
            lib.udd_holder_tell(self._holder, domain.index.handle, number)
            domain.own[number] = Index()
        self._handover = Handover(link, domain, counters, str(self))
        self._uncounted = bool(hello.flags & (lib.UDD_HELLO_FORKED | lib.UDD_HELLO_REJOIN))
        """Whether it has runs that are not counted yet."""
        self._sent: set[int] = set()
        self._adopted: set[int] = set()
        self._refused_segment = False
        self._changed = 0
        self._drops_lost = 0
        self._huge = HugePages(huge_page_threshold)
        self._resident = 0
        """Pages, by what the kernel says."""
        self._area_bytes = 0
        """What of the shared area was there when that was last asked."""
        self._area_due = -math.inf
        """When to ask again, s of trio's clock."""
        self._turn = 0
        """Pages visited since its last turn in the linear scan ended."""
        self._published = 0
        """Pages it had published since …"""
        self._published_since = -math.inf
        self._offered: list[Targets] = []
        """Targets in the queue: pages that need not be merged when they are reported meanwhile."""
        self._distrusted: set[int] = set()
        """Inodes of images that have changed, which it does not know yet."""
        self._working = False
        self._copies_due = False
        """Whether the memory of its copies is to be given back as soon as no job needs them."""
        # One that comes back may still have a ring to pass on that the engine before had asked for.
        self._arms = int(bool(hello.flags & lib.UDD_HELLO_REJOIN))
        self._jobs, self._todo = trio.open_memory_channel[Job](QUEUE_JOBS)
        self.refresh_limit()

    def __str__(self) -> str:
        return f"agent {self.number} (pid {self.peer.pid}, {self.command})"

    # ---- state ----

    @property
    def pages_merged(self) -> int:
        """Its pages mapped to the store, by the engine's count."""
        return int(lib.udd_holder_pages(self._holder))

    def memory_bytes(self, *, exact: bool) -> int:
        """Its own memory, and what of the shared area is there; not ``exact``: was there some minutes ago at most."""
        now = trio.current_time()
        if exact or now >= self._area_due:
            self._area_bytes = self.area.resident_bytes
            # Not all agents at the same time.
            self._area_due = now + AREA_SECONDS * (1 + self.number % 8 / 8)
        own: int = self.area.stats.memory_bytes
        return own + self._area_bytes

    @property
    def merging(self) -> bool:
        """Whether merges can be asked of it now."""
        stats = self.area.stats
        return not self.paused and bool(stats.merging) and not stats.paused

    @property
    def reason(self) -> str:
        """Why they can't; empty if they can."""
        if self.merging:
            return ""
        if self.paused:
            return self.paused
        return "the program has paused it" if self.area.stats.merging else self.area.reason

    @property
    def least_run(self) -> int:
        """Pages a new run must have."""
        return planner.least_run(self.area.stats.vmas, self.vma_limit)

    def refresh_limit(self) -> None:
        """Sets how many candidates it may have, by what the kernel says it has resident."""
        try:
            resident = int(Path(f"/proc/{self.peer.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError):
            resident = RESIDENT_UNKNOWN
        self._resident = resident
        self.domain.index.set_limit(self.number, self._pages_most)
        self._huge.set_resident(resident)

    @property
    def _pages_most(self) -> int:
        """More pages than it has: what it says of more is not believed."""
        return CANDIDATES_PER_PAGE * self._resident + REPORTS_MAX

    def segment_pages(self, segment: int) -> int:
        """Its references into a segment."""
        return int(lib.udd_holder_segment_pages(self._holder, segment))

    def count_out(self) -> None:
        """Moves what it did to the counters of those gone; gives its references back."""
        stats = self.area.stats
        self._counters.break_pages_gone += stats.break_pages
        self._counters.break_events_gone += stats.break_events
        self._counters.agent_cpu_ns_gone += stats.cpu_ns
        lib.udd_holder_clear(self._holder)
        self.domain.index.forget_agent(self.number)
        self.domain.store.close_own(self.number)
        self.domain.own.pop(self.number, None)

    # ---- the doorbell ----

    def armed(self) -> None:
        """One more ring may come."""
        self._arms += 1

    def rung(self) -> None:
        """Raises AgentError if nobody asked for it."""
        if self._arms == 0:
            raise AgentError("it rings without being asked")
        self._arms -= 1

    # ---- jobs ----

    def submit(self, job: Callable[[], Awaitable[T]]) -> "Ticket[T] | None":
        """Queues a job; None if too many wait already, or the agent is on its way out."""
        ticket = Ticket(job)
        try:
            self._jobs.send_nowait(ticket)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return None
        return ticket

    def _abandon_jobs(self) -> None:
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                self._todo.receive_nowait().abandon()
        self._todo.close()

    def fail(self, error: AgentError) -> None:
        """Has it dropped; for what is found out outside its own tasks."""
        self.failure = error
        self.scope.cancel()

    def raise_failure(self) -> None:
        """Raises what :meth:`fail` was told; only once, or the agent and the error would keep each other."""
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure

    async def work(self) -> None:
        """Does the jobs, one after the other, until cancelled. Raises AgentError."""
        try:
            async for job in self._todo:
                self._working = True
                try:
                    await self._restore_files()
                    await job.redeem()
                except OSError as error:
                    if not self._shortage.explains(error, f"work with {self} is put off"):
                        raise
                    self._uncounted = True
                self._working = False
                if self._copies_due:
                    self.drop_copies()
        finally:
            self._abandon_jobs()

    def drop_copies(self) -> None:
        """Gives back the memory of what it has copied, now or after the job under way. Raises AgentError."""
        self._copies_due = self._working
        if not self._working:
            self.area.drop_copies()

    def tend(self) -> None:
        """Takes in dropped references while nothing is under way. Raises AgentError."""
        if not self._working:
            self._drain()

    def _drain(self) -> None:
        # What is not counted can't be given back; the count that is due makes these records void.
        if self._uncounted:
            return
        counts = ffi.new("struct udd_drop_counts *")
        check(
            lib.udd_holder_drain(self._holder, self.area.drops, self._newest_segment(), counts),
            "its drop ring: a reference it never had, or a place outside the ring or the store,",
        )
        lost = self.area.stats.drops_lost
        if lost != self._drops_lost and self.submit(self.recount):
            self._drops_lost = lost

    # ---- reports: scan and visit ----

    async def scan(self, pages: int) -> Scanned:
        """One step of its linear scan."""
        pages = min(pages, SCAN_MAX)
        answer = await self._link.request(lib.UDD_SCAN, SCAN_TAIL.pack(pages, 0))
        if answer.status < 0:
            self._drain()
            return Scanned(0, wrapped=True)
        head = self._check_reports(answer, pages)
        self._changed += head.changed
        self._counters.scan_changed += head.changed
        if head.wrapped:
            self.volatile, self._changed = self._changed, 0
            self.domain.index.next_round(self.number)
            self._huge.next_round()
        self._drain()
        visited = head.visited + answer.value // lib.UDD_SKIPS_PER_VISIT
        if not head.wrapped:
            # An agent stops before that only where its answer has no room for more: whoever says that it has visited
            # less is charged all the same, or a spurt would be made of many steps with it.
            visited = max(visited, min(pages, REPORTS_MAX))
        self._turn += visited
        # Memory that does not end would keep the scan from all others.
        over = bool(head.wrapped) or self._turn > self._resident + REPORTS_MAX
        if over:
            self._turn = 0
            self.refresh_limit()
        self._counters.pages_skipped += answer.value
        await self._take_reports(_items(answer.packet, "struct udd_report *", REPORTS_BYTES), answer.count, None)
        return Scanned(visited, over)

    async def take_hints(self, hinted: Hinted) -> None:
        """Looks up hinted pages, those of images by their known digest, the others after the agent hashed them."""
        reports, report_count, ranges, range_count = hinted.split()
        if report_count:
            # Nobody had to hash them, but they are looked up, and charged against the rate, like all others.
            self._counters.pages_scanned += report_count
            await self._take_reports(
                reports, report_count, hinted, share_alone=self._shares_first_read and self._shortage.caches_may_grow
            )
        await self._visit(ranges, range_count, hinted)
        self._counters.hints_visited += hinted.count

    async def _visit(self, ranges: CData, count: int, hinted: Hinted | None) -> None:
        """Has pages hashed and looks them up; not ``hinted``: they were put off, and may split huge pages now."""
        start = 0
        while start < count:
            end, pages = start, 0
            while end < count and end - start < ITEMS_MAX and pages + ranges[end].pages <= REPORTS_MAX:
                pages += ranges[end].pages
                end += 1
            await self._visit_some(ranges + start, end - start, pages, hinted)
            start = end

    async def _visit_some(self, ranges: CData, count: int, pages: int, hinted: Hinted | None) -> None:
        payload = bytes(ffi.buffer(ranges, count * RANGE_BYTES))
        answer = await self._link.request(lib.UDD_VISIT, payload, count=count, value=int(hinted is None))
        if answer.status == 0:
            self._check_reports(answer, pages)
        self._drain()
        if answer.status == 0:
            await self._take_reports(_items(answer.packet, "struct udd_report *", REPORTS_BYTES), answer.count, hinted)

    def _check_reports(self, answer: Answer, pages: int) -> CData:
        if answer.count > min(pages, REPORTS_MAX) or len(answer.packet) != REPORTS_BYTES + answer.count * REPORT_BYTES:
            raise AgentError(f"it reported {answer.count} of {pages} pages in {len(answer.packet)} bytes")
        head = _items(answer.packet, "struct udd_reports *", 0)
        if (
            head.visited > pages
            or answer.count > head.visited
            or head.changed > head.visited
            or answer.value > SKIPS_MAX
        ):
            raise AgentError(f"it says it visited {head.visited} of {pages} pages and reports {answer.count}")
        self._counters.pages_scanned += head.visited
        return head

    async def _take_reports(
        self, reports: CData, count: int, hinted: Hinted | None, *, share_alone: bool = False
    ) -> None:
        """Looks pages up, has fresh ones copied into the store, and merges what has a slot then."""
        if count == 0 or not self.merging:
            return
        if self._quiet:
            await self._take_quietly(reports, count, hinted, share_alone=share_alone)
            return
        index = self.domain.index
        zeros = {} if self._huge.splits_always else hugepages.zeros_of(reports, count)
        async with self.domain.undisturbed():
            matches = self._look_up(reports, count, lib.UDD_ALONE_SHARE if share_alone else lib.UDD_ALONE_CANDIDATE)
            self._counters.count_matched(matches.count, hinted=hinted is not None)
            matches, revisit = await self._worth_splitting(matches, zeros)
            if matches.count:
                await self._publish_all(matches)
        if matches.count:
            await self._merge_runs(self._runs_of(index, matches), hinted)
        await self._revisit(revisit)

    def _look_up(self, reports: CData, count: int, alone: int) -> Matches:
        matches = self.domain.index.look_up(self.number, reports, count, alone=alone)
        for targets in self._offered:
            matches = planner.without_targets(matches, targets)
        return matches

    # ---- quiet breaks ----

    # A write to a merged page takes longer than one to a private page, so it tells that somebody else has its content.
    # An agent with quiet breaks has its pages in the store as soon as they were looked at, whether somebody else has
    # them or not. If not, they are *parked*, in segments that no other agent is given; they are candidates all the
    # same, and move to a shared slot once somebody else has their content. native/agent/fault.c evens out how long
    # either kind takes to break.

    async def _take_quietly(self, reports: CData, count: int, hinted: Hinted | None, *, share_alone: bool) -> None:
        """Merges all pages or none: those that others have, too, with these, the others parked."""
        if not self._may_park:
            self._counters.merge_deferred += count
            return
        own = self.domain.own[self.number]
        async with self.domain.undisturbed():
            matches = self._look_up(reports, count, lib.UDD_ALONE_SHARE if share_alone else lib.UDD_ALONE_PARK)
            shareable = matches if share_alone else matches.without_alone(self.number)
            self._counters.count_matched(shareable.count, hinted=hinted is not None)
            # First what the copy area still has from the look at the pages.
            for copied in (True, False):
                await self._publish(shareable, copied=copied)
                shared = planner.runs_of(planner.targets_of(self.domain.index, self.number, matches), self.least_run)
                rest = shared.outside(self.number, matches)
                await self._publish_own(own, rest, copied=copied)
        parked = planner.runs_of(planner.targets_of(own, self.number, rest), 1)
        # In the order of addresses: one kind must not be merged earlier than the other either.
        await self._merge_runs(shared.joined(parked), hinted)

    @property
    def _may_park(self) -> bool:
        """Whether it has mappings to park, and the store isn't full of its pages that could not be merged after all.

        Such are pinned, say, or shared with a child.
        """
        dead = self.domain.store.dead_slots(self.number)
        return self.least_run < planner.NEVER and dead <= max(REPORTS_MAX, self.pages_merged // 2)

    async def _publish_own(self, own: Index, matches: Matches, *, copied: bool) -> None:
        """Gives pages a slot in the agent's own segments. ``copied``: those only that the copy area has."""
        none = ffi.new("struct udd_target[]", matches.count)
        for fresh in planner.fresh_batches(own, matches, 1, copied=copied):
            if self._may_publish(fresh.count) and (copied or await self._copy(fresh)):
                await self._store(own, self.number, fresh, none)

    # ---- huge pages ----

    async def _worth_splitting(self, matches: Matches, zeros: Areas) -> tuple[Matches, Areas]:
        """Those matches that may be merged now, and what is to be visited after that."""
        if self._huge.splits_always:
            return matches, {}
        put_off, revisit = await self._judge(hugepages.areas_of(matches.array, matches.count), zeros)
        for targets in hugepages.candidates_of(put_off, matches):
            self._others.count_huge(targets)
        return hugepages.matches_outside(put_off, matches), revisit

    def count_huge(self, targets: Targets) -> None:
        """See Others."""
        self._huge.count(hugepages.areas_of(targets.array, targets.count))

    async def _judge(self, matched: Areas, zeros: Areas) -> tuple[Areas, Areas]:
        verdict = self._huge.settle(matched, zeros, await self._in_huge_pages(self._huge.doubtful(matched, zeros)))
        self._counters.merge_huge += sum(pages.bit_count() for pages in verdict.put_off.values())
        return verdict.put_off, verdict.revisit

    async def _in_huge_pages(self, areas: list[int]) -> set[int]:
        """Which of these addresses lie in a transparent huge page now."""
        found: set[int] = set()
        for start in range(0, len(areas), ITEMS_MAX):
            part = areas[start : start + ITEMS_MAX]
            payload = struct.pack(f"<{len(part)}Q", *part)
            answer = await self._link.request(lib.UDD_HUGE, payload, count=len(part))
            self._drain()
            if answer.status < 0:
                continue
            if len(answer.packet) != HUGE_ANSWER_BYTES:
                raise AgentError(f"its answer about huge pages has {len(answer.packet)} bytes")
            huge = int.from_bytes(answer.packet[HEADER.size :], "little")
            found.update(address for i, address in enumerate(part) if huge >> i & 1)
        return found

    async def _revisit(self, areas: Areas) -> None:
        """Pages that were put off, and zero ones, of huge pages that are worth splitting by now or are none."""
        if areas and self.merging:
            ranges = hugepages.ranges_of(areas)
            await self._visit(ffi.new("struct udd_range[]", ranges), len(ranges), None)

    async def _publish_all(self, matches: Matches) -> None:
        # First what the copy area still has from the look at the pages: copying the others overwrites it.
        for copied in (True, False):
            await self._publish(matches, copied=copied)

    async def _publish(self, matches: Matches, *, copied: bool) -> None:
        """Gives those matches a slot that have none, and has the others they match merged with it too.

        ``copied``: only those that the copy area has.
        """
        others = ffi.new("struct udd_target[]", matches.count)
        other_count = 0
        for fresh in planner.fresh_batches(self.domain.index, matches, self.least_run, copied=copied):
            if not self._may_publish(fresh.count):
                self._counters.merge_deferred += 0 if copied else fresh.count
            elif copied or await self._copy(fresh):
                other_count += await self._store(self.domain.index, 0, fresh, others + other_count)
        for targets in planner.by_agent(others, other_count):
            self._others.offer_merge(targets)

    def _may_publish(self, pages: int) -> bool:
        """Takes so many off what it may have published now: pages that only a liar has would fill the store."""
        now = trio.current_time()
        if now - self._published_since > PUBLISH_SECONDS:
            self._published, self._published_since = 0, now
        wanted = max(self._published, self.pages_merged) + pages
        if wanted > self._pages_most:
            # It may have grown since its last turn.
            self.refresh_limit()
        if wanted > self._pages_most:
            return False
        self._published += pages
        return True

    async def _copy(self, fresh: Fresh) -> bool:
        """Has pages copied to the copy area; False if the agent can't."""
        ranges, range_count = fresh.copy_ranges()
        payload = bytes(ffi.buffer(ranges, range_count * RANGE_BYTES))
        answer = await self._link.request(lib.UDD_COPY, payload, count=range_count)
        if answer.status == 0 and len(answer.packet) != COPIED_BYTES:
            raise AgentError(f"its answer to a copy has {len(answer.packet)} bytes")
        self._drain()
        if answer.status == 0:
            fresh.copied(_items(answer.packet, "struct udd_copied *", 0).valid)
        return answer.status == 0

    async def _store(self, index: Index, owner: int, fresh: Fresh, ret_targets: CData) -> int:
        """Publishes copied pages; returns how many older candidates were found for them (struct udd_target).

        ``owner``: of the segment that they go to (see Segment.owner).
        """
        store = self.domain.store
        position = ffi.new("size_t *")
        counts = ffi.new("struct udd_publish_counts *")
        targets = 0
        piece = 0
        while position[0] < fresh.count:
            if position[0] >= piece:
                await trio.lowlevel.checkpoint()
                piece = min(fresh.count, position[0] + PUBLISH_AT_ONCE)
            try:
                targets += check(
                    lib.udd_store_publish(
                        store.handle,
                        index.handle,
                        store.writable(owner).number,
                        self.area.copies,
                        fresh.array,
                        piece,
                        position,
                        ret_targets + targets,
                        counts,
                    ),
                    "publishing pages",
                )
            except OSError as error:
                if not self._shortage.explains(error, "the store can't grow, pages not shared yet stay private"):
                    raise
                break
        self._counters.copies_invalid += counts.invalid
        self._counters.copies_mismatch += counts.mismatch
        return targets

    # ---- merging ----

    def offer(self, targets: Targets) -> bool:
        """Queues the merge of pages that another agent's pages matched; False if there is too much to do already."""

        async def merge() -> None:
            self._offered.remove(targets)
            await self._merge_offered(targets)

        if self.submit(merge) is None:
            return False
        self._offered.append(targets)
        return True

    async def _merge_offered(self, targets: Targets) -> None:
        revisit: Areas = {}
        if not self.merging:
            return
        if not self._huge.splits_always:
            put_off, revisit = await self._judge(hugepages.areas_of(targets.array, targets.count), {})
            targets = hugepages.targets_outside(put_off, targets)
        await self._merge_runs(self._runs_of_targets(targets), None)
        await self._revisit(revisit)

    def _runs_of(self, index: Index, matches: Matches) -> Runs:
        """Those matches that have a slot by now; in short runs only while the agent has mappings to spare."""
        return self._runs_of_targets(planner.targets_of(index, self.number, matches))

    def _runs_of_targets(self, targets: Targets) -> Runs:
        runs = planner.runs_of(targets, self.least_run)
        self._counters.merge_deferred += runs.deferred
        return runs

    async def _merge_runs(self, runs: Runs, hinted: Hinted | None) -> None:
        if runs.count == 0 or not self.merging:
            return
        segments = self.domain.store.segments
        pinned = [segments[number] for number in runs.segments() if number in segments]
        for segment in pinned:
            segment.pins += 1
        try:
            unusable = {number for number in runs.segments() if number not in segments}
            for segment in pinned:
                if not await self._send_segment(segment):
                    unusable.add(segment.number)
            if self._uncounted:
                await self.recount()
            if unusable:
                runs = runs.without(unusable)
            for array, count in runs.chunks(ITEMS_MAX):
                await self._merge_chunk(array, count, hinted)
        finally:
            for segment in pinned:
                segment.pins -= 1

    async def _merge_chunk(self, array: CData, count: int, hinted: Hinted | None) -> None:
        answer = await self._link.request(lib.UDD_MERGE, bytes(ffi.buffer(array, count * RUN_BYTES)), count=count)
        if answer.status < 0:
            self._drain()
            return
        if answer.count != count or len(answer.packet) != HEADER.size + count * RESULT_BYTES:
            raise AgentError(f"it answered for {answer.count} of {count} runs")
        results = _items(answer.packet, "struct udd_merge_result *", HEADER.size)
        counts = ffi.new("struct udd_merge_counts *")
        check(lib.udd_holder_take(self._holder, array, results, count, counts), "what it says of a run it merged")
        counters = self._counters
        counters.merged_pages += counts.merged
        counters.merged_runs += counts.runs
        counters.merge_mismatch += counts.mismatch
        counters.merge_busy += counts.busy
        counters.merge_gone += counts.gone
        counters.merge_no_vma += counts.no_vma
        if hinted is not None:
            counters.hints_merged += lib.udd_hinted_leads(
                hinted.array, hinted.count, array, results, count, time.monotonic_ns(), counters.lead_times.histogram
            )
        self._drain()
        if self._quiet:
            # Not before: a page that moved from one parking place to another has left the former.
            check(lib.udd_holder_park(self._holder, array, results, count), "parking pages")

    async def _send_segment(self, segment: Segment) -> bool:
        """Makes sure the agent has a segment; False if it would not take it."""
        if segment.number in self._sent:
            return True
        answer = await self._link.request(
            lib.UDD_SEGMENT, SEGMENT_TAIL.pack(segment.number, SEGMENT_SLOTS), descriptor=segment.descriptor
        )
        self._drain()
        if answer.status < 0:
            if not self._refused_segment:
                self._refused_segment = True
                log.warning("%s took no store segment: %s", self, os.strerror(-answer.status))
            return False
        self._sent.add(segment.number)
        # It had this segment from an earlier engine, and runs in it.
        self._uncounted = self._uncounted or answer.value == 1
        return True

    def distrust(self, inode: int) -> None:
        """An image of the mount has changed: it must not be merged in mappings of its file any more."""
        self._distrusted.add(inode)
        # Unless others wait, and then it is done before the next of them.
        self.submit(self._restore_files)

    async def _restore_files(self) -> None:
        while self._distrusted:
            await self._link.request(lib.UDD_UNMERGE, value=self._distrusted.pop(), seconds=UNMERGE_SECONDS)
            self._drain()

    async def unmerge(self) -> int:
        """Gives it private memory back everywhere; returns the number of pages. Raises AgentError."""
        answer = await self._link.request(lib.UDD_UNMERGE, seconds=UNMERGE_SECONDS)
        self._drain()
        if answer.status < 0:
            raise AgentError(f"it could not unmerge its pages: {os.strerror(-answer.status)}")
        return answer.value

    # ---- runs it has already ----

    async def take_over(self) -> None:
        """Takes over what it can of its runs in segments of earlier engines, and counts all its runs."""
        segments: list[Segment] = []
        try:
            await self._handover.collect(segments)
            for segment in segments:
                await self._send_segment(segment)
            if self._uncounted:
                await self.recount()
        finally:
            for segment in segments:
                segment.pins -= 1

    @property
    def may_hand_over(self) -> bool:
        """Whether :meth:`take_over` may do what it could not before."""
        return self._handover.unfinished or self._uncounted

    async def recount(self) -> None:
        """Asks for all its runs and counts them anew: after a fork, a rejoin, or lost drop records."""
        known = self.pages_merged > 0
        self.domain.recounts += known
        try:
            await self._recount()
        finally:
            self.domain.recounts -= known

    async def _recount(self) -> None:
        def take(answer: Answer, array: CData) -> None:
            check(lib.udd_holder_adopt(self._holder, array, answer.count), "a run it says it has")
            found = Runs(array, answer.count).segments() & self.domain.store.segments.keys()
            self._adopted.update(found)
            # Of a parent, whose later pages are none of its business.
            for owner in {self.domain.store.segments[number].owner for number in found} - {0, self.number}:
                self.domain.store.close_own(owner)
            if self._quiet:
                check(lib.udd_holder_park(self._holder, array, ffi.NULL, answer.count), "parking pages")
            self._drain()

        answer = await self._ask_runs(0, RECOUNT)
        check(lib.udd_holder_restart(self._holder, self.area.drops, answer.value), "the head of its drop ring")
        if self._quiet:
            # Some of its parked pages are none any more, but which?
            self.domain.index.forget_agent(self.number)
            self.refresh_limit()
        self._uncounted = False
        await self._read_runs(answer, RECOUNT, take)
        self._drain()

    async def _ask_runs(self, cursor: int, purpose: int) -> Answer:
        return await self._link.request(lib.UDD_RUNS, CURSOR_TAIL.pack(cursor), value=purpose)

    async def _read_runs(self, answer: Answer, purpose: int, take: Callable[[Answer, CData], None]) -> None:
        """Gives ``take`` the answer and those that follow it, until one has no runs."""
        cursor, total = 0, 0
        while answer.status == 0 and answer.count:
            if answer.count > ITEMS_MAX or len(answer.packet) != HEADER.size + answer.count * RUN_BYTES:
                raise AgentError(f"it answered with {answer.count} runs in {len(answer.packet)} bytes")
            array = _items(answer.packet, "struct udd_run *", HEADER.size)
            last = array[answer.count - 1]
            total += answer.count
            if last.address < cursor or total > RUNS_MAX or last.pages == 0:
                raise AgentError("the list of its runs does not end")
            take(answer, array)
            cursor = last.address + last.pages * PAGE
            answer = await self._ask_runs(cursor, purpose)

    # ---- retirement ----

    async def move_out(self, segment: Segment) -> None:
        """Moves its runs out of a retiring segment."""
        if segment.moves is None or not self.merging:
            return
        parts: list[Targets] = []

        def take(answer: Answer, array: CData) -> None:
            targets = ffi.new("struct udd_target[]", SEGMENT_SLOTS)
            found = lib.udd_plan_moves(
                self.number, array, answer.count, segment.number, segment.moves, targets, SEGMENT_SLOTS
            )
            if found:
                parts.append(Targets(self.number, targets, found, targets))

        await self._read_runs(await self._ask_runs(0, LOOK), LOOK, take)
        self._drain()
        for part in parts:
            await self._merge_runs(planner.runs_of(part, 1), None)

    async def forget_segments(self) -> None:
        """Has it let go of segments that are no more. Those it can't (-EBUSY) stay for the next time."""
        for number in sorted((self._sent | self._adopted) - self.domain.store.segments.keys()):
            answer = await self._link.request(lib.UDD_SEGMENT_DROP, SEGMENT_TAIL.pack(number, SEGMENT_SLOTS))
            self._drain()
            if answer.status != -errno.EBUSY:
                self._sent.discard(number)
                self._adopted.discard(number)

    @property
    def has_stale_segments(self) -> bool:
        """Whether :meth:`forget_segments` has something to do."""
        return not (self._sent | self._adopted) <= self.domain.store.segments.keys()


def agents_cpu_seconds(agents: Iterable[Agent], counters: Counters) -> float:
    """CPU of all agents, also of those gone, by their own account, s."""
    nanoseconds: int = counters.agent_cpu_ns_gone + sum(agent.area.stats.cpu_ns for agent in agents)
    return nanoseconds / 1e9


def _items(packet: bytes, kind: str, offset: int) -> CData:
    """What a received packet has from ``offset`` on. Kept alive by the pointer's buffer."""
    # A copy: a memoryview in a cycle of garbage would be taken apart before the buffer that relies on it, and that is
    # the end of the process.
    items: CData = ffi.from_buffer(kind, packet[offset:])
    return items
