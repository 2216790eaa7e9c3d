#!/usr/bin/env python3
"""What does `udedup estimate` cost, and is it right?

Three processes, half of whose memory is equal in all, half their own, in stretches of 16 pages. Speed: CPU time of
the look by one thread and of the comparison, for all of the memory and for samples; memory: what the look adds to the
resident memory of the process that looks. The truth: the same processes, wrapped, as far as the engine merges them, and
how far the middle of a sample's bounds is from what all of the memory says.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import trio
from measuring import PAGE, Bench, Figure, Report, main, status, wait_for_agents

from udedup.engine.native import lib
from udedup.estimate.bounds import Sample, bound, chances
from udedup.estimate.figures import Estimate
from udedup.estimate.survey import Survey

PROCESSES: Final = 3
MEBIBYTES: Final = 1024
MEBIBYTES_QUICK: Final = 128
RUN: Final = 16
SAMPLES: Final = (0.05, 0.2)
REPEATS: Final = 5
HOST_FRAMES: Final = 64 << 18
SPEED: Final = 2.0
"""GB/s, at least."""
SHARE: Final = 0.01
"""Of the memory looked at, at most, for the look itself."""
SLACK: Final = 0.02
"""Of what is saved: how far the estimate may be from what is merged, since the processes go on meanwhile."""


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {name} in /proc/self/status")


def look(pids: Sequence[int], part: float) -> tuple[Estimate, float, int]:
    """An estimate, the CPU time it took, s, and what it added to this process's memory, bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = resident("VmRSS")
    began = time.process_time()
    survey = Survey(pids, part)
    trio.run(survey.look, 1, lambda pages: None)
    found = survey.judge()
    return found, time.process_time() - began, resident("VmHWM") - before


def stated(part: float) -> float:
    """The error stated of a sample of a host with 64 GiB, of the memory: half of it is in no other page, the rest in 3,
    4 or 100 equal pages or zero."""
    memory = {1: 0.5, 3: 0.1, 4: 0.1, 100: 0.15}
    seen = [0.0] * (lib.UDD_ESTIMATE_TIMES + 1)
    for frames, share in memory.items():
        for times, chance in enumerate(chances(part, frames, len(seen))):
            seen[times] += HOST_FRAMES * share / frames * chance
    zero = HOST_FRAMES * (1 - sum(memory.values())) * part
    found = bound(Sample(part, HOST_FRAMES, round(zero), round(HOST_FRAMES * part - zero), [0, *map(round, seen[1:])]))
    return (found.most - found.least) / 2 / HOST_FRAMES


def measure(bench: Bench, quick: bool) -> Report:
    """Looks at bare processes, then has an engine merge wrapped ones."""
    mebibytes = MEBIBYTES_QUICK if quick else MEBIBYTES
    runs = (mebibytes << 20) // PAGE // (2 * RUN)
    program = bench.compile("layout")
    with ExitStack() as stack:
        programs = [stack.enter_context(bench.start(None, program, runs, RUN, RUN, 0)) for _ in range(PROCESSES)]
        for each in programs:
            each.ask("fill")
        pids = [each.pid for each in programs]
        whole = [look(pids, 1.0) for _ in range(REPEATS)]
        samples = {part: [look(pids, part) for _ in range(REPEATS)] for part in SAMPLES}
    estimate = whole[0][0]
    looked = estimate.total.pages * PAGE
    # What the first look has taken the others use again.
    added = max(added for *_, added in whole)
    with bench.engine("--sleep-millisecs", "0") as engine, ExitStack() as stack:
        programs = [stack.enter_context(bench.start(engine, program, runs, RUN, RUN, 0)) for _ in range(PROCESSES)]
        wait_for_agents(engine, PROCESSES)
        for each in programs:
            each.ask("fill")
        for each in programs:
            each.ask(f"wait {runs * RUN}")
        now = status(engine)
        merged = now["pages_sharing"] + now["zero_pages"]
        after = look([each.pid for each in programs], 1.0)[0]
    figures = [
        Figure.of("CPU per GB of present memory", "s", [cpu / (looked / 1e9) for _, cpu, _ in whole], 1 / SPEED),
        Figure.of("memory added, of what is looked at", "%", [added / looked * 100], SHARE * 100),
        Figure.of(
            "estimate less what was merged, of what was merged",
            "%",
            [abs(estimate.saved - merged) / merged * 100],
            SLACK * 100,
        ),
        # Most of that is the agents' own memory.
        Figure.of("what is left to save after that, of what could be", "%", [after.saved / estimate.saved * 100]),
    ]
    for part, found in samples.items():
        name = f"sample of {part:.0%}"
        costs = [cpu / whole[0][1] * 100 for _, cpu, _ in found]
        errors = [abs(each.saved - estimate.saved) / each.total.frames * 100 for each, *_ in found]
        bounds = [(each.saved_most - each.saved_least) / 2 / each.total.frames * 100 for each, *_ in found]
        figures += [
            Figure.of(f"{name}: CPU, of that for all", "%", costs, 70),
            Figure.of(f"{name}: error stated, of the memory", "%", bounds),
            Figure.of(f"{name}: error, of the memory", "%", errors, max(bounds)),
        ]
    figures += [
        Figure.of(f"sample of {part:.0%} of 64 GiB: error stated, of the memory", "%", [stated(part) * 100])
        for part in SAMPLES
    ]
    details: dict[str, object] = {
        "bytes": looked,
        "saved_bytes": estimate.saved * PAGE,
        "merged_bytes": merged * PAGE,
        "already_bytes_when_merged": after.total.already_udedup * PAGE,
        "processors": os.cpu_count(),
    }
    return Report("estimate", "getrusage(2) and /proc/self/status of the process that looks", figures, details)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
