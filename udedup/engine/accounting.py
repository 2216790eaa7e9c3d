"""What is counted, and the report made of it: the words of ``udedup status``.

:class:`Counters` is the one place where the engine counts; status, tests and benchmarks all read it.
"""

import attrs
import msgspec

from udedup.engine.native import ffi, lib
from udedup.vdi.shelf import ShelfCounters

PAGE: int = lib.UDD_PAGE_SIZE


class LeadTimes:
    """Histogram of the time from "content in place" to "merged"; buckets grow by powers of two, in quarters."""

    def __init__(self) -> None:
        self.histogram = ffi.new("uint64_t[]", lib.UDD_LEAD_BUCKETS)

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self.histogram)

    def below(self, exponent: int) -> int:
        """How many were shorter than 2 to the power of ``exponent`` ns; at least 2."""
        return sum(self.histogram[0 : 4 * exponent])

    def percentile(self, fraction: float) -> float | None:
        """Upper end, s, of the bucket that the given part of all merges lies at or below; None if there were none."""
        total = self.total
        if not total:
            return None
        seen = 0
        for bucket, count in enumerate(self.histogram):
            seen += count
            if seen >= fraction * total:
                return _bucket_end(bucket) / 1e9
        raise AssertionError("a part of a whole is at most the whole")


def _bucket_end(bucket: int) -> int:
    """First nanosecond after a bucket; buckets below 8 are single nanoseconds (native/engine/hints.c)."""
    if bucket < 8:
        return bucket + 1
    exponent, quarter = divmod(bucket, 4)
    return (5 + quarter) << (exponent - 2)


@attrs.define
class Counters:
    """Cumulative since the engine's start, over all agents, also those that left. Pages unless stated."""

    pages_scanned: int = 0
    pages_skipped: int = 0
    """Visited by the linear scan and for hints (as KSM counts)."""

    full_scans: int = 0
    """Times the linear scan went through all memory."""

    hints_place: int = 0
    """Place hints (not pages) taken in from agents."""

    hints_content: int = 0
    """Content hints: blocks served by the mount."""

    hints_dropped: int = 0
    """Place hints lost in rings, and hinted pages that fell off the stack or found their agent overloaded."""

    hints_visited: int = 0
    """Hinted pages whose turn came."""

    hints_merged: int = 0
    """Hinted pages merged in their own turn."""

    hints_matched: int = 0
    """Hinted pages that were found to be elsewhere, too."""

    scan_changed: int = 0
    """Pages of the linear scan that were new, or had changed since the last round."""

    scan_matched: int = 0
    """Pages of the linear scan that were found to be elsewhere, too."""

    merged_pages: int = 0
    """Pages agents remapped to the store."""

    merged_runs: int = 0
    """Runs these were in."""

    merge_mismatch: int = 0
    """Refused by agents: content differs from the slot."""

    merge_busy: int = 0
    """Refused by agents: pinned, shared after fork, held back."""

    merge_gone: int = 0
    """Refused by agents: not private anonymous memory any more."""

    merge_no_vma: int = 0
    """Refused by agents: mapping limit reached."""

    merge_deferred: int = 0
    """Not asked for: their runs are too short for what is left of the agent's mappings."""

    merge_huge: int = 0
    """Put off, each time they came up: too few pages of their huge page would merge to split it."""

    merge_dropped: int = 0
    """Not asked for: the agent had too much to do already."""

    copies_invalid: int = 0
    """Pages on their way into the store that vanished."""

    copies_mismatch: int = 0
    """Pages on their way into the store that changed."""

    break_pages_gone: int = 0
    """Broken pages of agents that left."""

    break_events_gone: int = 0
    """Write faults of agents that left."""

    agent_cpu_ns_gone: int = 0
    """CPU of the agent threads of agents that left, ns."""

    agents_joined: int = 0
    """Agents."""

    agents_dropped: int = 0
    """Agents that lied, or did not answer."""

    agents_silent: int = 0
    """Of these: those that did not answer."""

    connections_refused: int = 0
    """Connections that did not get to join or to ask: nonsense, another version, a label not allowed, too many."""

    requests_refused: int = 0
    """Control requests that were none."""

    segments_retired: int = 0
    """Segments."""

    segments_adopted: int = 0
    """Segments of earlier engines that were taken over."""

    blocks: ShelfCounters = attrs.field(factory=ShelfCounters)
    """Blocks of images and the store."""

    lead_times: LeadTimes = attrs.field(factory=LeadTimes)

    def count_matched(self, pages: int, *, hinted: bool) -> None:
        """Pages that were looked at, on a hint or not, are elsewhere, too."""
        if hinted:
            self.hints_matched += pages
        else:
            self.scan_matched += pages


class HintStatus(msgspec.Struct, frozen=True):
    """Hints; see Counters."""

    place: int
    content: int
    dropped: int
    visited: int
    merged: int
    waiting: int
    """Pages on the hint stack now; it has room for ``LimitStatus.hint_slots``."""


class MergeStatus(msgspec.Struct, frozen=True):
    """Merges; see Counters. All pages but ``runs``."""

    pages: int
    runs: int
    mismatch: int
    busy: int
    gone: int
    no_vma: int
    deferred: int
    huge: int
    dropped: int


class BreakStatus(msgspec.Struct, frozen=True):
    """Merged pages written to."""

    pages: int
    events: int
    """Write faults; one may break several pages."""


class LeadTimeStatus(msgspec.Struct, frozen=True):
    """From content in place to merged, s; None: nothing merged by hints yet."""

    p50: float | None
    p90: float | None
    p99: float | None


class CpuStatus(msgspec.Struct, frozen=True):
    """CPU time spent, s."""

    engine: float
    agents: float


class StoreStatus(msgspec.Struct, frozen=True):
    """The store of all domains."""

    segments: int
    adopted: int
    """Segments taken over from earlier engines, also those retired since."""
    bytes: int
    """Of slots written."""
    live_bytes: int
    """Of slots in use."""
    retired: int
    """Segments given back."""


class IndexStatus(msgspec.Struct, frozen=True):
    """The indexes of all domains."""

    shared: int
    """Store pages that can be found, also those that nobody uses now."""
    candidates: int
    """Pages seen once."""
    bytes: int


class AgentsStatus(msgspec.Struct, frozen=True):
    """Wrapped processes that came and went; one that execs or that comes back counts anew."""

    joined: int
    dropped: int
    """Those that lied, or did not answer …"""
    silent: int
    """… and of these, those that did not answer."""


class RefusedStatus(msgspec.Struct, frozen=True):
    """What was not even begun; see Counters."""

    connections: int
    requests: int


class PressureStatus(msgspec.Struct, frozen=True):
    """Memory pressure, by the kernel (see ``udedup.engine.pressure``)."""

    level: str
    """none, some, full; off: it isn't watched, or the kernel does not tell."""
    some: float
    full: float
    """Parts of the time, as of the last look."""
    times_some: int
    times_full: int
    """How often it rose to that."""


class KernelStatus(msgspec.Struct, frozen=True):
    """What the kernel says (/proc/PID/smaps of the agents and the engine)."""

    pss_bytes: int
    """Sum of Pss over agents and engine."""

    saved_bytes: int
    """What merged runs show (Rss without copies after a write), less what the store takes (Pss of all its mappings)."""

    unreadable: int
    """Agents whose numbers we could not read."""


class MemoryStatus(msgspec.Struct, frozen=True):
    """Memory that udedup itself uses, bytes."""

    engine: int
    """Pss of the engine without the store; some seconds old, if the kernel's figures were not asked for."""

    agents: int
    """As agents say, plus the shared areas."""

    managed: int
    """Present candidate memory of all agents, as they say."""


class AgentStatus(msgspec.Struct, frozen=True):
    """One wrapped process."""

    pid: int
    uid: int
    domain: str
    command: str
    pages_sharing: int
    """Its pages that are mapped to the store."""
    zero_pages: int
    runs: int
    vmas: int
    merging: bool
    reason: str
    """Why not merging; empty if it is."""
    paused: bool
    """Left alone on request (``unmerge``, ``pause``), until ``merge``."""
    break_pages: int
    break_events: int
    """Its merged pages written to, and the write faults that took, so far."""
    hints: int
    """Place hints it gave, so far."""
    cpu_seconds: float
    """CPU time of its agent's threads, s."""


class BlockStatus(msgspec.Struct, frozen=True):
    """Blocks of images, read through the mount, and the store; see ShelfCounters."""

    served: int
    entered: int
    differing: int


class ImageStatus(msgspec.Struct, frozen=True):
    """One image in the mount."""

    name: str
    path: str
    format: str
    """In QEMU's words."""
    size: int
    """Bytes."""
    blocks_read: int
    """By programs, through the mount."""
    blocks_served: int
    """Of them, out of the store."""


class LimitStatus(msgspec.Struct, frozen=True):
    """What the work may take."""

    sleep_millisecs: int
    """Between two spurts of ``pages_to_scan`` pages, ms; 0: no limit on the rate."""
    cpu_percent: float | None
    """Of one processor, for engine and agents together; None: no limit."""
    hint_slots: int
    """Pages on the hint stack."""
    vmas: int
    """Mappings of one process, from which on nothing more is merged in it."""


class Status(msgspec.Struct, frozen=True):
    """The answer to ``status``; pages of 4 KiB unless the name says otherwise. KSM's words where it has one."""

    pid: int
    """The engine's."""
    uptime_seconds: float
    """Since the engine's start."""
    socket: str
    mount: str | None
    policy: str
    pages_shared: int
    """Store pages in use."""
    pages_sharing: int
    """Mappings of them beyond the first."""
    pages_unshared: int
    """Candidates."""
    pages_volatile: int
    """Pages that changed since the round before, as of each agent's last round."""
    pages_scanned: int
    pages_skipped: int
    """Pages that the linear scan passed over, as they had not changed for some rounds (smart scan)."""
    full_scans: int
    pages_to_scan: int
    """Of the next spurt; an advisor changes it."""
    limits: LimitStatus
    zero_pages: int
    bytes_saved: int
    general_profit: int
    """bytes_saved less the memory of engine and agents."""
    hints: HintStatus
    merges: MergeStatus
    breaks: BreakStatus
    lead_time_seconds: LeadTimeStatus
    cpu_seconds: CpuStatus
    memory: MemoryStatus
    store: StoreStatus
    index: IndexStatus
    blocks: BlockStatus
    agents_total: AgentsStatus
    refused: RefusedStatus
    pressure: PressureStatus
    kernel: KernelStatus | None
    """None if the request left it out."""
    agents: list[AgentStatus]
    images: list[ImageStatus]
