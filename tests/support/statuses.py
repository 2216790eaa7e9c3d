"""What an engine could answer, without one."""

import attrs
import msgspec

from udedup.engine import accounting
from udedup.engine.accounting import AgentStatus, ImageStatus, Status

PAGES_PER_SECOND = 1000


def agent(pid: int, **changes: object) -> AgentStatus:
    """A process that takes part."""
    usual = AgentStatus(
        pid=pid,
        uid=1000,
        domain="1000",
        command=f"worker-{pid}",
        pages_sharing=256 * pid,
        zero_pages=pid,
        runs=10,
        vmas=100 + pid,
        merging=True,
        reason="",
        paused=False,
        break_pages=0,
        break_events=0,
        hints=7,
        cpu_seconds=0.0,
    )
    return msgspec.structs.replace(usual, **changes)


def image(name: str, **changes: object) -> ImageStatus:
    """An image in the mount."""
    usual = ImageStatus(name=name, path=f"/images/{name}", format="raw", size=1 << 30, blocks_read=0, blocks_served=0)
    return msgspec.structs.replace(usual, **changes)


def status(**changes: object) -> Status:
    """An engine that has done nothing yet."""
    usual = Status(
        pid=4711,
        uptime_seconds=100.0,
        socket="/run/udedup.sock",
        mount=None,
        policy="xlh",
        pages_shared=0,
        pages_sharing=0,
        pages_unshared=0,
        pages_volatile=0,
        pages_scanned=0,
        pages_skipped=0,
        full_scans=0,
        pages_to_scan=1000,
        limits=accounting.LimitStatus(sleep_millisecs=20, cpu_percent=None, hint_slots=1 << 18, vmas=61436),
        zero_pages=0,
        bytes_saved=0,
        general_profit=0,
        hints=accounting.HintStatus(place=0, content=0, dropped=0, visited=0, merged=0, waiting=0),
        merges=accounting.MergeStatus(
            pages=0, runs=0, mismatch=0, busy=0, gone=0, no_vma=0, deferred=0, huge=0, dropped=0
        ),
        breaks=accounting.BreakStatus(pages=0, events=0),
        lead_time_seconds=accounting.LeadTimeStatus(p50=None, p90=None, p99=None),
        cpu_seconds=accounting.CpuStatus(engine=0.0, agents=0.0),
        memory=accounting.MemoryStatus(engine=30 << 20, agents=0, managed=0),
        store=accounting.StoreStatus(segments=0, adopted=0, bytes=0, live_bytes=0, retired=0),
        index=accounting.IndexStatus(shared=0, candidates=0, bytes=0),
        blocks=accounting.BlockStatus(served=0, entered=0, differing=0),
        agents_total=accounting.AgentsStatus(joined=0, dropped=0, silent=0),
        refused=accounting.RefusedStatus(connections=0, requests=0),
        pressure=accounting.PressureStatus("none", 0.0, 0.0, 0, 0),
        kernel=None,
        agents=[],
        images=[],
    )
    return msgspec.structs.replace(usual, **changes)


@attrs.define
class Busy:
    """An engine that always works: each answer says a little more than the one before."""

    agents: int

    images: int = 5

    seconds: float = 2.0
    """Between two answers."""

    asked: int = 0

    def __call__(self) -> Status:
        """The next answer."""
        self.asked += 1
        now = self.asked * self.seconds
        work = round(now * PAGES_PER_SECOND)
        return status(
            uptime_seconds=now,
            pages_shared=work,
            pages_sharing=2 * work,
            pages_scanned=20 * work,
            bytes_saved=4096 * 2 * work,
            general_profit=4096 * work,
            breaks=accounting.BreakStatus(pages=work, events=work),
            cpu_seconds=accounting.CpuStatus(engine=0.1 * now, agents=0.05 * now),
            agents=[
                agent(
                    1000 + n,
                    pages_sharing=work + 7 * n,
                    break_pages=work * (n % 7),
                    cpu_seconds=now * 0.001 * n,
                    merging=n % 10 != 0,
                    reason="" if n % 10 else "a discard came past libc",
                )
                for n in range(self.agents)
            ],
            images=[image(f"disk{n}", blocks_read=work * (n + 1), blocks_served=work * n) for n in range(self.images)],
        )
