#!/usr/bin/env python3
"""What do quiet breaks cost?

Everything twice, with `udedup run --quiet-breaks` and without. Memory: two processes, a third of whose pages are
equal in both, once all is merged that can be: Pss of processes and engine by /proc/PID/smaps, and page tables. CPU:
what engine and agents took for that, and what they take per second afterwards. Writes: to single merged pages in
random order, and to all of them in order, by the wall clock of the writer; with quiet breaks pages that nobody else has
cost the same.
"""

import sys
import time
from contextlib import ExitStack
from typing import Final

import attrs
from measuring import Bench, Engine, Figure, Report, main, process_cpu, smaps, status, stopped, wait_for_agents
from memory import page_tables, wait_steady

QUIET: Final = ("--quiet-breaks",)
PROCESSES: Final = 2
RUN: Final = 16
MEBIBYTES: Final = 192
MEBIBYTES_QUICK: Final = 48
IDLE_SECONDS: Final = 4.0
PAGES: Final = 4096
"""Of each area that is written to."""

SCATTERED: Final = 1024
ROUNDS: Final = 7
ROUNDS_QUICK: Final = 2


@attrs.frozen
class Settled:
    """Two processes whose memory is as small as it gets."""

    memory: int
    """Pss of both and of the engine, bytes."""

    tables: int
    """Their page tables, bytes."""

    merge_cpu: float
    """CPU that engine and agents took, s."""

    idle_cpu: float
    """CPU that they take from then on, s/s."""


def engine_and_agents_cpu(engine: Engine) -> float:
    """So far, s."""
    return process_cpu(engine.pid) + float(status(engine)["cpu_seconds"]["agents"])


def settle(bench: Bench, options: tuple[str, ...], mebibytes: int) -> Settled:
    """Runs two processes with these options of `udedup run`."""
    runs = (mebibytes << 20) // 4096 // (3 * RUN)
    with bench.engine() as engine, ExitStack() as stack:
        program = bench.compile("layout")
        processes = [
            stack.enter_context(bench.start(engine, program, runs, RUN, 2 * RUN, 0, options=options))
            for _ in range(PROCESSES)
        ]
        wait_for_agents(engine, PROCESSES)
        before = engine_and_agents_cpu(engine)
        for process in processes:
            process.ask("fill")
        for process in processes:
            process.ask(f"wait {runs * RUN}")
        wait_steady(engine)
        merged = engine_and_agents_cpu(engine)
        time.sleep(IDLE_SECONDS)
        idle = engine_and_agents_cpu(engine)
        pids = [process.pid for process in processes]
        tables = sum(map(page_tables, pids))
        memory = sum(sizes["Pss"] for pid in (*pids, engine.pid) for _, sizes in smaps(pid))
        for process in processes:
            process.ask("verify")
    return Settled(memory, tables, merged - before, (idle - merged) / IDLE_SECONDS)


def write(bench: Bench, options: tuple[str, ...], rounds: int) -> tuple[list[float], list[float]]:
    """Time per write to merged pages, ns: to single ones, in order."""
    single: list[float] = []
    ordered: list[float] = []
    program = bench.compile("breaks")
    with (
        bench.engine("--sleep-millisecs", "0") as engine,
        bench.start(engine, program, PAGES, options=options) as process,
    ):
        wait_for_agents(engine, 1)
        for number in range(rounds):
            for seed, samples, command in ((0, single, f"scattered {SCATTERED}"), (1, ordered, "sequential")):
                process.ask(f"map {2 * number + seed} 0")
                process.ask("wait")
                with stopped(engine):
                    samples.append(float(process.ask(command)[1]))
                process.ask("unmap")
    return single, ordered


def measure(bench: Bench, quick: bool) -> Report:
    """With and without."""
    figures = []
    for name, options in (("", ()), (", quiet", QUIET)):
        settled = settle(bench, options, MEBIBYTES_QUICK if quick else MEBIBYTES)
        single, ordered = write(bench, options, ROUNDS_QUICK if quick else ROUNDS)
        figures += [
            Figure.of(f"memory of two processes and the engine{name}", "MB", [settled.memory / 1e6]),
            Figure.of(f"their page tables{name}", "MB", [settled.tables / 1e6]),
            Figure.of(f"CPU to merge them{name}", "s", [settled.merge_cpu]),
            Figure.of(f"CPU from then on{name}", "ms/s", [settled.idle_cpu * 1e3]),
            Figure.of(f"write to a single page{name}", "µs", [time / 1e3 for time in single]),
            Figure.of(f"overwrite in order, a page{name}", "µs", [time / 1e3 for time in ordered]),
        ]
    return Report("quiet", "each once with --quiet-breaks and once without", figures)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
