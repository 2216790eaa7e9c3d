"""What all benchmarks share: an engine of their own, C programs that talk over pipes, clocks, and figures with limits.

CPU time is taken wherever it answers the question: other programs on the machine disturb it least. What is measured in
wall time is repeated, and the median is the figure; lowest and highest value tell the noise.
"""

import argparse
import json
import math
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

import attrs

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support.engine import UDEDUP, Engine, start_engine  # noqa: E402
from support.ledger import Ledger  # noqa: E402

from udedup.engine import control  # noqa: E402
from udedup.record.kernel import process_cpu  # noqa: E402

__all__ = [
    "PAGE",
    "REALTIME_PRIORITY",
    "UDEDUP",
    "Bench",
    "Engine",
    "Figure",
    "Program",
    "Report",
    "main",
    "process_cpu",
    "smaps",
    "status",
    "stopped",
    "wait_for_agents",
]

PAGE: Final = 4096
ANSWER_SECONDS: Final = 120.0
"""How long a program may take for one step."""

REALTIME_PRIORITY: Final = 1


@attrs.frozen
class Figure:
    """One measured value and what it is held against."""

    name: str
    """What was measured."""

    unit: str
    """Of ``value``, ``low`` and ``high``."""

    value: float
    """Median of all samples."""

    low: float
    """Lowest sample."""

    high: float
    """Highest sample."""

    samples: int
    """How many."""

    between: tuple[float, float]
    """Where the true median lies, with a confidence of about 95%: the noise."""

    limit: float | None
    """``value`` must not be above it; None: for information."""

    @classmethod
    def of(cls, name: str, unit: str, samples: Sequence[float], limit: float | None = None) -> Self:
        """Makes one of its samples."""
        ordered = sorted(samples)
        count = len(ordered)
        # Ranks of the order statistics between which the median lies, by the normal approximation to the binomial.
        reach = math.sqrt(count)
        first, last = math.floor((count - reach) / 2), math.ceil((count + reach) / 2)
        return cls(
            name,
            unit,
            statistics.median(ordered),
            ordered[0],
            ordered[-1],
            count,
            (ordered[max(first, 0)], ordered[min(last, count - 1)]),
            limit,
        )

    @property
    def ratio(self) -> float | None:
        """Value by limit: up to 1 is within it."""
        return None if self.limit is None else self.value / self.limit

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None: there is none."""
        return None if self.limit is None else self.value <= self.limit

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "unit": self.unit,
            "value": _rounded(self.value),
            "limit": self.limit,
            "ratio": None if self.ratio is None else _rounded(self.ratio),
            "met": self.met,
            "low": _rounded(self.low),
            "high": _rounded(self.high),
            "samples": self.samples,
            "between": [_rounded(end) for end in self.between],
        }


@attrs.frozen
class Report:
    """What one benchmark found out."""

    benchmark: str
    """Its name."""

    method: str
    """How it was measured, for people."""

    figures: Sequence[Figure]
    details: dict[str, object] = attrs.field(factory=dict)
    """Whatever else helps to understand the figures."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "benchmark": self.benchmark,
            "method": self.method,
            "figures": [figure.as_dict() for figure in self.figures],
            "details": self.details,
        }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def smaps(pid: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields each mapping of a process: its first line, and its sizes in bytes by name ("Pss", "Rss" …)."""
    header, sizes = "", dict[str, int]()
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        name, _, rest = line.partition(":")
        if name.isalpha() or "_" in name:
            if rest.endswith(" kB"):
                sizes[name] = int(rest[:-3]) << 10
        else:
            if header:
                yield header, sizes
            header, sizes = line, {}
    if header:
        yield header, sizes


class Program:
    """A C program of ours that takes commands on its input, a line each, and answers each with a line."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def tell(self, command: str) -> None:
        """Gives a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def hear(self, seconds: float = ANSWER_SECONDS) -> list[str]:
        """Returns the words of its next answer. Raises RuntimeError if there is none, or it is about an error."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise RuntimeError(f"{self.process.args!r} gave no answer within {seconds:.0f} s")
        words = self.process.stdout.readline().split()
        if not words or words[0] == "error":
            raise RuntimeError(f"{self.process.args!r} failed: {' '.join(words)}")
        return words

    def ask(self, command: str) -> list[str]:
        """Gives a command and returns the words of the answer."""
        self.tell(command)
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        if kind is not None:
            self.process.kill()
        self.process.wait()


class Bench:
    """A place to measure in: a folder, and a record of what is to be gone with it."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.folder = folder
        self._ledger = ledger

    def compile(self, name: str, folder: Path = HERE / "programs") -> Path:
        """Builds NAME.c of a folder and returns the program."""
        program = self.folder / name
        if not program.exists():
            source = folder / f"{name}.c"
            flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror"]
            subprocess.run(["gcc", *flags, "-o", program, source, "-ldl", "-lpthread"], check=True)
        return program

    @contextmanager
    def engine(
        self, *options: str, images: dict[str, Path] | None = None, prefix: Sequence[str] = ()
    ) -> Iterator[Engine]:
        """Runs an engine until the end of the block; ``prefix``: see start_engine()."""
        folder = Path(tempfile.mkdtemp(prefix="engine-", dir=self.folder))
        engine = start_engine(folder, self._ledger, *options, mount=images is not None, images=images, prefix=prefix)
        try:
            yield engine
        finally:
            # Wherever a benchmark failed, it may have left the engine stopped.
            engine.process.send_signal(signal.SIGCONT)
            engine.stop()

    def start(
        self,
        engine: Engine | None,
        program: Path,
        *arguments: object,
        undisturbed: bool = False,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> Program:
        """Starts a program, wrapped if there is an engine, with ``options`` of ``udedup run``.

        ``undisturbed``: all its threads go before everybody else's, as on an idle machine. ``prefix``: words before.
        """
        argv = [str(program), *map(str, arguments)]
        if engine is not None:
            argv = [*UDEDUP, "run", "--socket", str(engine.socket), *options, "--", *argv]
        if undisturbed:
            argv = ["chrt", "--rr", str(REALTIME_PRIORITY), *argv]
        argv = [*prefix, *argv]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ledger.add_process(process.pid)
        return Program(process)


def status(engine: Engine) -> dict[str, Any]:
    """What the engine says, without the kernel's numbers: those take their time."""
    answer: dict[str, Any] = control.request(engine.socket, {"op": "status", "kernel": False})
    return answer


def wait_for_agents(engine: Engine, count: int) -> dict[str, Any]:
    """Returns the first status that shows ``count`` agents which merge."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        now = status(engine)
        if sum(agent["merging"] for agent in now["agents"]) >= count:
            return now
        if time.monotonic() > deadline:
            raise RuntimeError(f"{count} agents wanted: {json.dumps(now['agents'])}")
        time.sleep(0.02)


@contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """Holds the engine for the length of the block."""
    engine.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        engine.process.send_signal(signal.SIGCONT)


@contextmanager
def workplace() -> Iterator[Bench]:
    """A bench in a folder that is gone at the end, as is all that was started in it."""
    folder = Path(tempfile.mkdtemp(prefix="udedup-bench-"))
    ledger = Ledger(folder / "ledger")
    try:
        yield Bench(folder, ledger)
    finally:
        ledger.sweep()
        shutil.rmtree(folder)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(description: str, measure: Callable[[Bench, bool], Report]) -> int:
    """The command line of a benchmark: ``measure(bench, quick)``. 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: a few seconds instead of minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    arguments = parser.parse_args()
    # Whoever ends us wants everything undone, too.
    signal.signal(signal.SIGTERM, _end)
    if os.geteuid() != 0:
        print(f"{sys.argv[0]}: KSM and other processes' memory maps need root: run it as root", file=sys.stderr)
        return 2
    with workplace() as bench:
        report = measure(bench, arguments.quick)
    text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0 if all(figure.met is not False for figure in report.figures) else 1
