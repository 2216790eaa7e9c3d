#!/usr/bin/env python3
"""How much memory do engine and agents need for themselves?

Four processes of 512 MiB, half of it equal in all, half their own, in stretches of 16 pages: after the merge the engine
has an index of all shared pages and all candidates. All by the kernel's own numbers (Pss, /proc/PID/smaps): the engine
without the store's segments; in each process the shared area, libudedup.so, and the anonymous memory outside of the
area with the pages, less what a bare process of the same kind has there: that is the agent's reservation. Page
tables are the kernel's: what they grew by is listed beside.
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import attrs
from measuring import PAGE, Bench, Engine, Figure, Program, Report, main, smaps, status, wait_for_agents

PROCESSES: Final = 4
MEBIBYTES: Final = 512
MEBIBYTES_QUICK: Final = 128
RUN: Final = 16
FIXED_BYTES: Final = 60_000_000
SHARE: Final = 0.01
STEADY_SECONDS: Final = 60.0
STEADY_ROUNDS: Final = 3
"""Rounds of the linear scan after the last merge: all candidates are in the index then."""

STORE: Final = "/memfd:udedup-store"
SHARED_AREA: Final = "/memfd:udedup-shared"
LIBRARY: Final = "libudedup.so"


@attrs.frozen
class Usage:
    """One process's memory besides its payload and the store, bytes."""

    anonymous: int
    """Outside of the payload."""

    shared_area: int
    library: int
    page_tables: int
    """Of the whole process."""


def usage(pid: int, payload: tuple[int, int]) -> Usage:
    """Asks the kernel; ``payload``: start and end of the area to leave out."""
    anonymous = shared_area = library = 0
    for header, sizes in smaps(pid):
        start, end = (int(word, 16) for word in header.split()[0].split("-"))
        if SHARED_AREA in header:
            shared_area += sizes["Pss"]
        elif LIBRARY in header:
            library += sizes["Pss"]
        elif STORE not in header and not (payload[0] <= start and end <= payload[1]):
            anonymous += sizes["Anonymous"]
    return Usage(anonymous, shared_area, library, page_tables(pid))


def page_tables(pid: int) -> int:
    """VmPTE, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no VmPTE in /proc/{pid}/status")


def payload_of(program: Program) -> tuple[int, int]:
    """Has it fill its memory; where that is."""
    _, start, end = program.ask("fill")
    return int(start, 16), int(end, 16)


def wait_steady(engine: Engine) -> dict[str, Any]:
    """Returns the first status after STEADY_ROUNDS rounds in which nothing was merged."""
    deadline = time.monotonic() + STEADY_SECONDS
    now = status(engine)
    merged, since = now["merges"]["pages"], now["full_scans"]
    while now["full_scans"] < since + STEADY_ROUNDS:
        if time.monotonic() > deadline:
            raise RuntimeError(f"still merging after {STEADY_SECONDS:.0f} s: {now['merges']}")
        time.sleep(0.5)
        now = status(engine)
        if now["merges"]["pages"] != merged:
            merged, since = now["merges"]["pages"], now["full_scans"]
    return now


def engine_without_store(pid: int) -> int:
    """Pss of the engine, bytes, less the store. Of shared areas it is one half, the other is the agents'."""
    return sum(sizes["Pss"] for header, sizes in smaps(pid) if STORE not in header)


def measure(bench: Bench, quick: bool) -> Report:
    """Once: memory is no matter of chance."""
    mebibytes = MEBIBYTES_QUICK if quick else MEBIBYTES
    managed = PROCESSES * mebibytes << 20
    runs = (mebibytes << 20) // PAGE // (2 * RUN)
    program = bench.compile("layout")
    with bench.engine("--sleep-millisecs", "0") as engine, ExitStack() as stack:
        bare = stack.enter_context(bench.start(None, program, runs, RUN, RUN, 0))
        base = usage(bare.pid, payload_of(bare))
        stack.pop_all().close()
        empty_engine = engine_without_store(engine.pid)
        programs = [stack.enter_context(bench.start(engine, program, runs, RUN, RUN, 0)) for _ in range(PROCESSES)]
        wait_for_agents(engine, PROCESSES)
        payloads = [payload_of(each) for each in programs]
        for each in programs:
            each.tell(f"wait {runs * RUN}")
        for each in programs:
            each.hear()
        now = wait_steady(engine)
        engine_bytes = engine_without_store(engine.pid)
        used = [usage(each.pid, payload) for each, payload in zip(programs, payloads, strict=True)]
    agents = [each.anonymous - base.anonymous + each.shared_area + each.library for each in used]
    tables = [each.page_tables - base.page_tables for each in used]
    limit = SHARE * managed + FIXED_BYTES
    figures = [
        Figure.of("engine and agents", "MB", [(engine_bytes + sum(agents)) / 1e6], limit / 1e6),
        Figure.of("engine", "MB", [engine_bytes / 1e6]),
        Figure.of("an agent", "MB", [bytes_ / 1e6 for bytes_ in agents]),
        Figure.of("a process's page tables, more than bare", "MB", [bytes_ / 1e6 for bytes_ in tables]),
    ]
    details: dict[str, object] = {
        "managed_bytes": managed,
        "engine_before_agents_bytes": empty_engine,
        "agents": [attrs.asdict(each) for each in used],
        "bare": attrs.asdict(base),
        "by_engines_account": now["memory"],
        "candidates": now["pages_unshared"],
        "shared": now["pages_shared"],
    }
    return Report("memory", "Pss by /proc/PID/smaps after the merge", figures, details)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
