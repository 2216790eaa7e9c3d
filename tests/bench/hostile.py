#!/usr/bin/env python3
"""Do hostile clients of another user make an engine slower for others?

For each kind (tests/engine/hostile.py) in turns: the latencies of honest agents and of a control client beside an
honest process of the same size, then beside the hostile one, and so on. Both run at the lowest priority, so that what
is measured is what the engine does for them, not the processor time that any busy process takes. What is compared is
the median time from a hint to the merge of its page, and that of a control request (`status` without what the kernel
says), of each two that followed each other; the figure is the median of these ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
from measuring import PAGE, Bench, Engine, Figure, Report, workplace

# isort: split
# It has told Python where these are.
from engine.fake_agent import FakeAgent, page
from engine.hostile import KINDS
from support.users import as_nobody, open_way

from udedup.engine import control

BASE: Final = 0x10000000
PAGES: Final = 300
HINTS: Final = 20
REQUESTS: Final = 40
PAUSE: Final = 0.03
"""Between two samples, s."""

PAIRS: Final = 5
PAIRS_QUICK: Final = 1
LIMIT: Final = 1.10
START_SECONDS: Final = 1.0
PATIENCE: Final = 30.0
HOSTILE: Final = tuple(kind for kind in KINDS if kind != "honest")


@attrs.define
class Latencies:
    """Samples, s."""

    hints: list[float] = attrs.field(factory=list)
    """From a hint to the merge of its page."""

    requests: list[float] = attrs.field(factory=list)
    """Of a control request."""

    def medians(self) -> tuple[float, float]:
        """Of both."""
        return statistics.median(self.hints), statistics.median(self.requests)


def wait_for(condition: Callable[[], bool], agents: tuple[FakeAgent, ...]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for agent in agents:
            if agent.farewell is not None:
                raise RuntimeError(f"an honest agent was dropped: {agent.farewell}")
        if time.monotonic() > deadline:
            raise RuntimeError("an honest agent is not served any more")
        time.sleep(0.0001)


@contextmanager
def beside(engine: Engine, kind: str) -> Iterator[None]:
    """Another user's client is at work."""
    open_way(engine.socket.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent)])}
    client = subprocess.Popen(
        ["chrt", "--idle", "0", *as_nobody(), sys.executable, "-m", "engine.hostile", str(engine.socket), kind],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(START_SECONDS)
        yield
        if client.poll() is not None:
            raise RuntimeError(f"the client {kind} ended with {client.returncode}")
    finally:
        client.kill()
        client.wait()


def measure(engine: Engine, ret: Latencies) -> None:
    """Two honest agents of our own user, and one control client."""
    first = FakeAgent(engine.socket, {BASE + i * PAGE: page(1 + i) for i in range(PAGES)}).join()
    second = FakeAgent(engine.socket, {2 * BASE + i * PAGE: page(1 + i) for i in range(PAGES)}).join()
    both = (first, second)
    try:
        wait_for(lambda: len(first.placed) == len(second.placed) == PAGES, both)
        for i in range(HINTS):
            address = 2 * BASE + i * PAGE
            time.sleep(PAUSE)
            second.write(address, first.memory[BASE + i * PAGE])
            began = time.monotonic()
            second.hint(address, PAGE)
            wait_for(lambda address=address: address in second.placed, both)
            ret.hints.append(time.monotonic() - began)
        for _ in range(REQUESTS):
            time.sleep(PAUSE)
            began = time.monotonic()
            control.request(engine.socket, {"op": "status", "kernel": False})
            ret.requests.append(time.monotonic() - began)
        for agent in both:
            if any(agent.read(address) != content for address, content in agent.memory.items()):
                raise RuntimeError("an honest agent's memory has changed")
    finally:
        first.leave()
        second.leave()


def compare(bench: Bench, kind: str, sleep: int, pairs: int) -> list[Figure]:
    """The ratios of one kind."""
    medians: list[list[tuple[float, float]]] = []
    with bench.engine("--socket-mode", "666", "--sleep-millisecs", str(sleep)) as engine:
        # Before the engine has seen anything, and its memory has its size.
        with beside(engine, "honest"):
            measure(engine, Latencies())
        for _ in range(pairs):
            pair = []
            for beside_whom in ("honest", kind):
                latencies = Latencies()
                with beside(engine, beside_whom):
                    measure(engine, latencies)
                pair.append(latencies.medians())
            medians.append(pair)
    figures = []
    for i, what in enumerate(("hint to merged", "control request")):
        ratios = [during[i] / before[i] for before, during in medians]
        figure = Figure.of(f"{kind}, sleep {sleep} ms: {what}", "×", ratios, LIMIT)
        before, during = (
            1e3 * statistics.median(latencies[i] for latencies in side) for side in zip(*medians, strict=True)
        )
        print(
            f"{kind:<12} {sleep:>3} ms  {what:<16} {before:8.3f} ms  {during:8.3f} ms"
            f"  × {figure.value:.3f} ({figure.low:.3f} … {figure.high:.3f})",
            file=sys.stderr,
            flush=True,
        )
        figures.append(figure)
    return figures


def main() -> int:
    """1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one pair of each, instead of {PAIRS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    parser.add_argument("--sleep-millisecs", type=int, default=0, help="of the engine (default: 0, at full speed)")
    parser.add_argument("kind", nargs="*", help=f"which clients (default: all): {', '.join(HOSTILE)}")
    arguments = parser.parse_args()
    for kind in arguments.kind:
        if kind not in HOSTILE:
            parser.error(f"no client is called {kind}: choose from {', '.join(HOSTILE)}")
    if os.geteuid() != 0:
        print(f"{sys.argv[0]}: another user's clients take root to start: run it as root", file=sys.stderr)
        return 2
    pairs = PAIRS_QUICK if arguments.quick else PAIRS
    figures: list[Figure] = []
    with workplace() as bench:
        for kind in arguments.kind or HOSTILE:
            figures += compare(bench, kind, arguments.sleep_millisecs, pairs)
    report = Report("hostile", "median of ratios of medians, beside a hostile and an honest process in turns", figures)
    text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
