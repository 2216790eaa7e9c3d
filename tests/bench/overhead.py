#!/usr/bin/env python3
"""What do programs lose that are wrapped while nothing of theirs is merged?

Pairs of a bare and a wrapped process do the same work in turns: a program that lives on malloc and mmap,
redis-server under redis-benchmark, and preads of 4 KiB from the page cache. Two bare processes of the first kind differ
by a percent or two for as long as they live, by where their memory happens to lie; so pairs of it are started anew, and
each counts with the median of its turns. The engine scans a page
an hour, so that neither merging nor scanning is part of it; hints are on. CPU time where the question allows it: of the
process, with the agent's threads. For the pread, each process compares libc's function with the raw system
call, and the wrapped process's difference less the bare one's is what the hook adds. Turns are short and many: the
median of their ratios then stands still on a busy machine.
"""

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from measuring import UDEDUP, Bench, Engine, Figure, Report, main, process_cpu, wait_for_agents

PAIRS: Final = 101
PAIRS_QUICK: Final = 31
CHURN_ROUNDS: Final = 300
CHURN_TURNS: Final = 8
"""of each pair."""
REDIS_REQUESTS: Final = 10_000
REDIS_COMMANDS: Final = "set,get"
PREADS: Final = 20_000
LOSS_LIMIT: Final = 1.0
"""%."""
PREAD_LIMIT: Final = 100.0
"""ns."""
READY_SECONDS: Final = 20.0
IDLE: Final = ("--sleep-millisecs", "3600000", "--pages-to-scan", "1")


def losses(bare: list[float], wrapped: list[float]) -> list[float]:
    """What each pair lost, %."""
    return [(with_it / without - 1) * 100 for without, with_it in zip(bare, wrapped, strict=True)]


def measure_churn(bench: Bench, engine: Engine, pairs: int) -> tuple[Figure, dict[str, object]]:
    """malloc and mmap."""
    program = bench.compile("churn")
    times: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs):
        # Who is first, at the start and in a turn, finds other memory and other caches: each in turn.
        order = (True, False) if pair % 2 else (False, True)
        turns: dict[bool, list[float]] = {False: [], True: []}
        with ExitStack() as stack:
            both = {
                each: stack.enter_context(bench.start(engine if each else None, program, CHURN_ROUNDS))
                for each in order
            }
            wait_for_agents(engine, 1)
            for process in both.values():
                process.ask("warm up")
            for turn in range(CHURN_TURNS):
                for is_wrapped in order if turn % 2 else order[::-1]:
                    turns[is_wrapped].append(int(both[is_wrapped].ask("go")[0]) / 1e6)
        for is_wrapped in order:
            times[is_wrapped].append(statistics.median(turns[is_wrapped]))
    figure = Figure.of("malloc and mmap, CPU lost", "%", losses(times[False], times[True]), LOSS_LIMIT)
    return figure, {
        "bare_ms": Figure.of("bare", "ms", times[False]).as_dict(),
        "wrapped_ms": Figure.of("wrapped", "ms", times[True]).as_dict(),
    }


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def redis(bench: Bench, engine: Engine | None) -> Iterator[tuple[int, int]]:
    """Runs a redis-server, wrapped if there is an engine; yields its pid and its port."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(bench.folder)]
    if engine is not None:
        command = [*UDEDUP, "run", "--socket", str(engine.socket), "--", *command]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + READY_SECONDS
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield server.pid, port
        finally:
            server.terminate()


def load(port: int) -> float:
    """Runs redis-benchmark once; returns requests per second over both commands."""
    command = ["redis-benchmark", "-p", str(port), "-n", str(REDIS_REQUESTS), "-t", REDIS_COMMANDS, "--csv"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rates = [float(line.split('","')[1]) for line in output.splitlines()[1:]]
    return len(rates) / sum(1 / rate for rate in rates)


def measure_redis(bench: Bench, engine: Engine, pairs: int) -> tuple[Figure, Figure, dict[str, object]]:
    """CPU of the server, and requests per second."""
    cpu: dict[bool, list[float]] = {False: [], True: []}
    rate: dict[bool, list[float]] = {False: [], True: []}
    with redis(bench, None) as bare, redis(bench, engine) as wrapped:
        wait_for_agents(engine, 1)
        for _, port in (bare, wrapped):
            load(port)
        for pair in range(pairs):
            for is_wrapped in (True, False) if pair % 2 else (False, True):
                pid, port = wrapped if is_wrapped else bare
                before = process_cpu(pid)
                rate[is_wrapped].append(load(port))
                cpu[is_wrapped].append((process_cpu(pid) - before) * 1e6 / (2 * REDIS_REQUESTS))
    slower = [(without / with_it - 1) * 100 for without, with_it in zip(rate[False], rate[True], strict=True)]
    return (
        Figure.of("redis-benchmark, server's CPU lost", "%", losses(cpu[False], cpu[True]), LOSS_LIMIT),
        # Client and server share two processors with all the rest: for information.
        Figure.of("redis-benchmark, throughput lost", "%", slower),
        {
            "bare_us_per_request": Figure.of("bare", "µs", cpu[False]).as_dict(),
            "wrapped_us_per_request": Figure.of("wrapped", "µs", cpu[True]).as_dict(),
            "bare_requests_per_second": Figure.of("bare", "1/s", rate[False]).as_dict(),
            "wrapped_requests_per_second": Figure.of("wrapped", "1/s", rate[True]).as_dict(),
        },
    )


def measure_pread(bench: Bench, engine: Engine, pairs: int) -> tuple[Figure, dict[str, object]]:
    """What the hook adds, ns."""
    program = bench.compile("pread")
    file: Path = bench.folder / "data"
    file.write_bytes(bytes(range(256)) * 1024)
    added, wrapped_calls, bare_calls = list[float](), list[float](), list[float]()
    with ExitStack() as stack:
        bare = stack.enter_context(bench.start(None, program, file))
        wrapped = stack.enter_context(bench.start(engine, program, file))
        wait_for_agents(engine, 1)
        for _ in range(pairs):
            (bare_raw, bare_libc), (raw, libc) = (map(float, each.ask(f"time {PREADS}")) for each in (bare, wrapped))
            added.append((libc - raw) - (bare_libc - bare_raw))
            wrapped_calls.append(libc)
            bare_calls.append(bare_libc)
    return Figure.of("pread of 4 KiB, added by the hook", "ns", added, PREAD_LIMIT), {
        "bare_ns": Figure.of("bare", "ns", bare_calls).as_dict(),
        "wrapped_ns": Figure.of("wrapped", "ns", wrapped_calls).as_dict(),
    }


def measure(bench: Bench, quick: bool) -> Report:
    """All three."""
    pairs = PAIRS_QUICK if quick else PAIRS
    with bench.engine(*IDLE) as engine:
        churn, churn_details = measure_churn(bench, engine, pairs // 2)
        redis_cpu, redis_rate, redis_details = measure_redis(bench, engine, pairs)
        pread, pread_details = measure_pread(bench, engine, pairs)
    return Report(
        "overhead",
        "pairs of a bare and a wrapped process in turns; nothing scanned or merged, hints on",
        [churn, redis_cpu, redis_rate, pread],
        {"malloc and mmap": churn_details, "redis": redis_details, "pread": pread_details},
    )


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
