"""The state directory: where sidecars are, who may write there, and what is cleaned up."""

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Final

import attrs

from udedup.errors import UdedupError
from udedup.vdi.sidecar import SUFFIX, Identity, Sidecar, StaleError, UnfitError, locked, others_may_write

log = logging.getLogger(__name__)

UNUSED_SECONDS: Final = 90 * 24 * 3600
"""How long the sidecar of an image stays that is not seen any more: moved, deleted, or no longer needed."""


@attrs.frozen
class StateDirectory:
    """A directory that only this user and root can write to. Its methods wait for the disk, and raise OSError or
    BusyError."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "StateDirectory":
        """Makes it if need be, and tidies it up. Raises UdedupError if it can't be used."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if others_may_write(path.stat()):
                raise UdedupError(
                    f"state directory {path}: others may write to it: it must belong to root or to the engine's user,"
                    " and nobody else may write to it (chown, chmod go-w)"
                )
            directory = cls(path)
            directory.tidy()
            # Not asked for by its mode: root may find a disk that is read-only.
            with tempfile.TemporaryFile(dir=path):
                return directory
        except OSError as error:
            raise UdedupError(
                f"state directory {path}: can't be used: {error.strerror}; give another one with --state-dir"
            ) from error

    def find(self, image: Path, identity: Identity) -> Sidecar | None:
        """The sidecar with what is known of ``image``, None if there is none that will do.

        One that won't do is removed, with one line in the log.
        """
        path = self.path / identity.name
        try:
            return Sidecar.open(path, identity)
        except FileNotFoundError:
            return None
        except UnfitError as error:
            self.drop(path, image, error)
            return None

    def find_or_create(self, image: Path, identity: Identity) -> Sidecar:
        """The same, and an empty one if there is none."""
        # Who makes one first is found by the others.
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with locked(directory, fcntl.LOCK_EX):
                return self.find(image, identity) or self.create(identity)
        finally:
            os.close(directory)

    def create(self, identity: Identity) -> Sidecar:
        """An empty one in the place of whatever there is."""
        return Sidecar.create(self.path / identity.name, identity)

    def drop(self, path: Path, image: Path, error: UnfitError) -> None:
        """Removes a sidecar and says why."""
        # An image may change while nobody looks: nothing is wrong then.
        level = logging.INFO if isinstance(error, StaleError) else logging.WARNING
        log.log(level, "image %s: its digests in %s are dropped: the file %s", image, path, error)
        path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes sidecars that nobody has used for long, and what was left half made."""
        oldest = time.time() - UNUSED_SECONDS
        for path in self.path.glob(f"*{SUFFIX}"):
            try:
                if path.lstat().st_mtime < oldest:
                    path.unlink()
            except FileNotFoundError:
                # Another engine tidies up, too.
                continue
