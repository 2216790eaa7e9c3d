#!/usr/bin/env python3
"""How long does it take to ask an engine with 200 agents for its metrics?

From the connection to the last byte, each time for a text that is made for it, as Prometheus asks. The programs sleep;
the engine scans at its default rate. The CPU is all of the engine's meanwhile.
"""

import socket
import sys
import time
from pathlib import Path
from typing import Final

from measuring import Bench, Figure, Report, main, process_cpu, wait_for_agents

from udedup.engine.metrics import FRESH_SECONDS

AGENTS: Final = 200
SCRAPES: Final = 30
SCRAPES_QUICK: Final = 8
PAUSE: Final = 2 * FRESH_SECONDS
LIMIT_MILLISECS: Final = 20.0
REQUEST: Final = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"

SLEEPERS: Final = f"""
n=1
while [ $n -lt {AGENTS} ]; do sleep 600 & all="$all $!" n=$((n + 1)); done
read -r _
kill $all
"""


def scrape(path: Path) -> tuple[float, bytes]:
    """How long it took, s, and the text."""
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(REQUEST)
        parts = []
        while part := sock.recv(1 << 20):
            parts.append(part)
    taken = time.perf_counter() - began
    head, _, text = b"".join(parts).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(head.decode())
    return taken, text


def measure(bench: Bench, quick: bool) -> Report:
    """All scrapes in one engine's life."""
    count = SCRAPES_QUICK if quick else SCRAPES
    path = bench.folder / "metrics"
    script = bench.folder / "sleepers"
    script.write_text(SLEEPERS)
    with bench.engine("--metrics", str(path)) as engine, bench.start(engine, Path("/bin/sh"), script):
        wait_for_agents(engine, AGENTS)
        scrape(path)
        time.sleep(PAUSE)
        samples, costs = [], []
        for _ in range(count):
            before = process_cpu(engine.pid)
            taken, text = scrape(path)
            costs.append((process_cpu(engine.pid) - before) * 1e3)
            samples.append(taken * 1e3)
            time.sleep(PAUSE)
    return Report(
        benchmark="metrics",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        figures=[
            Figure.of(f"scrape with {AGENTS} agents", "ms", samples, LIMIT_MILLISECS),
            Figure.of("CPU of the engine per scrape", "ms", costs),
        ],
        details={"samples": text.count(b"\n") - text.count(b"\n#") - 1, "bytes": len(text)},
    )


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
