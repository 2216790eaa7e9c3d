#!/usr/bin/env python3
"""What an engine does under real memory pressure, and who is charged for what.

In a control group: an engine at its default rate, and wrapped programs, a third of whose memory is equal in all. Then
the group gets a limit that leaves hardly room for cached files, and processes in it read a large one, over and over
(the pressure is the kernel's own: everybody who allocates there waits). Half way through another program has new
memory. Beside that, two groups without a limit, one with an engine and one with programs, for what is charged to whom.
"""

import sys
import time
from contextlib import ExitStack
from typing import Any, Final

import attrs
from measuring import PAGE, Bench, Engine, Figure, Report, main, smaps, status, wait_for_agents
from support.cgroup import Group, hogs, memory_group, no_pressure, thrash_file

RUN: Final = 16
GAP: Final = 32
STRETCHES: Final = 512
"""Of RUN equal and GAP own pages each: 96 MiB a program, 32 of them equal."""

STRETCHES_LATE: Final = 64
"""12 MiB."""

LEFT: Final = 0.1
"""Part of the group's memory that is left for files."""

FILE: Final = 128 << 20
HOGS: Final = 3
CALM_SECONDS: Final = 6.0
PRESSED_SECONDS: Final = 20.0
PRESSED_SECONDS_QUICK: Final = 10.0
AFTER_SECONDS: Final = 40.0
STEP_SECONDS: Final = 0.5
SETTLE_SECONDS: Final = 2.0
STORE: Final = "/memfd:udedup-store"
SHARED_AREA: Final = "/memfd:udedup-shared"


@attrs.frozen
class Sample:
    """One look at the engine."""

    seconds: float
    """Since the beginning."""

    level: str
    some: float
    full: float
    pages_to_scan: int
    scanned: int
    """Pages, cumulative."""

    candidates: int
    index_bytes: int
    engine_bytes: int
    """Anonymous memory of the engine."""

    charged: int
    """To the group, bytes."""


def engine_bytes(pid: int) -> int:
    """Its own memory: anonymous pages."""
    return sum(sizes["Anonymous"] for header, sizes in smaps(pid) if STORE not in header and SHARED_AREA not in header)


def look(engine: Engine, group: Group, began: float) -> Sample:
    now = status(engine)
    pressure = now["pressure"]
    return Sample(
        seconds=round(time.monotonic() - began, 1),
        level=pressure["level"],
        some=pressure["some"],
        full=pressure["full"],
        pages_to_scan=now["pages_to_scan"],
        scanned=now["pages_scanned"],
        candidates=now["index"]["candidates"],
        index_bytes=now["index"]["bytes"],
        engine_bytes=engine_bytes(engine.pid),
        charged=group.charged,
    )


def watch(engine: Engine, group: Group, began: float, seconds: float, *, until: str = "") -> list[Sample]:
    """Looks for so long, or until a level is reached."""
    samples = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        samples.append(look(engine, group, began))
        if samples[-1].level == until:
            break
        time.sleep(STEP_SECONDS)
    return samples


def rate(samples: list[Sample]) -> float:
    """Pages scanned a second."""
    first, last = samples[0], samples[-1]
    return (last.scanned - first.scanned) / max(last.seconds - first.seconds, STEP_SECONDS)


def play(bench: Bench, seconds: float) -> dict[str, list[Sample]]:
    """The samples, by phase."""
    program = bench.compile("layout")
    file = thrash_file(bench.folder / "thrash", FILE)
    layout = (STRETCHES, RUN, GAP, 0)
    with memory_group(f"bench-{time.time_ns():x}") as group, ExitStack() as stack:
        engine = stack.enter_context(bench.engine(prefix=group.prefix))
        programs = [stack.enter_context(bench.start(engine, program, *layout, prefix=group.prefix)) for _ in range(2)]
        newcomer = (STRETCHES_LATE, RUN, GAP, 0)
        late = stack.enter_context(bench.start(engine, program, *newcomer, prefix=group.prefix))
        wait_for_agents(engine, 3)
        for each in programs:
            each.ask("fill")
        for each in programs:
            each.ask(f"wait {STRETCHES * RUN}")
        began = time.monotonic()
        phases = {"before": watch(engine, group, began, CALM_SECONDS)}
        with hogs(group, file, HOGS, left=LEFT):
            phases["pressed"] = watch(engine, group, began, seconds / 2)
            late.ask("fill")
            phases["pressed, with a newcomer"] = watch(engine, group, began, seconds / 2)
        phases["after"] = watch(engine, group, began, AFTER_SECONDS, until="none")
        phases["calm again"] = watch(engine, group, began, CALM_SECONDS)
        late.ask(f"wait {STRETCHES_LATE * RUN}")
        for each in (*programs, late):
            each.ask("verify")
        assert group.kills == 0
        phases_log = engine.log.read_text()
        assert "memory is critically short" in phases_log, phases_log
    return phases


def charges(bench: Bench) -> dict[str, int]:
    """Bytes charged to an engine's group and to that of its programs, before and after the merge."""
    program = bench.compile("layout")
    stamp = f"{time.time_ns():x}"
    with memory_group(f"engine-{stamp}") as ours, memory_group(f"programs-{stamp}") as theirs, ExitStack() as stack:
        engine = stack.enter_context(bench.engine("--sleep-millisecs", "0", prefix=ours.prefix))
        with bench.start(None, program, 2 * STRETCHES, RUN, 0, 0, prefix=theirs.prefix) as bare:
            bare.ask("fill")
            without = theirs.charged
        idle = ours.charged
        programs = []
        for _ in range(2):
            programs.append(
                stack.enter_context(bench.start(engine, program, 2 * STRETCHES, RUN, 0, 0, prefix=theirs.prefix))
            )
            if len(programs) == 1:
                # Nobody else has its memory yet: what it takes more than the bare one is the agent's.
                wait_for_agents(engine, 1)
                programs[0].ask("fill")
                time.sleep(SETTLE_SECONDS)
                alone = theirs.charged
        wait_for_agents(engine, 2)
        programs[1].ask("fill")
        for each in programs:
            each.ask(f"wait {2 * STRETCHES * RUN}")
        time.sleep(SETTLE_SECONDS)
        return {
            "one bare program": without,
            "one wrapped program, nothing merged": alone,
            "engine before": idle,
            "engine": ours.charged,
            "two merged programs": theirs.charged,
            "pages equal in both": 2 * STRETCHES * RUN * PAGE,
        }


def measure(bench: Bench, quick: bool) -> Report:
    """Once: it is about what happens, not about how fast."""
    phases = play(bench, PRESSED_SECONDS_QUICK if quick else PRESSED_SECONDS)
    pressed = [*phases["pressed"], *phases["pressed, with a newcomer"]]
    full = [sample for sample in pressed if sample.level == "full"]
    first_full = next((sample for sample in full), pressed[-1])
    before = phases["before"][-1]
    began = phases["pressed"][0].seconds
    charged = charges(bench)
    mega = 1e6
    figures = [
        Figure.of("pressure to level full", "s", [first_full.seconds - began], 10.0),
        Figure.of("pages_to_scan before", "1", [before.pages_to_scan]),
        Figure.of("pages_to_scan at level full", "1", [sample.pages_to_scan for sample in full]),
        Figure.of("pages scanned a second, before", "1", [rate(phases["before"])]),
        Figure.of("pages scanned a second, pressed", "1", [rate(pressed)]),
        Figure.of("candidates before", "1", [before.candidates]),
        Figure.of("candidates when full was seen first", "1", [first_full.candidates]),
        Figure.of("index before", "MB", [before.index_bytes / mega]),
        Figure.of("index at level full, most", "MB", [max(sample.index_bytes for sample in full) / mega]),
        Figure.of("engine's own memory before", "MB", [before.engine_bytes / mega]),
        Figure.of(
            "engine's own memory at level full, most",
            "MB",
            [max(sample.engine_bytes for sample in full) / mega],
            before.engine_bytes / mega,
        ),
        Figure.of(
            "pressure's end to level none",
            "s",
            [phases["after"][-1].seconds - phases["after"][0].seconds],
            AFTER_SECONDS,
        ),
        Figure.of("pages scanned a second, afterwards", "1", [rate(phases["calm again"])]),
        *(Figure.of(f"charged: {what}", "MB", [bytes_ / mega]) for what, bytes_ in charged.items()),
    ]
    details: dict[str, Any] = {phase: [attrs.asdict(sample) for sample in samples] for phase, samples in phases.items()}
    return Report(
        "pressure", f"{LEFT:.0%} of a group's memory left for {HOGS} readers of {FILE >> 20} MiB", figures, details
    )


if __name__ == "__main__":
    if (reason := no_pressure()) is not None:
        print(f"{sys.argv[0]}: {reason}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(__doc__, measure))
