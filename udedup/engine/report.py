"""Makes the ``status`` answer out of counters, agents, stores and what the kernel says."""

import os
import time
from collections.abc import Collection

from udedup.engine.accounting import (
    PAGE,
    AgentsStatus,
    AgentStatus,
    BlockStatus,
    BreakStatus,
    Counters,
    CpuStatus,
    HintStatus,
    ImageStatus,
    IndexStatus,
    KernelStatus,
    LeadTimeStatus,
    LimitStatus,
    MemoryStatus,
    MergeStatus,
    PressureStatus,
    RefusedStatus,
    Status,
    StoreStatus,
)
from udedup.engine.agent import Agent, agents_cpu_seconds
from udedup.engine.config import EngineConfig
from udedup.engine.domain import Domain
from udedup.engine.hints import HintStack
from udedup.engine.kernel import KernelView, OwnSmaps
from udedup.engine.pressure import Level, PressureState


def agent_status(agent: Agent) -> AgentStatus:
    """One agent's line."""
    stats = agent.area.stats
    return AgentStatus(
        pid=agent.peer.pid,
        uid=agent.peer.uid,
        domain=agent.domain.label,
        command=agent.command,
        pages_sharing=agent.pages_merged,
        zero_pages=stats.zero_pages,
        runs=stats.runs,
        vmas=stats.vmas,
        merging=agent.merging,
        reason=agent.reason,
        paused=bool(agent.paused),
        break_pages=stats.break_pages,
        break_events=stats.break_events,
        hints=stats.hint_count,
        cpu_seconds=stats.cpu_ns / 1e9,
    )


def _pressure_status(state: PressureState | None) -> PressureStatus:
    if state is None:
        return PressureStatus("off", 0.0, 0.0, 0, 0)
    return PressureStatus(
        level=state.level.word,
        some=state.stall.some,
        full=state.stall.full,
        times_some=state.times[Level.SOME],
        times_full=state.times[Level.FULL],
    )


def status(
    *,
    config: EngineConfig,
    counters: Counters,
    uptime: float,
    pages_to_scan: int,
    vma_limit: int,
    hints: HintStack,
    everything: bool,
    pressure: PressureState | None,
    agents: list[Agent],
    domains: Collection[Domain],
    images: list[ImageStatus],
    own: OwnSmaps,
    kernel: KernelView | None,
    exact: bool,
) -> Status:
    """Everything about these agents and domains.

    ``uptime``: of the engine, s; ``pages_to_scan``: of the next spurt; ``vma_limit``: of each process; ``everything``:
    the asker may know what the hint stack holds of all; ``pressure``: None if it isn't watched; ``exact``: see
    Agent.memory_bytes().
    """
    parked = sum(domain.store.parked_slots for domain in domains)
    shared = sum(domain.store.live_slots for domain in domains) - parked
    used = sum(domain.store.used_slots for domain in domains)
    merged = sum(agent.pages_merged for agent in agents) - parked
    zero = sum(agent.area.stats.zero_pages for agent in agents)
    candidates = sum(domain.index.candidates for domain in domains)
    saved = (max(0, merged - shared) + zero) * PAGE
    engine = own.look() if kernel is None else kernel.engine
    memory = MemoryStatus(
        engine=engine.pss - engine.store_pss,
        agents=sum(agent.memory_bytes(exact=exact) for agent in agents),
        managed=sum(agent.area.stats.managed_pages for agent in agents) * PAGE,
    )
    lead = counters.lead_times
    return Status(
        pid=os.getpid(),
        uptime_seconds=uptime,
        socket=str(config.socket),
        mount=None if config.mount is None else str(config.mount),
        policy=config.policy,
        pages_shared=shared,
        pages_sharing=max(0, merged - shared),
        pages_unshared=candidates,
        pages_volatile=sum(agent.volatile for agent in agents),
        pages_scanned=counters.pages_scanned,
        pages_skipped=counters.pages_skipped,
        full_scans=counters.full_scans,
        pages_to_scan=pages_to_scan,
        limits=LimitStatus(
            sleep_millisecs=config.sleep_millisecs,
            cpu_percent=None if config.advisor is None else config.advisor.max_cpu,
            hint_slots=config.hint_slots,
            vmas=vma_limit,
        ),
        zero_pages=zero,
        bytes_saved=saved,
        general_profit=saved - memory.engine - memory.agents,
        hints=HintStatus(
            place=counters.hints_place,
            content=counters.hints_content,
            dropped=counters.hints_dropped + (hints.overwritten if everything else 0),
            visited=counters.hints_visited,
            merged=counters.hints_merged,
            waiting=len(hints) if everything else 0,
        ),
        merges=MergeStatus(
            pages=counters.merged_pages,
            runs=counters.merged_runs,
            mismatch=counters.merge_mismatch,
            busy=counters.merge_busy,
            gone=counters.merge_gone,
            no_vma=counters.merge_no_vma,
            deferred=counters.merge_deferred,
            huge=counters.merge_huge,
            dropped=counters.merge_dropped,
        ),
        breaks=BreakStatus(
            pages=counters.break_pages_gone + sum(agent.area.stats.break_pages for agent in agents),
            events=counters.break_events_gone + sum(agent.area.stats.break_events for agent in agents),
        ),
        lead_time_seconds=LeadTimeStatus(p50=lead.percentile(0.5), p90=lead.percentile(0.9), p99=lead.percentile(0.99)),
        cpu_seconds=CpuStatus(
            engine=time.process_time(),
            agents=agents_cpu_seconds(agents, counters),
        ),
        memory=memory,
        store=StoreStatus(
            segments=sum(len(domain.store.segments) for domain in domains),
            adopted=counters.segments_adopted,
            bytes=used * PAGE,
            live_bytes=(shared + parked) * PAGE,
            retired=counters.segments_retired,
        ),
        index=IndexStatus(
            shared=sum(domain.index.shared for domain in domains),
            candidates=candidates,
            bytes=sum(domain.index.size for domain in domains),
        ),
        blocks=BlockStatus(
            served=counters.blocks.served,
            entered=counters.blocks.entered,
            differing=counters.blocks.differing,
        ),
        agents_total=AgentsStatus(
            joined=counters.agents_joined, dropped=counters.agents_dropped, silent=counters.agents_silent
        ),
        refused=RefusedStatus(connections=counters.connections_refused, requests=counters.requests_refused),
        pressure=_pressure_status(pressure),
        kernel=None
        if kernel is None
        else KernelStatus(pss_bytes=kernel.pss, saved_bytes=kernel.saved, unreadable=kernel.unreadable),
        agents=[agent_status(agent) for agent in agents],
        images=images,
    )
