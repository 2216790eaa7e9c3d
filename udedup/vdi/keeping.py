"""Keeps the digest tables of images on disk: loads what is there when it is wanted, and writes what is new.

Reads never wait for that. What the first read of a stretch doesn't find in the table it digests anew, and asks for
the rest of the stretch, which is loaded by a worker thread and there for the reads after it.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import trio

from udedup.vdi.digests import EMPTY_PAGE, DigestTable, pages_of
from udedup.vdi.sidecar import BusyError, DamagedError, Identity, Sidecar, runs
from udedup.vdi.state import StateDirectory

log = logging.getLogger(__name__)

AHEAD_PAGES: Final = 16
"""Loaded at a time when an image is read in sequence: 16 MiB of it."""
BATCH_PAGES: Final = 1024
"""Written at a time."""
RACY_NS: Final = 1_000_000_000
"""Who writes to a file twice in so short a time may leave it with the same time of change."""

Found = TypeVar("Found", Sidecar, Sidecar | None)


class Kept:
    """The digests of one image, in its table and in a sidecar."""

    def __init__(
        self,
        state: StateDirectory,
        path: Path,
        table: DigestTable,
        identity: Identity,
        on_want: Callable[[], None],
    ) -> None:
        """``path`` is the image's; ``on_want`` is called when there is something to :meth:`load`."""
        self._state = state
        self._path = path
        self._table = table
        self._identity = identity
        self._on_want = on_want
        self._loaded: set[int] = set()
        """Pages of the table for which the sidecar has been asked."""
        self._wanted: set[int] = set()
        """Pages for which it is to be asked."""
        self._racy: set[int] = set()
        """Pages with digests from a time when a change of the file could have gone unnoticed: not for others."""
        self._since_ns = time.time_ns()
        """When pages were last taken from the table: its unkept ones are from after that."""
        self._given_up = False
        # Held by whoever uses the sidecar, which happens in worker threads only.
        self._lock = trio.Lock()
        self._sidecar: tuple[Identity, Sidecar] | None = None

    def want(self, first: int, count: int) -> None:
        """Asks for the digests of blocks [first, first + count), unless that has been done before."""
        pages = pages_of(first, count)
        if self._loaded.issuperset(pages) or self._given_up:
            return
        ahead = AHEAD_PAGES if pages.start - 1 in self._loaded else 0
        wanted = set(range(pages.start, min(pages.stop + ahead, self._table.pages))) - self._loaded
        self._loaded |= wanted
        self._wanted |= wanted
        self._on_want()

    def changed(self, identity: Identity) -> None:
        """The image is another one now, and what was known of it is worthless. The table has been cleared."""
        self._identity = identity
        self._loaded.clear()
        self._wanted.clear()
        self._racy.clear()
        self._since_ns = time.time_ns()

    async def load(self) -> None:
        """Enters into the table what the sidecar has of the pages that are wanted."""
        async with self._lock:
            if not self._wanted:
                return
            identity, wanted = self._identity, sorted(self._wanted)
            self._wanted.clear()
            found = await trio.to_thread.run_sync(self._read, identity, wanted)
            # It is of no use if the image has changed meanwhile.
            if identity == self._identity:
                for number, page in found.items():
                    if number not in self._table.dropped:
                        self._table.fill(number, page)

    async def flush(self, mtime_ns: int) -> None:
        """Writes what is new. ``mtime_ns`` is when the image last changed, as of just now."""
        table = self._table
        async with self._lock:
            if table.emptied:
                table.emptied = False
                await trio.to_thread.run_sync(self._start_anew, self._identity)
            if self._since_ns < mtime_ns + RACY_NS:
                self._racy |= table.unkept
            self._since_ns = time.time_ns()
            dropped = frozenset(table.dropped)
            numbers = sorted(table.unkept - self._racy | dropped)
            table.unkept.clear()
            table.dropped.clear()
            identity = self._identity
            for start in range(0, len(numbers), BATCH_PAGES):
                if identity != self._identity:
                    return
                pages = {
                    number: EMPTY_PAGE if number in self._racy else table.page(number)
                    for number in numbers[start : start + BATCH_PAGES]
                }
                written = await trio.to_thread.run_sync(self._write, identity, pages, dropped)
                if not written and not self._given_up and identity == self._identity:
                    table.unkept.update(pages)
                    table.dropped.update(dropped & pages.keys())

    async def close(self) -> None:
        """Closes the sidecar for good."""
        self._given_up = True
        async with self._lock:
            self._put_down()

    # ---- in worker threads ----

    def _read(self, identity: Identity, numbers: list[int]) -> dict[int, bytes]:
        """What the sidecar has of some pages."""
        found: dict[int, bytes] = {}
        try:
            sidecar = self._take(identity, self._state.find)
            if sidecar is not None:
                for run in runs(numbers):
                    pages = zip(run, sidecar.read(run.start, len(run)), strict=True)
                    found.update((number, page) for number, page in pages if page is not None)
        except DamagedError as error:
            # Nothing of it is to be trusted, also what looked good.
            found.clear()
            self._drop(error)
        except BusyError:
            log.debug("image %s: its sidecar is in use; its digests are computed anew", self._path)
        except OSError as error:
            self._give_up(error)
        return found

    def _write(self, identity: Identity, pages: dict[int, bytes], overwrite: frozenset[int]) -> bool:
        """Whether some pages could be written to the sidecar."""
        try:
            sidecar = self._take(identity, self._state.find_or_create)
            sidecar.write(pages, overwrite=overwrite)
            sidecar.settle()
        except DamagedError as error:
            self._drop(error)
            return False
        except BusyError:
            return False
        except OSError as error:
            self._give_up(error)
            return False
        return True

    def _start_anew(self, identity: Identity) -> None:
        self._put_down()
        try:
            self._sidecar = identity, self._state.create(identity)
        except OSError as error:
            self._give_up(error)

    def _take(self, identity: Identity, find: Callable[[Path, Identity], Found]) -> Found | Sidecar:
        """The sidecar for what the image is now."""
        if self._sidecar is not None:
            for_what, sidecar = self._sidecar
            if for_what == identity and not sidecar.replaced:
                return sidecar
            self._put_down()
        found = find(self._path, identity)
        if found is not None:
            self._sidecar = identity, found
        return found

    def _put_down(self) -> None:
        if self._sidecar is not None:
            self._sidecar[1].close()
            self._sidecar = None

    def _drop(self, error: DamagedError) -> None:
        if self._sidecar is not None:
            self._state.drop(self._sidecar[1].path, self._path, error)
            self._put_down()

    def _give_up(self, error: OSError) -> None:
        self._given_up = True
        log.warning("image %s: its digests are no longer kept in %s: %s", self._path, self._state.path, error.strerror)
        self._put_down()
