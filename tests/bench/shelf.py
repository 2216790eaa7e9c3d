"""How fast are blocks that come from the store? fio through the mount, beside the same blocks from the page cache.

``file`` is an image whose file is in the page cache, as in ``fuse.py``; of ``store`` all blocks are in a store, in the
order of the image, as a reader's merged memory is laid out, and of ``scattered`` in random order. Ratios are by
``file``, of the same round; each figure is the median of several rounds, in which the images take turns. Prints JSON.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Final

import trio
from fuse import LOADS, ignore_hint, measure

from udedup._native import ffi, lib
from udedup.engine.index import Index
from udedup.engine.store import SegmentNumbers, Store, segment_prefix
from udedup.engine.wire import PAGE, check
from udedup.vdi.filesystem import serve
from udedup.vdi.images import Image, Images
from udedup.vdi.openers import Opener
from udedup.vdi.shelf import SETTLE_SECONDS, Shelf, ShelfCounters

KINDS: Final = ("file", "store", "scattered")
WANTED: Final = 1.2


class Filled:
    """A store that has all blocks of a file, in the given order."""

    def __init__(self, path: Path, order: list[int]) -> None:
        self.store = Store(SegmentNumbers(), segment_prefix("bench", ""))
        self.index = Index()
        with path.open("rb") as file:
            for start in range(0, len(order), lib.UDD_COPY_MAX):
                blocks = order[start : start + lib.UDD_COPY_MAX]
                self._publish([os.pread(file.fileno(), PAGE, block * PAGE) for block in blocks])

    def _publish(self, pages: list[bytes]) -> None:
        area = ffi.from_buffer(content := b"".join(pages))
        digests = ffi.new("uint64_t[]", 2 * len(pages))
        lib.udd_digest_pages(area, len(pages), digests)
        fresh = ffi.new("struct udd_fresh[]", len(pages))
        for i in range(len(pages)):
            fresh[i].digest, fresh[i].copy = list(digests[2 * i : 2 * i + 2]), i + 1
        position, counts = ffi.new("size_t *"), ffi.new("struct udd_publish_counts *")
        targets = ffi.new("struct udd_target[]", len(pages))
        while position[0] < len(pages):
            segment = self.store.writable().number
            arguments = (segment, area, fresh, len(pages), position, targets, counts)
            check(lib.udd_store_publish(self.store.handle, self.index.handle, *arguments), "filling the store")
        assert counts.written == len(pages) == len(content) // PAGE


class Shelves:
    """Serves every reader of an image from the store that was made for it, if there is one."""

    turn = 0

    def __init__(self, stores: dict[str, Filled]) -> None:
        self.blocks = ShelfCounters()
        self._stores = stores
        self._shelves: dict[int, Shelf] = {}

    def find(self, image: Image, opener: Opener) -> Shelf | None:
        """See udedup.vdi.openers.ShelfSource."""
        filled = self._stores.get(image.name.partition("-")[0])
        if filled is not None and image.inode not in self._shelves:
            handles = {"store": filled.store.handle, "index": filled.index.handle}
            self._shelves[image.inode] = Shelf(
                image.watch, image.blocks, image.digests, **handles, counters=self.blocks
            )
        return self._shelves.get(image.inode)

    def may_know_all(self, uid: int) -> bool:
        """See udedup.vdi.openers.ShelfSource."""
        return True


async def run(directory: Path, size: int, seconds: int, rounds: int) -> dict[str, dict[str, float | str]]:
    """Mounts one image under three names and measures all loads on each."""
    source, mountpoint = directory / "image.raw", directory / "mount"
    source.write_bytes(os.urandom(size))
    mountpoint.mkdir()
    order = list(range(size // PAGE))
    shelves = Shelves(
        {"store": Filled(source, order), "scattered": Filled(source, random.Random(1).sample(order, len(order)))}
    )
    images = Images()
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    await trio.sleep(SETTLE_SECONDS)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, mountpoint, images, ignore_hint, shelves=shelves))
        for number in range(rounds):
            for kind in KINDS:
                await trio.to_thread.run_sync(source.read_bytes)
                await trio.to_thread.run_sync(images.add, source, f"{kind}-{number}")
                # Every block is digested by this, and compared with the store.
                await trio.to_thread.run_sync((mountpoint / f"{kind}-{number}").read_bytes)
            assert shelves.blocks.entered == 2 * (number + 1) * len(order), shelves.blocks
            for load in LOADS[1:]:
                for kind in random.Random(f"{load.name} {number}").sample(KINDS, len(KINDS)):
                    job = partial(measure, load, mountpoint / f"{kind}-{number}", size, seconds, bare=False)
                    figures[load.name][kind].append(await trio.to_thread.run_sync(job))
        nursery.cancel_scope.cancel()
    images.close()
    return {load.name: {"unit": load.unit, **summary(figures[load.name])} for load in LOADS[1:]}


def summary(figures: dict[str, list[float]]) -> dict[str, float]:
    """One load's figures and their ratios, which are wanted to be WANTED at least."""
    ratios = {
        f"{kind}_ratio": round(statistics.median(map(float.__truediv__, figures[kind], figures["file"])), 3)
        for kind in KINDS[1:]
    }
    return {**{kind: round(statistics.median(values), 1) for kind, values in figures.items()}, **ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256, help="size of the image (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=2, help="length of each random read (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="udedup-bench-") as directory:
        results = trio.run(run, Path(directory), arguments.mebibytes << 20, arguments.seconds, arguments.rounds)
    print(json.dumps({"wanted_ratio": WANTED, **results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
