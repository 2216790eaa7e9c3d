#!/usr/bin/env python3
"""What does looking cost, beside ksmd, where there is next to nothing to share?

Two processes with nothing in common, the engine at KSM's default rate, then ksmd at the same on two bare processes of
the same kind. ``still``: memory that nobody writes to. ``reading``: half of it is read from an image on the engine's
mount over and over, always the same, and more than the rate limit allows to look at: hints come all the time. CPU is
that of the engine's process, FUSE included, and of the agents' threads, from filled memory on.
"""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
from measuring import PAGE, Bench, Engine, Figure, Report, main, process_cpu, status, wait_for_agents

from udedup.record.kernel import ksm, ksm_counter, ksmd_cpu

SECONDS: Final = 45.0
SECONDS_QUICK: Final = 20.0
RATE: Final = {"pages_to_scan": 100, "sleep_millisecs": 20}
"""KSM's default."""

OPTIONS: Final = (*(f"--{name.replace('_', '-')}={value}" for name, value in RATE.items()), "--pressure=off")
"""The same for the engine, whatever else goes on on the machine."""

PROCESSES: Final = 2
PAGES: Final = 32768
"""Of one layout: 128 MiB."""

STRETCH: Final = 128
READ_RATE: Final = 8000
"""Blocks a second of a process that reads."""

LIMIT: Final = 1.0
LIMIT_READING: Final = 1.1


@attrs.frozen
class Cost:
    """Of one side, in one run."""

    seconds: float
    engine: float
    """CPU of the engine or of ksmd, s."""

    agents: float
    """CPU of the agents, s."""

    visits: int
    """Pages looked at."""

    skipped: int
    """Pages passed over (smart scan)."""

    @property
    def a_minute(self) -> float:
        """CPU, s."""
        return (self.engine + self.agents) * 60 / self.seconds


def fill(bench: Bench, engine: Engine | None, stack: ExitStack, file: Path | None, *, seed: int) -> None:
    """Starts the processes; ``file``: what half of their memory is to be read from."""
    advice = () if engine else ("mergeable",)
    layout = bench.compile("layout")
    for number in range(PROCESSES):
        stretches = PAGES // STRETCH * (1 if file else 2)
        still = stack.enter_context(
            bench.start(engine, layout, stretches, 1, STRETCH - 1, PROCESSES * seed + number, *advice)
        )
        still.ask("fill")
        if file:
            program = bench.compile("rereads")
            reader = stack.enter_context(bench.start(engine, program, f"{file}{number}", PAGES, READ_RATE, *advice))
            reader.ask("begin")


def measure_udedup(bench: Bench, images: dict[str, Path], seconds: float, seed: int) -> Cost:
    """One run."""
    with bench.engine(*OPTIONS, images=images or None) as engine, ExitStack() as stack:
        fill(bench, engine, stack, engine.mount / "disk" if engine.mount else None, seed=seed)
        before = wait_for_agents(engine, 2 * PROCESSES if images else PROCESSES)
        engine_before = process_cpu(engine.pid)
        time.sleep(seconds)
        engine_cpu = process_cpu(engine.pid) - engine_before
        after = status(engine)
    return Cost(
        seconds,
        engine_cpu,
        after["cpu_seconds"]["agents"] - before["cpu_seconds"]["agents"],
        after["pages_scanned"] - before["pages_scanned"],
        after["pages_skipped"] - before["pages_skipped"],
    )


def measure_ksm(bench: Bench, images: dict[str, Path], seconds: float, seed: int) -> Cost:
    """One run."""
    with ExitStack() as stack:
        fill(bench, None, stack, next(iter(images.values())).parent / "disk" if images else None, seed=seed)
        with ksm(RATE):
            before = ksmd_cpu(), ksm_counter("pages_scanned"), ksm_counter("pages_skipped")
            time.sleep(seconds)
            after = ksmd_cpu(), ksm_counter("pages_scanned"), ksm_counter("pages_skipped")
    return Cost(seconds, after[0] - before[0], 0.0, after[1] - before[1], after[2] - before[2])


def measure(bench: Bench, quick: bool) -> Report:
    """Both kinds of memory, udedup and KSM in turns."""
    seconds = SECONDS_QUICK if quick else SECONDS
    disks = {f"disk{number}": bench.folder / f"disk{number}" for number in range(PROCESSES)}
    for path in disks.values():
        path.write_bytes(os.urandom(PAGES * PAGE))
    figures: list[Figure] = []
    details: dict[str, object] = {}
    kinds = (("still", dict[str, Path](), LIMIT), ("reading", disks, LIMIT_READING))
    for seed, (name, images, limit) in enumerate(kinds):
        ours, ksmd = (side(bench, images, seconds, seed) for side in (measure_udedup, measure_ksm))
        figures.append(Figure.of(f"{name}, by ksmd's", "×", [ours.a_minute / ksmd.a_minute], limit))
        details[name] = {"udedup": attrs.asdict(ours), "ksmd": attrs.asdict(ksmd)}
    method = f"CPU of engine and agents in {seconds:.0f} s from filled memory on, beside ksmd's in as many"
    return Report("idle", method, figures, details)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
