"""How fast is the mount? fio through it against the bare file, and qcow2 against raw, in one run; prints JSON.

``ratio`` is the mount's figure by the bare file's; the file's data is in the page cache, the mount's is not:
sequential reads drop it before each pass, random ones are direct. ``sequential_first`` digests every block,
``sequential_again`` finds the digests there. ``qcow2`` is an image in one piece, as qemu-img writes it, and
``scattered`` one whose clusters are in random order, as guests leave it; their ratios are by the raw image in the
mount. Each figure is the median of several rounds, in which the images take turns.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from udedup.vdi.filesystem import serve
from udedup.vdi.images import Image, Images

CLUSTER_BYTES: Final = 1 << 16
MEGABYTE: Final = 1_000_000


@attrs.frozen
class Load:
    """One fio job description."""

    name: str
    """Key in the output."""
    options: tuple[str, ...]
    """fio options beyond file, size and time."""
    unit: str
    """What is reported: ``megabytes_per_second`` or ``operations_per_second``."""


SEQUENTIAL: Final = ("--rw=read", "--bs=1M", "--invalidate=1")
LOADS: Final = (
    Load("sequential_first", SEQUENTIAL, "megabytes_per_second"),
    Load("sequential_again", SEQUENTIAL, "megabytes_per_second"),
    Load("random_4k_1_job", ("--rw=randread", "--bs=4k", "--direct=1"), "operations_per_second"),
    Load("random_4k_4_jobs", ("--rw=randread", "--bs=4k", "--direct=1", "--numjobs=4"), "operations_per_second"),
)


def measure(load: Load, file: Path, size: int, seconds: int, *, bare: bool) -> float:
    """Runs fio once and returns the figure in ``load.unit``."""
    options = list(load.options)
    if bare:
        # From the page cache, which is what the mount reads from: only its own overhead is to show.
        options = [option for option in options if option != "--direct=1" and option != "--invalidate=1"]
        options.append("--invalidate=0")
    # One pass for sequential reads, which drops what the pass before has left in the kernel's cache at its start.
    timing = [] if load.unit == "megabytes_per_second" else ["--time_based", f"--runtime={seconds}"]
    command = [
        "fio", f"--name={load.name}", f"--filename={file}", "--readonly", f"--size={size}", "--ioengine=psync",
        "--group_reporting", "--output-format=json", *timing, *options,
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    read = json.loads(output)["jobs"][0]["read"]
    return float(read["bw_bytes"] / MEGABYTE if load.unit == "megabytes_per_second" else read["iops"])


def ignore_hint(image: Image, first: int, blocks: int, pid: int) -> None:
    """Takes content hints and does nothing with them: the engine's work is not measured here."""


def make_images(directory: Path, size: int) -> dict[str, Path]:
    """Writes a raw image of ``size`` bytes, and the same disk as qcow2 in one piece and scattered."""
    raw = directory / "image.raw"
    with raw.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    whole, scattered = directory / "whole.qcow2", directory / "scattered.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, whole], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", scattered, str(size)], check=True)
    places = list(range(0, size, CLUSTER_BYTES))
    random.Random(1).shuffle(places)
    # This allocates the clusters in random order; the contents come after.
    commands = "".join(f"write -q {place} {CLUSTER_BYTES}\n" for place in places)
    subprocess.run(["qemu-io", "-f", "qcow2", scattered], input=commands, text=True, check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw, scattered], check=True)
    subprocess.run(["qemu-img", "compare", "-q", raw, scattered], check=True)
    return {"mount": raw, "qcow2": whole, "scattered": scattered}


async def run(directory: Path, size: int, seconds: int, rounds: int) -> dict[str, dict[str, float | str]]:
    """Mounts fresh images of ``size`` bytes below ``directory`` in each round and measures all loads on them."""
    sources = make_images(directory, size)
    mountpoint = directory / "mount"
    mountpoint.mkdir()
    images = Images()
    images.add(sources["mount"], "warm-up")
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, mountpoint, images, ignore_hint)
        # The kernel's first touch of so many free pages costs a multiple of the read itself.
        await trio.to_thread.run_sync((mountpoint / "warm-up").read_bytes)
        for number in range(rounds):
            for what, source in sources.items():
                await trio.to_thread.run_sync(source.read_bytes)
                await trio.to_thread.run_sync(images.add, source, f"{what}-{number}")
            for load in LOADS:
                # In another order each time: a machine's speed drifts.
                for what in random.Random(f"{load.name} {number}").sample(["file", *sources], len(sources) + 1):
                    file = sources["mount"] if what == "file" else mountpoint / f"{what}-{number}"
                    job = partial(measure, load, file, size, seconds, bare=what == "file")
                    figures[load.name, what].append(await trio.to_thread.run_sync(job))
        nursery.cancel_scope.cancel()
    images.close()
    return {load.name: summary(load, {what: figures[load.name, what] for what in ("file", *sources)}) for load in LOADS}


def summary(load: Load, figures: dict[str, list[float]]) -> dict[str, float | str]:
    """One load's figures and their ratios."""
    medians = {what: statistics.median(values) for what, values in figures.items()}
    return {
        "unit": load.unit,
        **{what: round(value, 1) for what, value in medians.items()},
        "ratio": round(medians["mount"] / medians["file"], 4),
        "qcow2_ratio": round(medians["qcow2"] / medians["mount"], 4),
        "scattered_ratio": round(medians["scattered"] / medians["mount"], 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512, help="size of the image (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="length of each random read (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="udedup-bench-") as directory:
        results = trio.run(run, Path(directory), arguments.mebibytes << 20, arguments.seconds, arguments.rounds)
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
