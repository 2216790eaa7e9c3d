#!/usr/bin/env python3
"""How soon after a read is a page merged, if its block is shared already?

Programs A and B each read the same blocks of an image on the engine's mount, and all of that is merged. Then B, which
by now has been idle for a while, reads further blocks that A has twice, one at a time with a pause before each: the
time from pread's return to the moment when B's agent counts the page as merged. The engine has no rate limit. All
that takes part goes before other programs of the machine, as if it were idle.
"""

import math
import os
import sys
import time
from contextlib import ExitStack
from typing import Final

from measuring import PAGE, REALTIME_PRIORITY, Bench, Figure, Report, main, status, wait_for_agents

BOTH: Final = 256
"""Blocks that both read."""

SAMPLES: Final = 400
SAMPLES_QUICK: Final = 60
PAUSE_MILLISECS: Final = 37
"""Not in step with any timer of the engine."""

REST_SECONDS: Final = 2.0
LIMIT_MILLISECS: Final = 20.0


def percentile(samples: list[float], fraction: float) -> float:
    """The smallest sample that the given part of all lie at or below."""
    return sorted(samples)[max(0, math.ceil(fraction * len(samples)) - 1)]


def measure(bench: Bench, quick: bool) -> Report:
    """All samples in one engine's life."""
    count = SAMPLES_QUICK if quick else SAMPLES
    blocks = BOTH + count
    image = bench.folder / "image.raw"
    image.write_bytes(os.urandom(blocks * PAGE))
    program = bench.compile("reader")
    with bench.engine("--sleep-millisecs", "0", images={image.name: image}) as engine, ExitStack() as stack:
        assert engine.mount is not None
        os.sched_setscheduler(engine.pid, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))
        file = engine.mount / image.name
        first, second = (
            stack.enter_context(bench.start(engine, program, file, 2 * blocks, undisturbed=True)) for _ in range(2)
        )
        wait_for_agents(engine, 2)
        for _ in range(2):
            first.ask(f"read 0 {blocks}")
        second.ask(f"read 0 {BOTH}")
        first.ask(f"wait {2 * blocks}")
        second.ask(f"wait {BOTH}")
        time.sleep(REST_SECONDS)
        *times, _ = second.ask(f"sample {BOTH} {count} {PAUSE_MILLISECS}")
        lead = status(engine)["lead_time_seconds"]
    milliseconds = [int(time_) / 1e6 for time_ in times]
    figures = [
        Figure.of("hint to merged, p50", "ms", milliseconds, LIMIT_MILLISECS),
        Figure.of("hint to merged, p99", "ms", [percentile(milliseconds, 0.99)]),
    ]
    method = "wall time from pread's return to the agent's count of merged pages; block shared already; engine at rest"
    return Report("latency", method, figures, {"engines_lead_times_seconds": lead})


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
