"""What `udedup top` takes of a processor at its default refresh (wanted: 1% at most with 100 processes).

It runs in a terminal of its own, and asks a stand-in for an engine all of whose figures change. With --engine it asks
a real one that serves so many wrapped programs (root), and what that takes is measured as well, without and with `top`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.answers import Answers
from support.statuses import Busy
from support.terminal import ProgramInTerminal

UDEDUP = (sys.executable, "-m", "udedup")


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, so far."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def measure(socket: Path, seconds: float, size: tuple[int, int], engine: int | None) -> list[float]:
    """Percent of a processor that top takes, and that the engine does, after the start."""
    columns, lines = size
    with ProgramInTerminal([*UDEDUP, "top", "--socket", str(socket)], columns=columns, lines=lines) as top:
        top.until(lambda screen: len(screen) == lines, "drawn")
        pids = [top.process.pid, *([] if engine is None else [engine])]
        settled = time.monotonic() + 3
        while time.monotonic() < settled:
            top.read(0.1)
        before, began = [cpu_seconds(pid) for pid in pids], time.monotonic()
        while time.monotonic() < began + seconds:
            top.read(0.1)
        took = time.monotonic() - began
        return [100 * (cpu_seconds(pid) - used) / took for pid, used in zip(pids, before, strict=True)]


def with_engine(folder: Path, args: argparse.Namespace) -> None:
    """An engine of its own."""
    socket = folder / "socket"
    engine = subprocess.Popen([*UDEDUP, "engine", "--socket", str(socket)], stdout=subprocess.PIPE)
    assert engine.stdout is not None
    programs = []
    try:
        engine.stdout.readline()
        wrap = [*UDEDUP, "run", "--socket", str(socket), "--", "sleep", "1000"]
        programs += [subprocess.Popen(wrap) for _ in range(args.processes)]
        time.sleep(args.settle)
        used, began = cpu_seconds(engine.pid), time.monotonic()
        time.sleep(args.seconds)
        alone = 100 * (cpu_seconds(engine.pid) - used) / (time.monotonic() - began)
        top, beside = measure(socket, args.seconds, args.size, engine.pid)
        print(f"top {top:.2f}%  engine {beside:.2f}%, without top {alone:.2f}%  ({args.processes} wrapped programs)")
    finally:
        for process in (*programs, engine):
            process.terminate()
            process.wait()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="default: %(default)g")
    parser.add_argument("--settle", type=float, default=30.0, metavar="S", help="of the engine (default: %(default)g)")
    parser.add_argument("--size", type=int, nargs=2, default=(120, 50), metavar=("COLUMNS", "LINES"))
    parser.add_argument("--engine", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="udedup-") as folder:
        if args.engine:
            with_engine(Path(folder), args)
            return
        busy = Busy(args.processes)
        answers = Answers(Path(folder) / "socket", lambda _: busy())
        (percent,) = measure(Path(folder) / "socket", args.seconds, tuple(args.size), None)
        answers.close()
        print(
            f"top {percent:.2f}% of a processor, {args.processes} processes, {args.size[0]}x{args.size[1]} characters"
        )


if __name__ == "__main__":
    main()
