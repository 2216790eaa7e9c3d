#!/usr/bin/env python3
"""What does merging out of transparent huge pages cost, and what is left of them?

Two processes hold huge pages with 1, 8, 64, 256 or 512 equal pages in each, the others their own. The engine is held
while they fill their memory, then goes through it until nothing changes any more: once splitting always, as KSM does,
and once with the engine's own threshold. The cost is that on top of looking: what the engine takes for as many huge
pages without an equal page.
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
from measuring import Bench, Engine, Figure, Report, main, process_cpu, smaps, status, stopped, wait_for_agents

from udedup.engine.config import EngineConfig

HUGE_PAGES: Final = 512
"""Pages of a huge page."""

LAYOUTS: Final = ((1, 128), (8, 128), (64, 64), (256, 32), (512, 32))
"""Equal pages in each huge page, and how many huge pages each process has."""

ALWAYS: Final = 1
THRESHOLDS: Final = (ALWAYS, EngineConfig().huge_page_threshold)
PROCESSES: Final = 2
ROUNDS: Final = 5
ROUNDS_QUICK: Final = 1
LOOKS: Final = 4
"""Times the scan goes through all memory: the first only remembers, the second finds what is equal."""

SETTLE_SECONDS: Final = 60.0
ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@attrs.frozen
class Outcome:
    """One merge."""

    cpu: float
    """Of engine and agents, s."""

    merged: int
    """Pages of all processes."""

    left: float
    """Part of the huge pages that is left."""


def huge_bytes(pid: int, start: int, end: int) -> int:
    """Memory of a process in huge pages, between two addresses."""
    total = 0
    for header, sizes in smaps(pid):
        if start <= int(header.partition("-")[0], 16) < end:
            total += sizes["AnonHugePages"]
    return total


def settled(engine: Engine) -> int:
    """Waits until the scan went LOOKS times through all memory; returns the number of merged pages."""
    last = status(engine)["full_scans"] + LOOKS
    deadline = time.monotonic() + SETTLE_SECONDS
    while (now := status(engine))["full_scans"] < last:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the scan did not go through all memory in {SETTLE_SECONDS:.0f} s")
        time.sleep(0.02)
    return int(now["pages_shared"] + now["pages_sharing"])


def merge(bench: Bench, equal: int, count: int, threshold: int, seed: int) -> Outcome:
    """Lets the engine loose on ``count`` huge pages in each process, of which ``equal`` pages are in both."""
    program = bench.compile("layout")
    with (
        bench.engine("--sleep-millisecs", "0", "--huge-page-threshold", str(threshold)) as engine,
        ExitStack() as stack,
    ):
        programs = [
            stack.enter_context(bench.start(engine, program, count, equal, HUGE_PAGES - equal, seed, "huge"))
            for _ in range(PROCESSES)
        ]
        wait_for_agents(engine, PROCESSES)
        with stopped(engine):
            places = [[int(word, 16) for word in each.ask("fill")[1:]] for each in programs]
            before = sum(huge_bytes(each.pid, *place) for each, place in zip(programs, places, strict=True))
            if not before:
                raise RuntimeError(f"the kernel gives no huge pages: `echo madvise >{ENABLED}` first")
            cpu = process_cpu(engine.pid)
        cpu_agents = status(engine)["cpu_seconds"]["agents"]
        merged = settled(engine)
        cpu = process_cpu(engine.pid) - cpu + status(engine)["cpu_seconds"]["agents"] - cpu_agents
        left = sum(huge_bytes(each.pid, *place) for each, place in zip(programs, places, strict=True))
        for each in programs:
            each.ask("verify")
    return Outcome(cpu, merged, left / before)


def measure(bench: Bench, quick: bool) -> Report:
    """All layouts, the thresholds in turns."""
    figures: list[Figure] = []
    for equal, count in LAYOUTS:
        outcomes: dict[int, list[Outcome]] = {threshold: [] for threshold in THRESHOLDS}
        for seed in range(ROUNDS_QUICK if quick else ROUNDS):
            looking = merge(bench, 0, count, ALWAYS, seed).cpu
            for threshold, found in outcomes.items():
                outcome = merge(bench, equal, count, threshold, seed)
                found.append(attrs.evolve(outcome, cpu=outcome.cpu - looking))
        for threshold, found in outcomes.items():
            name = f"{equal} equal, threshold {threshold}"
            wanted = PROCESSES * equal * count
            figures.append(Figure.of(f"{name}: CPU per equal page", "µs", [each.cpu * 1e6 / wanted for each in found]))
            figures.append(Figure.of(f"{name}: merged", "%", [100 * each.merged / wanted for each in found]))
            figures.append(Figure.of(f"{name}: huge pages left", "%", [100 * each.left for each in found]))
    method = f"CPU of engine and agents for {LOOKS} scans of all memory, less that for memory without equal pages"
    return Report("huge", method, figures)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
