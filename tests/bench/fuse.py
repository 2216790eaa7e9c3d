"""How fast is the mount? fio through it, through a mount that C makes with libfuse, and on the bare file; prints JSON.

``ratio`` is the mount's figure by that of ``passthrough``: C that copies, with libfuse's own threads
(programs/passthrough.c). ``passthrough_ahead`` is the same with a readahead of 1 MiB, which root's engine sets for its
mount and libfuse doesn't. ``file`` is the bare file. All read one file that is in the page cache; what the mounts have
there is not: sequential reads drop it before each pass, random ones are direct. ``sequential_first`` digests every
block, ``sequential_again`` finds the digests there. ``qcow2`` is an image in one piece, as qemu-img writes it, and
``scattered`` one whose clusters are in random order, as guests leave it; their ratios are by the raw image in the
mount. Each figure is the median of several rounds, in which all take turns; a ratio is the median of its ratios in
each round.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from udedup.vdi.filesystem import serve
from udedup.vdi.images import Image, Images
from udedup.vdi.mountpoint import raise_readahead

CLUSTER_BYTES: Final = 1 << 16
MEGABYTE: Final = 1_000_000
PROGRAM: Final = Path(__file__).resolve().parent / "programs" / "passthrough.c"
START_SECONDS: Final = 10.0


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


def build_passthrough(directory: Path) -> Path:
    """Compiles the file system to compare with; needs libfuse3-dev, as pyfuse3 does."""
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "fuse3"], check=True, capture_output=True, text=True
    ).stdout.split()
    program = directory / "server"
    subprocess.run(
        ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", PROGRAM, "-o", program, *flags],
        check=True,
    )
    return program


@contextmanager
def passthrough(program: Path, source: Path, mountpoint: Path, *, ahead: bool) -> Iterator[Path]:
    """Has C show ``source`` in a mount; yields it there."""
    mountpoint.mkdir()
    process = subprocess.Popen([program, source, mountpoint])
    try:
        deadline = time.monotonic() + START_SECONDS
        while not mountpoint.is_mount():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program} did not mount")
            time.sleep(0.01)
        if ahead:
            raise_readahead(mountpoint.stat().st_dev)
        yield mountpoint / "file"
    finally:
        process.terminate()
        process.wait()


async def run(
    directory: Path, size: int, seconds: int, rounds: int, loads: list[Load]
) -> dict[str, dict[str, float | str]]:
    """Mounts fresh images of ``size`` bytes below ``directory`` in each round and measures ``loads`` on them."""
    sources = make_images(directory, size)
    mountpoint = directory / "mount"
    mountpoint.mkdir()
    program = build_passthrough(directory)
    images = Images()
    images.add(sources["mount"], "warm-up")
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    files = {"file": sources["mount"]}
    with ExitStack() as stack:
        for name, ahead in (("passthrough", False), ("passthrough_ahead", True)):
            shown = passthrough(program, sources["mount"], directory / name, ahead=ahead)
            files[name] = stack.enter_context(shown)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, mountpoint, images, ignore_hint)
            # The kernel's first touch of so many free pages costs a multiple of the read itself.
            await trio.to_thread.run_sync((mountpoint / "warm-up").read_bytes)
            for number in range(rounds):
                for what, source in sources.items():
                    await trio.to_thread.run_sync(source.read_bytes)
                    await trio.to_thread.run_sync(images.add, source, f"{what}-{number}")
                    files[what] = mountpoint / f"{what}-{number}"
                for load in loads:
                    # In another order each time: a machine's speed drifts.
                    for what in random.Random(f"{load.name} {number}").sample(list(files), len(files)):
                        job = partial(measure, load, files[what], size, seconds, bare=what == "file")
                        figures[load.name, what].append(await trio.to_thread.run_sync(job))
            nursery.cancel_scope.cancel()
    images.close()
    return {load.name: summary(load, {what: figures[load.name, what] for what in files}) for load in loads}


def summary(load: Load, figures: dict[str, list[float]]) -> dict[str, float | str]:
    """One load's figures and their ratios."""

    def ratio(what: str, other: str) -> float:
        pairs = zip(figures[what], figures[other], strict=True)
        return round(statistics.median(one / two for one, two in pairs), 3)

    return {
        "unit": load.unit,
        **{what: round(statistics.median(values), 1) for what, values in figures.items()},
        "ratio": ratio("mount", "passthrough"),
        "ahead_ratio": ratio("mount", "passthrough_ahead"),
        "qcow2_ratio": ratio("qcow2", "mount"),
        "scattered_ratio": ratio("scattered", "mount"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512, help="size of the image (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="length of each random read (default: %(default)s)")
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
