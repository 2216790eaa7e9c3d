#!/usr/bin/env python3
"""What the workers of a server share that load the same data, each for itself.

Eight workers, started anew ("spawn", as uvicorn does) or by fork ("fork", as gunicorn does, and multiprocessing unless
told otherwise), each load one array with numpy.load(), or unpickle many small Python objects. Memory is the sum
of Pss over server, workers and engine. Once nothing more merges, each worker's data is compared with what was written.
"""

import hashlib
import pickle
import sys
import time
from pathlib import Path
from typing import Final

import attrs
import numpy
from measuring import Bench, Engine, Figure, Program, Report, main, smaps, status

WORKERS: Final = 8
MEBIBYTES: Final = 64
MEBIBYTES_QUICK: Final = 16
SEED: Final = 7
STEADY_SECONDS: Final = 5.0
MERGE_SECONDS: Final = 120.0
SERVER: Final = Path(__file__).parent / "programs" / "workers.py"


@attrs.frozen
class Outcome:
    """One server, from its start to the check of its data."""

    bytes: int
    """Of memory."""

    seconds: float
    """Until nothing more merged; 0 without an engine."""


def write_array(folder: Path, mebibytes: int) -> tuple[Path, str]:
    """A file of numpy.save() without two equal pages, and the digest of what a worker must have."""
    array = numpy.random.default_rng(SEED).random((mebibytes << 20) // 8)
    path = folder / "array.npy"
    numpy.save(path, array)
    return path, hashlib.sha256(memoryview(array).cast("B")).hexdigest()


def write_objects(folder: Path, mebibytes: int) -> tuple[Path, str]:
    """A pickle of tuples of numbers and words, of some 100 bytes each in memory."""
    rows = [(number, f"name {number}") for number in range(mebibytes * 10_000)]
    path = folder / "objects.pickle"
    path.write_bytes(pickle.dumps(rows))
    # As workers do: what is unpickled may be pickled in other words.
    return path, hashlib.sha256(pickle.dumps(pickle.loads(path.read_bytes()))).hexdigest()


def steady(engine: Engine) -> float:
    """Waits until nothing has merged for STEADY_SECONDS; the time until the last merge, s."""
    began = last = time.monotonic()
    pages = -1
    while time.monotonic() < last + STEADY_SECONDS:
        if time.monotonic() > began + MERGE_SECONDS:
            raise RuntimeError(f"still merging after {MERGE_SECONDS:.0f} s")
        sharing = status(engine)["pages_sharing"]
        if sharing != pages:
            pages, last = sharing, time.monotonic()
        time.sleep(0.2)
    return last - began


def pss(pids: list[int]) -> int:
    """Sum over processes, bytes."""
    return sum(sizes["Pss"] for pid in pids for _, sizes in smaps(pid))


def serve(bench: Bench, engine: Engine | None, path: Path, digest: str, start: str) -> Outcome:
    """Starts a server, and ends it. Raises RuntimeError if a worker's data is not as it was written."""
    server: Program
    with bench.start(engine, Path(sys.executable), SERVER, path, WORKERS, start) as server:
        pids = [server.pid, *map(int, server.hear()[1:])]
        seconds = 0.0
        if engine is not None:
            seconds = steady(engine)
            pids.append(engine.pid)
        used = pss(pids)
        found = server.ask("check")[1:]
        if found != [digest] * WORKERS:
            raise RuntimeError(f"{path.name}, {start}: a worker's data is not what was written")
    return Outcome(used, seconds)


def measure(bench: Bench, quick: bool) -> Report:
    """Each once: memory is no matter of chance."""
    mebibytes = MEBIBYTES_QUICK if quick else MEBIBYTES
    figures = []
    for kind, write in (("array", write_array), ("objects", write_objects)):
        path, digest = write(bench.folder, mebibytes)
        for start in ("spawn", "fork"):
            bare = serve(bench, None, path, digest, start)
            with bench.engine() as engine:
                wrapped = serve(bench, engine, path, digest, start)
            figures += [
                Figure.of(f"{kind}, {start}: memory without udedup", "MB", [bare.bytes / 1e6]),
                Figure.of(f"{kind}, {start}: memory with udedup", "MB", [wrapped.bytes / 1e6]),
                Figure.of(f"{kind}, {start}: until merged", "s", [wrapped.seconds]),
            ]
    details: dict[str, object] = {"workers": WORKERS, "mebibytes": mebibytes}
    return Report("workers", "Pss of server, workers and engine, by /proc/PID/smaps", figures, details)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
