"""What control clients can ask about clones: making them, showing them again, what there are, and ending them."""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from udedup.errors import UdedupError
from udedup.vdi.clone import Clone
from udedup.vdi.clonestore import CloneStore, Record, same_path
from udedup.vdi.filesystem import withdraw
from udedup.vdi.formats.probe import Opening
from udedup.vdi.images import Image, Images, examine

log = logging.getLogger(__name__)


class CloneStatus(msgspec.Struct, frozen=True):
    """One clone, in the mount or not."""

    name: str
    base: str
    overlay: str
    shown: str | None
    """Its path in this engine's mount."""
    room: int | None
    """Bytes that the overlay takes; None: it is missing."""
    note: str
    """What is the matter with it; empty: nothing."""


class Cloning:
    """The clones of one engine's user, as far as this engine has to do with them. One change at a time."""

    def __init__(
        self,
        store: CloneStore,
        images: Images,
        mount: Path,
        *,
        watch: Callable[[Image], None],
        forget: Callable[[Image], None],
    ) -> None:
        """``watch`` and ``forget`` are told of clones that come into the mount and leave it."""
        self._store = store
        self._images = images
        self._mount = mount
        self._watch = watch
        self._forget = forget
        self._changing = trio.Lock()

    def show_again(self) -> None:
        """Shows the clones that the mount had when the last engine ended; what is the matter with others is logged.

        For before the mount is served: waits for disks.
        """
        for name in self._store.names():
            try:
                record = self._store.get(name)
                if record.mount == str(self._mount):
                    self._watch(self._store.open(record, self._images))
            except UdedupError as error:
                log.warning("%s", error)

    async def create(self, name: str, base: Path, opening: Opening, overlay: Path | None) -> str:
        """Makes a clone and shows it; returns its path in the mount. Raises UdedupError; then there is none."""
        async with self._changing:
            record = await trio.to_thread.run_sync(self._store.create, name, base, opening, overlay)
            try:
                return await self._show(record)
            except UdedupError:
                await trio.to_thread.run_sync(self._store.discard, record)
                raise

    async def show(self, name: str) -> str:
        """Shows a clone that is not in the mount; returns its path there. Raises UdedupError."""
        async with self._changing:
            record = await trio.to_thread.run_sync(self._store.get, name)
            if self._shown(record) is not None:
                raise UdedupError(f"clone {name}: is in the mount already")
            return await self._show(record)

    async def hidden(self, clone: Clone) -> None:
        """A clone was taken out of the mount, and the next engine is to leave it out."""
        async with self._changing:
            for name in await trio.to_thread.run_sync(self._store.names):
                record = await trio.to_thread.run_sync(self._store.get, name)
                if record.overlay == str(clone.path):
                    await trio.to_thread.run_sync(self._store.save, msgspec.structs.replace(record, mount=None))

    async def list(self) -> list[CloneStatus]:
        """All clones."""
        names = await trio.to_thread.run_sync(self._store.names)
        return [await trio.to_thread.run_sync(self._describe, name) for name in names]

    async def commit(self, name: str) -> str:
        """Writes a clone into its base and ends it; returns the base. Raises UdedupError if anybody uses either."""
        async with self._changing:
            record = await trio.to_thread.run_sync(self._store.get, name)
            for image in await trio.to_thread.run_sync(self._above, record):
                raise UdedupError(
                    f"clone {name}: its base {record.base} is in the mount, for {image.name}; umount that"
                )
            await self._hide(record)
            try:
                await trio.to_thread.run_sync(self._store.commit, record)
            finally:
                # Somebody may have shown it meanwhile.
                for image in await trio.to_thread.run_sync(self._above, record):
                    await examine(image)
                    image.changed()
            return record.base

    async def discard(self, name: str) -> None:
        """Ends a clone; what it had is lost. Raises UdedupError if anybody has it open."""
        async with self._changing:
            record = await trio.to_thread.run_sync(self._store.get, name)
            users = await trio.to_thread.run_sync(self._store.users, record)
            above = [user.name for user in users if any(file.path == record.overlay for file in user.files)]
            if above:
                raise UdedupError(f"clone {name}: {', '.join(above)} rests on it; discard that first")
            await self._hide(record)
            await trio.to_thread.run_sync(self._store.discard, record)

    def _above(self, record: Record) -> tuple[Image, ...]:
        """Images in the mount that are read from the base of a clone, other than the clone."""
        others = [image for image in self._images if str(image.path) != record.overlay]
        return tuple(image for image in others if any(same_path(str(path), record.base) for path in image.paths))

    def _shown(self, record: Record) -> Clone | None:
        for image in self._images:
            if isinstance(image, Clone) and str(image.path) == record.overlay:
                return image
        return None

    async def _show(self, record: Record) -> str:
        clone = await trio.to_thread.run_sync(self._store.show, record, self._images, self._mount)
        self._watch(clone)
        return str(self._mount / clone.name)

    async def _hide(self, record: Record) -> None:
        clone = self._shown(record)
        if clone is not None:
            await withdraw(self._images, clone, on_removed=lambda: self._forget(clone))

    def _describe(self, name: str) -> CloneStatus:
        try:
            record = self._store.get(name)
        except UdedupError as error:
            return CloneStatus(name, "", "", None, None, str(error))
        clone = self._shown(record)
        shown = None if clone is None else str(self._mount / clone.name)
        try:
            room = Path(record.overlay).stat().st_blocks * 512
        except OSError as error:
            return CloneStatus(name, record.base, record.overlay, shown, None, f"overlay: {error.strerror}")
        return CloneStatus(
            name, record.base, record.overlay, shown, room, "commit interrupted" if record.committing else ""
        )
