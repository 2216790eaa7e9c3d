"""When to let go of what the kernel caches of the mount: soon after it was read, and later where that was too soon.

What is dropped and then wanted again has to be asked of us, which costs a reader more than the page cache would. So
each MiB of an image that comes back soon after it was dropped is kept twice as long the next time. A MiB that is read
all the time is thus asked for some ten times in an hour, however often it is read.
"""

from typing import Final

import attrs

REGION_BLOCKS: Final = 256
"""Blocks of 4 KiB that are judged together: what the kernel reads ahead."""

FIRST_SECONDS: Final = 2.0
"""How long a region is left alone after it was read."""

LEVEL_MAX: Final = 10
"""How often that may double: 34 minutes."""

RETURN_DELAYS: Final = 8
"""A region that comes back within this many times its delay came back soon."""

LOOKS_MAX: Final = 6
"""A region of which nothing could be dropped at so many looks, each twice as late as the one before, is left alone."""

REGIONS_MAX: Final = 1 << 14
"""Regions that are remembered, of one image and domain; the one that was read least recently is forgotten."""


@attrs.define
class Region:
    """One MiB of an image."""

    number: int
    """Of its first block / REGION_BLOCKS."""

    blocks: int = 0
    """A bit for each block that the kernel may have cached."""

    epoch: int = 0
    """Of the image, in which all of these were read."""

    level: int = 0
    """How often its delay has been doubled."""

    looks: int = 0
    """At which nothing was found to drop, since it was read."""

    due: float = 0
    """When it is looked at next, s."""

    dropped_at: float | None = None
    """When something of it was dropped last, unless it has been read since, s."""

    @property
    def delay(self) -> float:
        """Between a read and the next look, s."""
        return float(FIRST_SECONDS * 2**self.level)


class Regions:
    """Those of one image that are read by one domain. Times are the caller's clock's, s."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        """By number; least recently read first."""
        self._waiting: dict[int, Region] = {}
        """Those that have blocks to look at."""

    def __len__(self) -> int:
        return len(self._regions)

    def read(self, first: int, count: int, epoch: int, now: float) -> None:
        """The blocks [first, first + count) were asked for, so that the kernel has them cached now."""
        while count > 0:
            number, start = divmod(first, REGION_BLOCKS)
            part = min(count, REGION_BLOCKS - start)
            self._read_region(number, ((1 << part) - 1) << start, epoch, now)
            first, count = first + part, count - part

    def _read_region(self, number: int, blocks: int, epoch: int, now: float) -> None:
        region = self._regions.pop(number, None)
        if region is None:
            region = Region(number)
            if len(self._regions) >= REGIONS_MAX:
                oldest = next(iter(self._regions))
                del self._regions[oldest]
                self._waiting.pop(oldest, None)
        self._regions[number] = region
        if region.dropped_at is not None:
            soon = now - region.dropped_at < RETURN_DELAYS * region.delay
            region.level = min(region.level + 1, LEVEL_MAX) if soon else max(region.level - 1, 0)
            region.dropped_at = None
        if region.epoch != epoch:
            # What was read of another state of the file is no proof of anything.
            region.blocks, region.epoch = 0, epoch
        region.blocks |= blocks
        region.looks = 0
        region.due = now + region.delay
        self._waiting[number] = region

    def due(self, now: float, most: int) -> list[Region]:
        """Takes out up to ``most`` regions that are to be looked at; each must be given to one of the three below."""
        ripe = [region for region in self._waiting.values() if region.due <= now][:most]
        for region in ripe:
            del self._waiting[region.number]
        return ripe

    def undisturbed(self, region: Region) -> bool:
        """Whether it has not been read since it was taken out."""
        return region.number not in self._waiting

    def dropped(self, region: Region, blocks: int, now: float) -> None:
        """These blocks (a bit each) of it are no longer cached; it is looked at again for the others."""
        region.blocks &= ~blocks
        region.dropped_at = now
        if region.blocks:
            self.kept(region, now)

    def kept(self, region: Region, now: float) -> None:
        """Nothing of it could be dropped; it is looked at again, but not for ever."""
        region.looks += 1
        # Not if it has been read meanwhile, and looked up or forgotten since.
        if self.undisturbed(region) and region.looks < LOOKS_MAX and self._regions.get(region.number) is region:
            region.due = now + region.delay * 2**region.looks
            self._waiting[region.number] = region

    def left(self, region: Region) -> None:
        """It is not looked at again until it is read."""
        region.blocks = 0
