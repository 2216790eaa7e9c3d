"""What two answers of the engine, one after the other, say of the time between them."""

from collections.abc import Mapping

import attrs

from udedup.engine.accounting import Status


@attrs.frozen
class AgentRates:
    """Of one process."""

    breaks: float
    """Shared pages written to, a second."""

    cpu: float
    """Of its agent's threads, percent of one processor."""


@attrs.frozen
class Rates:
    """Of an engine and what it serves. A second unless stated."""

    scanned: float
    """Pages visited."""

    hints: float
    """Hints given, place and content."""

    dropped: float
    """Hints lost."""

    merged: float
    """Pages."""

    breaks: float
    """Pages."""

    engine_cpu: float
    """Percent of one processor."""

    agents_cpu: float
    """Of all agents, percent of one processor."""

    agents: Mapping[int, AgentRates]
    """By pid; of those that were there before."""

    images: Mapping[str, float]
    """Blocks read, by name; of those that were there before."""


def between(before: Status, after: Status) -> Rates | None:
    """None if they are of two engines, or of one moment."""
    seconds = after.uptime_seconds - before.uptime_seconds
    if before.pid != after.pid or seconds <= 0:
        return None

    def each(was: float, now: float) -> float:
        # What is counted over the agents that are there may become less.
        return max(0.0, now - was) / seconds

    agents = {agent.pid: agent for agent in before.agents}
    images = {image.name: image.blocks_read for image in before.images}
    return Rates(
        scanned=each(before.pages_scanned, after.pages_scanned),
        hints=each(before.hints.place + before.hints.content, after.hints.place + after.hints.content),
        dropped=each(before.hints.dropped, after.hints.dropped),
        merged=each(before.merges.pages, after.merges.pages),
        breaks=each(before.breaks.pages, after.breaks.pages),
        engine_cpu=100 * each(before.cpu_seconds.engine, after.cpu_seconds.engine),
        agents_cpu=100 * each(before.cpu_seconds.agents, after.cpu_seconds.agents),
        agents={
            now.pid: AgentRates(
                breaks=each(was.break_pages, now.break_pages), cpu=100 * each(was.cpu_seconds, now.cpu_seconds)
            )
            for now in after.agents
            # What comes anew by the same pid, or name, counts from 0.
            if (was := agents.get(now.pid)) is not None
            and was.break_pages <= now.break_pages
            and was.cpu_seconds <= now.cpu_seconds
        },
        images={
            image.name: each(images[image.name], image.blocks_read)
            for image in after.images
            if image.name in images and images[image.name] <= image.blocks_read
        },
    )
