"""How fast are writes to a clone? fio through it against qemu-storage-daemon's own FUSE export; prints JSON.

Both write to an overlay that was made in the same way above the same base; each load finds fresh ones. ``ratio`` is
the clone's figure by the daemon's. Each is the median of several rounds, in which the two take turns.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from udedup.vdi.clonestore import CloneStore
from udedup.vdi.filesystem import serve, withdraw
from udedup.vdi.formats.probe import Opening
from udedup.vdi.images import Image, Images

MEGABYTE: Final = 1_000_000
START_SECONDS: Final = 10.0


@attrs.frozen
class Load:
    """One fio job description."""

    name: str
    """Key in the output."""
    options: tuple[str, ...]
    unit: str
    """``megabytes_per_second`` or ``operations_per_second``."""
    again: bool = False
    """Whether all blocks have been written before."""


SEQUENTIAL: Final = ("--rw=write", "--bs=1M", "--end_fsync=1")
RANDOM: Final = ("--rw=randwrite", "--bs=4k", "--direct=1", "--norandommap", "--time_based")
LOADS: Final = (
    Load("sequential_first", SEQUENTIAL, "megabytes_per_second"),
    Load("sequential_again", SEQUENTIAL, "megabytes_per_second", again=True),
    Load("random_4k_first", RANDOM, "operations_per_second"),
    Load("random_4k_again", RANDOM, "operations_per_second", again=True),
    # What needs more than to give the data to the kernel: parts of blocks, and zeros, which become holes.
    Load("random_2k_first", tuple(word.replace("4k", "2k") for word in RANDOM), "operations_per_second"),
    Load("random_4k_zeros", (*RANDOM, "--zero_buffers"), "operations_per_second", again=True),
    Load("random_4k_again_4_jobs", (*RANDOM, "--numjobs=4"), "operations_per_second", again=True),
    Load(
        "random_64k_again",
        ("--rw=randwrite", "--bs=64k", "--direct=1", "--time_based"),
        "megabytes_per_second",
        again=True,
    ),
)


def fio(load: Load, file: Path, size: int, seconds: int) -> float:
    """Runs fio once and returns the figure in ``load.unit``."""
    command = [
        "fio", f"--name={load.name}", f"--filename={file}", f"--size={size}", "--ioengine=psync", "--group_reporting",
        "--output-format=json", "--allow_file_create=0", f"--runtime={seconds}", *load.options,
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    written = json.loads(output)["jobs"][0]["write"]
    return float(written["bw_bytes"] / MEGABYTE if load.unit == "megabytes_per_second" else written["iops"])


def run_load(load: Load, file: Path, size: int, seconds: int) -> float:
    """The same, after all blocks have been written if the load wants that."""
    if load.again:
        fio(LOADS[0], file, size, seconds)
    return fio(load, file, size, seconds)


@contextmanager
def exported(overlay: Path, mountpoint: Path) -> Iterator[Path]:
    """``overlay`` as the daemon exports it."""
    mountpoint.touch()
    node = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(overlay), "discard": "unmap"},
    }
    export = {"type": "fuse", "id": "export", "node-name": "disk", "mountpoint": str(mountpoint), "writable": True}
    command = ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--export", json.dumps(export)]
    with subprocess.Popen(command) as daemon:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not mountpoint.stat().st_size:
                if time.monotonic() > deadline:
                    raise TimeoutError("qemu-storage-daemon does not export")
                time.sleep(0.05)
            yield mountpoint
        finally:
            daemon.terminate()


@asynccontextmanager
async def cloned(images: Images, directory: Path, base: Path) -> AsyncIterator[Path]:
    """A fresh clone in the mount, which is gone afterwards."""
    store = CloneStore(directory / "clones")
    record = await trio.to_thread.run_sync(store.create, "clone", base, Opening(format="raw"), None)
    clone = await trio.to_thread.run_sync(store.open, record, images)
    try:
        yield directory / "mount" / clone.name
    finally:
        await withdraw(images, clone, on_removed=lambda: None)
        await trio.to_thread.run_sync(store.discard, record)


def ignore_hint(image: Image, first: int, blocks: int, pid: int) -> None:
    """Takes content hints and does nothing with them."""


async def run(
    directory: Path, size: int, seconds: int, rounds: int, loads: list[Load]
) -> dict[str, dict[str, float | str]]:
    """Measures ``loads`` on disks of ``size`` bytes below ``directory``."""
    base, mountpoint = directory / "base.raw", directory / "mount"
    mountpoint.mkdir()
    with base.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    images = Images()
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    store = CloneStore(directory / "exports")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, mountpoint, images, ignore_hint)
        for number in range(rounds):
            for load in loads:
                for what in random.Random(f"{load.name} {number}").sample(["daemon", "clone"], 2):
                    if what == "clone":
                        async with cloned(images, directory, base) as path:
                            figure = await trio.to_thread.run_sync(run_load, load, path, size, seconds)
                    else:
                        record = store.create("export", base, Opening(format="raw"), None)
                        with exported(Path(record.overlay), directory / "export") as path:
                            figure = await trio.to_thread.run_sync(run_load, load, path, size, seconds)
                        store.discard(record)
                    figures[load.name, what].append(figure)
        nursery.cancel_scope.cancel()
    return {load.name: summary(load, figures) for load in loads}


def summary(load: Load, figures: dict[tuple[str, str], list[float]]) -> dict[str, float | str]:
    """One load's figures and their ratio."""
    clone, daemon = (statistics.median(figures[load.name, what]) for what in ("clone", "daemon"))
    return {
        "unit": load.unit,
        "clone": round(clone, 1),
        "daemon": round(daemon, 1),
        "ratio": round(clone / daemon, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256, help="size of the disk (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="length of each random load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    by_name = {load.name: load for load in LOADS}
    parser.add_argument("load", nargs="*", help=f"which to run (default: all): {', '.join(by_name)}")
    arguments = parser.parse_args()
    for name in arguments.load:
        if name not in by_name:
            parser.error(f"no load is called {name}: choose from {', '.join(by_name)}")
    loads = [by_name[name] for name in arguments.load or by_name]
    with tempfile.TemporaryDirectory(prefix="udedup-bench-") as directory:
        size = arguments.mebibytes << 20
        results = trio.run(run, Path(directory), size, arguments.seconds, arguments.rounds, loads)
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
