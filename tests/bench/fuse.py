"""How fast is the mount? fio through it against the bare file, in one run; prints JSON.

Every figure comes with the file's own in the same units and the ratio of the two. The file's data is in the page
cache, the mount's is not: sequential reads drop it before each pass, random ones are direct. ``sequential_first``
digests every block, ``sequential_again`` finds the digests there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import attrs
import trio

from udedup.vdi.filesystem import serve
from udedup.vdi.images import Image, Images

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


async def run(directory: Path, size: int, seconds: int) -> dict[str, dict[str, float | str]]:
    """Mounts a fresh image of ``size`` bytes below ``directory`` and measures all loads on it and on its file."""
    source = directory / "image.raw"
    with source.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    mountpoint = directory / "mount"
    mountpoint.mkdir()
    images = Images()
    images.add(source)
    images.add(source, "warm-up")
    results: dict[str, dict[str, float | str]] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, mountpoint, images, ignore_hint)
        # The kernel's first touch of so many free pages costs a multiple of the read itself.
        await trio.to_thread.run_sync((mountpoint / "warm-up").read_bytes)
        for load in LOADS:
            bare, mounted = [
                await trio.to_thread.run_sync(lambda arguments: measure(*arguments[0], bare=arguments[1]), arguments)
                for arguments in (
                    ((load, source, size, seconds), True),
                    ((load, mountpoint / source.name, size, seconds), False),
                )
            ]
            results[load.name] = {
                "unit": load.unit,
                "file": round(bare, 1),
                "mount": round(mounted, 1),
                "ratio": round(mounted / bare, 4),
            }
        nursery.cancel_scope.cancel()
    images.close()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512, help="size of the image (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="length of each random read (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="udedup-bench-") as directory:
        results = trio.run(run, Path(directory), arguments.mebibytes << 20, arguments.seconds)
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
