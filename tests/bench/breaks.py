#!/usr/bin/env python3
"""What does a write to a merged page cost, by the kernel's own copy-on-write of a private memfd page?

One wrapped process merges two areas of equal content with each other, then writes to one of them, and to a private
mapping of a memfd: single pages in random order inside long merged stretches; pages merged each by itself, in
random order; a long stretch overwritten in order. Many lone writes are a storm, for which the agent leaves merged pages
to the kernel; what the first ones cost, each served by the agent, is shown beside it, without a limit. Wall time of the
writer, which waits for the agent. The engine is held meanwhile, or it would merge again what breaks.
"""

import sys
from typing import Final

import attrs
from measuring import Bench, Figure, Report, main, stopped, wait_for_agents

PAGES: Final = 4096
"""Of each area: merged one by one, both cost two mappings each, of which half of 65530 may be used up."""

SCATTERED: Final = 1024
"""Writes to single pages: few enough that hardly two of them are neighbours."""


@attrs.frozen
class Writes:
    """One way to write."""

    name: str
    run: int
    """Merged pages that follow each other; 0: all of them."""

    command: str
    """Of programs/breaks.c."""

    limit: float
    """By the kernel's copy-on-write."""

    first: str | None = None
    """What the first writes, timed apart, are called."""


WRITES: Final = (
    Writes("isolated, in long runs", 0, f"scattered {SCATTERED}", 3.5, "the first of them"),
    Writes("isolated, runs of one page", 1, f"scattered {SCATTERED}", 3.5, "the first of them, runs of one page"),
    Writes("sequential overwrite", 0, "sequential", 1.3),
)
ROUNDS: Final = 11
ROUNDS_QUICK: Final = 3


def measure(bench: Bench, quick: bool) -> Report:
    """All ways, in turns."""
    limits: dict[str, float | None] = {writes.name: writes.limit for writes in WRITES}
    limits |= {writes.first: None for writes in WRITES if writes.first}
    kernel: dict[str, list[float]] = {name: [] for name in limits}
    merged: dict[str, list[float]] = {name: [] for name in limits}
    program = bench.compile("breaks")
    with bench.engine("--sleep-millisecs", "0") as engine, bench.start(engine, program, PAGES) as process:
        wait_for_agents(engine, 1)
        for round_number in range(ROUNDS_QUICK if quick else ROUNDS):
            for number, writes in enumerate(WRITES):
                process.ask(f"map {round_number * len(WRITES) + number} {writes.run}")
                process.ask("wait")
                with stopped(engine):
                    times = [float(time) for time in process.ask(writes.command)]
                for name in filter(None, (writes.name, writes.first)):
                    kernel[name].append(times.pop(0))
                    merged[name].append(times.pop(0))
                process.ask("unmap")
    figures = [
        Figure.of(
            f"{name}, by the kernel's",
            "×",
            [ours / theirs for ours, theirs in zip(merged[name], kernel[name], strict=True)],
            limit,
        )
        for name, limit in limits.items()
    ]
    details: dict[str, object] = {
        name: {
            "merged_ns": Figure.of("merged", "ns", merged[name]).as_dict(),
            "kernel_ns": Figure.of("kernel", "ns", kernel[name]).as_dict(),
        }
        for name in limits
    }
    return Report("breaks", "wall time per write, both kinds of pages in one process; engine held", figures, details)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
