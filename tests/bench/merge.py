#!/usr/bin/env python3
"""What does merging cost? CPU per merged page, engine and agents, beside KSM on the same memory.

Two processes hold pages of equal content in stretches of 1, 4, 16 or 64, one page of their own after each. The engine
is held while they fill their memory; then the clock runs until the last of the equal pages is merged. So all that
must happen is in it: the rounds of the scan (also over pages that are not equal), hashing, look-up, copies into the
store and transactions. KSM does the same for two bare processes, with no pause between its rounds. A "merged page" is
one page of one process that is shared afterwards: KSM's pages_shared + pages_sharing.
"""

import sys
import time
from contextlib import ExitStack
from typing import Final

import attrs
from measuring import Bench, Figure, Report, main, process_cpu, status, stopped, wait_for_agents

from udedup.record.kernel import ksm, ksm_counter, ksmd_cpu

KSM_SECONDS: Final = 100.0
KSM_SETTINGS: Final = {"pages_to_scan": 100_000, "sleep_millisecs": 0}
"""Full speed."""

FULL_SPEED: Final = (
    "--sleep-millisecs",
    str(KSM_SETTINGS["sleep_millisecs"]),
    "--pages-to-scan",
    str(KSM_SETTINGS["pages_to_scan"]),
)
"""The same for the engine."""

PROCESSES: Final = 2


@attrs.frozen
class Layout:
    """Memory to be merged."""

    run: int
    """Equal pages that follow each other."""

    runs: int
    """How many such stretches, in each process."""

    limit: float | None
    """CPU per merged page, µs."""

    beats_ksm: bool
    """Whether it must cost less than KSM's."""

    @property
    def name(self) -> str:
        """For people."""
        return "isolated pages" if self.run == 1 else f"runs of {self.run}"

    @property
    def pages(self) -> int:
        """Equal pages of each process."""
        return self.run * self.runs


# An isolated page costs two mappings, and from half of the 65530 on the engine wants longer runs.
LAYOUTS: Final = (
    Layout(1, 14_000, 20.0, beats_ksm=False),
    Layout(4, 6_000, None, beats_ksm=True),
    Layout(16, 2_000, 4.0, beats_ksm=True),
    Layout(64, 500, 2.5, beats_ksm=True),
)
ROUNDS: Final = 5
ROUNDS_QUICK: Final = 1


@attrs.frozen
class Cost:
    """One merge, CPU in µs per merged page."""

    engine: float
    agents: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.engine + self.agents


def measure_udedup(bench: Bench, layout: Layout, seed: int) -> Cost:
    """Merges the layout once."""
    program = bench.compile("layout")
    merged = PROCESSES * layout.pages
    with bench.engine(*FULL_SPEED) as engine, ExitStack() as stack:
        programs = [
            stack.enter_context(bench.start(engine, program, layout.runs, layout.run, 1, seed))
            for _ in range(PROCESSES)
        ]
        wait_for_agents(engine, PROCESSES)
        before = status(engine)["cpu_seconds"]["agents"]
        with stopped(engine):
            for each in programs:
                each.ask("fill")
            engine_before = process_cpu(engine.pid)
        for each in programs:
            each.tell(f"wait {layout.pages}")
        for each in programs:
            each.hear()
        engine_cpu = process_cpu(engine.pid) - engine_before
        agents_cpu = status(engine)["cpu_seconds"]["agents"] - before
        for each in programs:
            each.ask("verify")
    return Cost(engine=engine_cpu * 1e6 / merged, agents=agents_cpu * 1e6 / merged)


def measure_ksm(bench: Bench, layout: Layout, seed: int) -> float:
    """CPU of ksmd per merged page, µs."""
    program = bench.compile("layout")
    merged = PROCESSES * layout.pages
    with ExitStack() as stack:
        programs = [
            stack.enter_context(bench.start(None, program, layout.runs, layout.run, 1, seed, "mergeable"))
            for _ in range(PROCESSES)
        ]
        for each in programs:
            each.ask("fill")
        before = ksmd_cpu()
        with ksm(KSM_SETTINGS):
            deadline = time.monotonic() + KSM_SECONDS
            while sum(map(ksm_counter, ("pages_shared", "pages_sharing"))) < merged:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"KSM did not merge {merged} pages in {KSM_SECONDS:.0f} s")
                time.sleep(0.002)
            cpu = ksmd_cpu() - before
        for each in programs:
            each.ask("verify")
    return cpu * 1e6 / merged


def measure(bench: Bench, quick: bool) -> Report:
    """All layouts, udedup and KSM in turns."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for layout in LAYOUTS:
        costs, ksmd = list[Cost](), list[float]()
        for seed in range(ROUNDS_QUICK if quick else ROUNDS):
            costs.append(measure_udedup(bench, layout, seed))
            ksmd.append(measure_ksm(bench, layout, seed))
        figures.append(Figure.of(layout.name, "µs", [cost.total for cost in costs], layout.limit))
        ratios = [cost.total / beside for cost, beside in zip(costs, ksmd, strict=True)]
        figures.append(Figure.of(f"{layout.name}, by KSM's", "×", ratios, 1.0 if layout.beats_ksm else None))
        details[layout.name] = {
            "merged_pages": PROCESSES * layout.pages,
            "engine_us": Figure.of("engine", "µs", [cost.engine for cost in costs]).as_dict(),
            "agents_us": Figure.of("agents", "µs", [cost.agents for cost in costs]).as_dict(),
            "ksm_us": Figure.of("ksmd", "µs", ksmd).as_dict(),
        }
    method = "CPU per merged page of engine and agents, from content in place to all merged; KSM: of ksmd"
    return Report("merge", method, figures, details)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
