"""Sees to it that a block which the store has is not in the kernel's page cache as well.

What a reader was given stays cached for the mount. Some seconds later, when the reader's own page has had the time to
be merged, blocks that the store has by then are compared with it, so that they can be served from there, and their
cached copies are dropped. Pages that somebody has mapped stay: the kernel sees to that.

Who may tell what is cached from what is not (by the time a read takes) must not learn from it what is in another trust
domain's store. So a domain's merges have a copy dropped only while no other domain has the image open.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from udedup._native import ffi, lib  # type: ignore[import-not-found, unused-ignore]
from udedup.vdi.digests import BLOCK_BYTES
from udedup.vdi.images import Image, Images
from udedup.vdi.regions import REGION_BLOCKS, Region, Regions
from udedup.vdi.shelf import Shelf

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
"""How often it is looked for what is due."""

REGIONS_AT_ONCE: Final = 64
"""That are looked at in one go, of one image and domain: others get their turn, too."""

REGIONS_READ_AT_ONCE: Final = 16
"""That are read and dropped with one opening of the file each: up to 4 MiB."""


@attrs.define
class TidyCounters:
    """Cumulative."""

    dropped: int = 0
    """Blocks whose cached copies the kernel was asked to drop."""


class Tidier:
    """One mount's. What is not said to be for a worker thread is for the loop's."""

    def __init__(self, images: Images, may_drop: Callable[[Image, Shelf], bool]) -> None:
        """``may_drop``: whether only those have an image open who may know what is on a shelf."""
        self.counters = TidyCounters()
        self.thread = ffi.new("uint32_t *")
        """The thread that is using a file of the mount for us, by the number that FUSE knows it by; 0: none."""
        self._images = images
        self._may_drop = may_drop
        self._limiter = trio.CapacityLimiter(1)
        self._regions: dict[tuple[int, Shelf], Regions] = {}
        """By inode and shelf."""

    def served(self, image: Image, shelf: Shelf, first: int, count: int, epoch: int) -> None:
        """The kernel has cached blocks of ``image`` as they were in ``epoch``, for one who may use ``shelf``."""
        if epoch:
            key = image.inode, shelf
            if key not in self._regions:
                self._regions[key] = Regions()
            self._regions[key].read(first, count, epoch, trio.current_time())

    async def run(self, directory: Path) -> None:
        """Until cancelled. ``directory`` is where the images are mounted."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            for (inode, shelf), regions in list(self._regions.items()):
                image = self._images.by_inode.get(inode)
                if image is None:
                    del self._regions[inode, shelf]
                    continue
                due = self._due(image, shelf, regions)
                if due:
                    work = Work(self, image, shelf, regions, due)
                    await trio.to_thread.run_sync(
                        work.do, directory / image.name, abandon_on_cancel=True, limiter=self._limiter
                    )

    def _due(self, image: Image, shelf: Shelf, regions: Regions) -> list[Region]:
        """Those that have something for the store to serve."""
        now = trio.current_time()
        wanted = []
        for region in regions.due(now, REGIONS_AT_ONCE):
            if region.epoch != image.watch.epoch:
                regions.left(region)
            elif region.blocks & shelf.nominees(region.number * REGION_BLOCKS, REGION_BLOCKS):
                wanted.append(region)
            else:
                regions.kept(region, now)
        return wanted

    def may_drop(self, image: Image, shelf: Shelf) -> bool:
        """See :meth:`__init__`."""
        return self._may_drop(image, shelf)


@attrs.frozen(eq=False)
class Work:
    """One go through regions of one image."""

    tidier: Tidier
    image: Image
    shelf: Shelf
    regions: Regions
    due: list[Region]

    def do(self, path: Path) -> None:
        """For a worker thread, all the time that the kernel may have to ask us. ``path``: of the image in the mount."""
        try:
            for start in range(0, len(self.due), REGIONS_READ_AT_ONCE):
                self._tidy(path, self.due[start : start + REGIONS_READ_AT_ONCE])
        except OSError as error:
            # It has been taken out of the mount, or can't be read any more.
            log.debug("image %s: what is cached of it stays: %s", self.image.path, error.strerror)

    def _tidy(self, path: Path, regions: list[Region]) -> None:
        wanted = trio.from_thread.run_sync(lambda: [self._to_compare(region) for region in regions])
        contents = iter(self._read(path, [stretch for stretches in wanted for stretch in stretches]))
        compared = [[next(contents) for _ in stretches] for stretches in wanted]
        self._drop(path, trio.from_thread.run_sync(self._to_drop, regions, compared))

    def _read(self, path: Path, stretches: list[tuple[int, int]]) -> list[tuple[int, int, memoryview]]:
        """The stretches (first block, count) with their content, shorter at the image's end. Raises OSError."""
        if not stretches:
            return []
        array = _stretches_of(stretches)
        data = memoryview(bytearray(sum(count for _, count in stretches) * BLOCK_BYTES))
        _check(lib.udd_apart_read(bytes(path), array, len(array), ffi.from_buffer(data), self.tidier.thread))
        contents, start = [], 0
        for (first, count), stretch in zip(stretches, array, strict=True):
            contents.append((first, count, data[start : start + stretch.got]))
            start += stretch.bytes
        return contents

    def _drop(self, path: Path, stretches: list[tuple[int, int]]) -> None:
        if stretches:
            array = _stretches_of(stretches)
            _check(lib.udd_apart_drop(bytes(path), array, len(array), self.tidier.thread))

    def _to_compare(self, region: Region) -> list[tuple[int, int]]:
        """Blocks that the store seems to have, in stretches (first, count)."""
        first = region.number * REGION_BLOCKS
        nominees = self.shelf.nominees(first, REGION_BLOCKS) & ~self.shelf.there(first, REGION_BLOCKS)
        return stretches(first, region.blocks & nominees)

    def _to_drop(
        self, regions: list[Region], contents: list[list[tuple[int, int, memoryview]]]
    ) -> list[tuple[int, int]]:
        """Compares what was read of each region, and says what is to be dropped, in stretches (first, count)."""
        return [
            stretch
            for region, found in zip(regions, contents, strict=True)
            for stretch in self._to_drop_of(region, found)
        ]

    def _to_drop_of(self, region: Region, contents: list[tuple[int, int, memoryview]]) -> list[tuple[int, int]]:
        for first, count, data in contents:
            if len(data) == count * BLOCK_BYTES:
                # What is cached was read in that epoch, or later; if it is still the same one, all is well.
                self.shelf.put(first, count, data, 0, region.epoch)
        now = trio.current_time()
        first = region.number * REGION_BLOCKS
        blocks = region.blocks & self.shelf.there(first, REGION_BLOCKS)
        if not blocks or not self.regions.undisturbed(region) or not self.tidier.may_drop(self.image, self.shelf):
            self.regions.kept(region, now)
            return []
        self.regions.dropped(region, blocks, now)
        self.tidier.counters.dropped += blocks.bit_count()
        return stretches(first, blocks)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _stretches_of(stretches: list[tuple[int, int]]) -> Any:
    """struct udd_stretch[] of (first block, count)."""
    return ffi.new(
        "struct udd_stretch[]", [(first * BLOCK_BYTES, count * BLOCK_BYTES, 0) for first, count in stretches]
    )


def stretches(first: int, blocks: int) -> list[tuple[int, int]]:
    """The set bits of ``blocks``, of which bit 0 stands for block ``first``, as (first, count)."""
    found = []
    while blocks:
        skipped = (blocks & -blocks).bit_length() - 1
        blocks >>= skipped
        count = (~blocks & blocks + 1).bit_length() - 1
        found.append((first + skipped, count))
        first, blocks = first + skipped + count, blocks >> count
    return found
