"""A clone as the mount shows it: a disk that can be written, above a base that it shares with others.

What it does not have itself is read from the base, by the base's own map. Its writes go to the overlay, one at a time:
the kernel, too, sends those to one file one after the other. What takes nothing but giving the data to the kernel is
done in the loop, and goes on during a sync; all else in worker threads.
"""

import errno
import logging
import math
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from udedup.vdi.digests import BLOCK_BYTES
from udedup.vdi.formats.overlay import Overlay
from udedup.vdi.formats.probe import Opened
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.images import Image

log = logging.getLogger(__name__)

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SLOW_SECONDS: Final = 0.002
ZERO_BYTES_MAX: Final = 32 << 30
REST: Final = 50
"""Times as long as a slow write has taken, others go to worker threads."""


class Quickness:
    """Whether writes take no time worth speaking of; while they do, the loop must not be held up by them.

    The kernel makes who writes wait when too much is not yet on the disk, and doesn't tell before.
    """

    def __init__(self) -> None:
        self._doubtful_until = -math.inf

    def usual(self, now: float) -> bool:
        """Whether the loop may write, at second ``now`` of any clock."""
        return now >= self._doubtful_until

    def took(self, began: float, seconds: float) -> None:
        """It has: from ``began`` on, for so long. Slow ones take a part of REST of its time at most."""
        if seconds > SLOW_SECONDS:
            self._doubtful_until = began + REST * seconds


class Clone(Image):
    """One clone, open for writing. Made by :meth:`Images.add_clone`."""

    def __init__(self, name: str, path: Path, inode: int, opened: Opened) -> None:
        assert isinstance(opened.layer, Overlay)
        self._overlay = opened.layer
        self._turn = trio.Lock()
        self._quickness = Quickness()
        self._changing = 0, 0
        """Bytes [start, end) that are being written: old, new or a mixture."""
        super().__init__(name, path, inode, opened)

    @property
    def identity(self) -> None:
        """Its digests are not kept: they change all the time, and those of the base are kept with that."""

    @property
    def mtime_ns(self) -> int:
        """The same for as long as it is mounted: the kernel would drop what it has cached at each new one."""
        return self._files[0].status.st_mtime_ns

    @property
    def room(self) -> int:
        """Bytes that the overlay takes on its file system."""
        return os.fstat(self._files[0].descriptor).st_blocks * 512

    @property
    def foreign(self) -> tuple[RawFile, ...]:
        """The base: the overlay is ours to change, and nobody else's."""
        return self._files[1:]

    def noteworthy(self, generation: int, offset: int, size: int) -> bool:
        """See Image. What is being written may be another thing soon."""
        start, end = self._changing
        return super().noteworthy(generation, offset, size) and not (start < offset + size and offset < end)

    def read_digested(self, view: memoryview, room: Any, offset: int) -> bool:
        """See Image."""
        if self.noteworthy(self.generation, offset, len(view)):
            return super().read_digested(view, room, offset)
        return self.read_cached(view, offset)

    @property
    def unsettled(self) -> bool:
        """Whether something written may not be on the disk yet."""
        return self._overlay.behind

    async def write(self, offset: int, data: bytes, limiter: trio.CapacityLimiter | None = None) -> None:
        """Writes ``data`` at byte ``offset``, within the disk. Raises OSError.

        Whole blocks of zeros become holes: they take no room.
        """
        whole = not (offset | len(data)) % BLOCK_BYTES
        if whole and not any(data[:16]) and data == bytes(len(data)):
            await self.zero(offset, len(data), limiter)
            return
        if self._write_at_hand(offset, data):
            return
        async with self._change(offset, len(data)):
            await trio.to_thread.run_sync(self._overlay.write, offset, data, limiter=limiter)

    def _write_at_hand(self, offset: int, data: bytes) -> bool:
        began = time.monotonic()
        if not self._quickness.usual(began):
            return False
        self._forget(offset, len(data))
        done = self._overlay.write_at_hand(offset, data)
        self._forget(offset, len(data))
        self._quickness.took(began, time.monotonic() - began)
        return done

    async def zero(self, offset: int, length: int, limiter: trio.CapacityLimiter | None = None) -> None:
        """Makes a stretch read as zeros and take no room. Raises OSError.

        In pieces: a whole disk may be discarded at once, and its tables are not to be in memory all at once.
        """
        end = offset + length
        while offset < end:
            piece = min(end - offset, ZERO_BYTES_MAX - offset % ZERO_BYTES_MAX)
            async with self._change(offset, piece):
                await trio.to_thread.run_sync(self._overlay.zero, offset, piece, limiter=limiter)
            offset += piece
            if offset < end:
                await self.settle(limiter)

    @asynccontextmanager
    async def _change(self, offset: int, length: int) -> AsyncIterator[None]:
        """Around what changes bytes [offset, offset + length), or a part of them if it fails.

        What was known of their content is forgotten at once, so that nobody who has seen what is new can see the old
        again, and once more at the end. Nobody notes anything of them in between.
        """
        async with self._turn:
            self._changing = offset, offset + length
            self._forget(offset, length)
            try:
                yield
            finally:
                self._forget(offset, length)
                self._changing = 0, 0

    def _forget(self, offset: int, length: int) -> None:
        self.generation += 1
        self.drop_digests(offset, length)

    async def settle(self, limiter: trio.CapacityLimiter | None = None) -> None:
        """Returns once all that was written before is on the disk for good. Raises OSError."""
        async with self._turn:
            await trio.to_thread.run_sync(self._overlay.flush, limiter=limiter)

    def close(self) -> None:
        """Brings what is missing to the disk first; waits for it."""
        try:
            self._overlay.flush()
        except OSError as error:
            log.warning("clone %s: what was written last is lost: %s", self.path, error.strerror)
        super().close()

    @property
    def mode(self) -> int:
        """Permission bits of the overlay, without those to execute."""
        return stat.S_IMODE(self._files[0].status.st_mode) & 0o666

    def errno_of(self, error: OSError) -> int:
        """What to answer to a write that failed so; says it in the log the first time."""
        if error.errno in NO_ROOM:
            self.report("room", f"can't grow: {error.strerror}; who writes to it gets ENOSPC")
            return errno.ENOSPC
        self.report("write", f"can't be written: {error.strerror}; who writes to it gets EIO")
        return errno.EIO
