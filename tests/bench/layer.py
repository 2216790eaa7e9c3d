#!/usr/bin/env python3
"""How much memory does the disk layer take for each byte of an image that is touched?

An engine shows an image, and another process reads it whole through the mount. What the engine grew by is counted: its
Pss without the store, its page tables (VmPTE), and what of the sidecars is in the page cache. That has digests and
maps, and all that Python and the allocator keep with them. What any reader costs (threads, buffers) is there already:
the beginning of the image has been read before. A clone is written whole first. Of blocks that a trust
domain's store has, each costs that domain 4 bytes more (tests/engine/test_shelf.py holds it to that). The store itself
and the index of its pages are merging's: tests/bench/memory.py.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from fuse import make_images
from mapped import cached
from measuring import PAGE, Bench, Figure, Report, main
from memory import engine_without_store, page_tables

from udedup.vdi.images import FLUSH_SECONDS

MEBIBYTES: Final = 1024
MEBIBYTES_QUICK: Final = 384
WARM_MEBIBYTES: Final = 128
LIMIT_PERCENT: Final = 0.6
PLACE_BYTES: Final = 4
SETTLE_SECONDS: Final = 2 * FLUSH_SECONDS


def touch(path: Path, mebibytes: int, *, write: bool) -> None:
    """Has another process read the beginning of a file, after having written it."""
    ways = [["of=/dev/null", f"if={path}"]]
    if write:
        ways.insert(0, ["if=/dev/urandom", f"of={path}", "conv=notrunc,fsync"])
    for way in ways:
        subprocess.run(["dd", "bs=1M", f"count={mebibytes}", "status=none", *way], check=True)
    time.sleep(SETTLE_SECONDS)


def growth(bench: Bench, image: Path, mebibytes: int, *, clone: bool) -> dict[str, int]:
    """Bytes by which each part grows when all of an image is touched, after the first WARM_MEBIBYTES."""
    state = bench.folder / f"state-{image.name}-{clone}"
    with bench.engine("--state-dir", str(state), images={} if clone else {"image": image}) as engine:
        assert engine.mount is not None
        path = engine.mount / "image"
        if clone:
            done = engine.command("mount", "--clone", image, "--to", "vm1")
            assert done.returncode == 0, done.stderr
            path = Path(done.stdout.strip())
        touch(path, WARM_MEBIBYTES, write=clone)
        before = engine_without_store(engine.pid), page_tables(engine.pid)
        touch(path, mebibytes, write=clone)
        after = engine_without_store(engine.pid), page_tables(engine.pid)
        sidecars = sum(cached(file) for file in state.rglob("*.digests"))
    return {"engine": after[0] - before[0], "page tables": after[1] - before[1], "sidecars cached": sidecars}


def measure(bench: Bench, quick: bool) -> Report:
    """Once: memory is no matter of chance."""
    size = (MEBIBYTES_QUICK if quick else MEBIBYTES) << 20
    images = make_images(bench.folder, size)
    figures = []
    details = {}
    for name, image, clone in (
        ("raw", images["mount"], False),
        ("qcow2 in one piece", images["qcow2"], False),
        ("qcow2 scattered", images["scattered"], False),
        ("clone", images["mount"], True),
    ):
        parts = details[name] = growth(bench, image, size >> 20, clone=clone)
        share = 100 * sum(parts.values()) / (size - (WARM_MEBIBYTES << 20))
        figures.append(Figure.of(f"memory of the layer, {name}", "%", [share], LIMIT_PERCENT))
        shelved = share + 100 * PLACE_BYTES / PAGE
        figures.append(Figure.of(f"the same, with one domain's places, {name}", "%", [shelved], LIMIT_PERCENT))
    return Report("layer", f"an image of {size >> 20} MiB, of which everything is touched", figures, dict(details))


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
