"""Opening image files: which may be opened, and what an image may name as another part of itself.

What a user names is opened wherever it is. What an *image* names (backing file, data file, parent) is written by
whoever made the image, perhaps a guest: it must be a plain path, and the file it leads to must lie below a directory
the user has allowed. That is asked of the file that has been opened, not of the path, so no symbolic link and no
renaming in between leads out.
"""

import os
import stat
from pathlib import Path
from typing import Final

import attrs

from udedup.errors import UdedupError

NAME_BYTES_MAX: Final = 1023
"""QEMU's limit for the name of a backing file."""


@attrs.frozen
class Allowed:
    """Directories below which the parts of an image may lie."""

    directories: tuple[Path, ...]
    """Without symbolic links."""

    @classmethod
    def of(cls, image: Path, more: tuple[Path, ...]) -> "Allowed":
        """The directory of ``image`` and those the user has named besides."""
        return cls(tuple(Path(os.path.realpath(directory)) for directory in (image.parent, *more)))

    def holds(self, path: Path) -> bool:
        """Whether ``path``, which must be free of symbolic links, lies below one of them."""
        return any(path.is_relative_to(directory) for directory in self.directories)


def open_named(path: Path) -> int:
    """Opens a regular file or block device that the user has named; raises UdedupError for anything else."""
    return _open(path, f"image {path}", None)


def open_part(image: Path, what: str, name: bytes, allowed: Allowed) -> tuple[Path, int]:
    """Opens what the image file at ``image`` calls ``name``; ``what`` says what that is, as in "backing file".

    Returns its path and descriptor. Raises UdedupError if the name is no plain path or leads out of ``allowed``.
    """
    text = os.fsdecode(name)
    subject = f"image {image}: its {what} {text!r}"
    if not name or b"\0" in name or len(name) > NAME_BYTES_MAX:
        raise UdedupError(f"{subject} has a name that can't be a path")
    # QEMU's rule: a colon before the first slash ends the name of a protocol (json:, nbd:, file: …).
    if ":" in text.partition("/")[0]:
        raise UdedupError(f"{subject} is not a plain path; give the image one with `qemu-img rebase -u`")
    path = image.parent / text
    return path, _open(path, subject, allowed)


def _open(path: Path, subject: str, allowed: Allowed | None) -> int:
    try:
        # Looked at before it is opened for reading: opening a pipe or a tape drive has effects.
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise UdedupError(f"{subject}: can't be opened: {error.strerror}") from error
    try:
        if allowed is not None:
            _check_place(found, subject, allowed)
        check_kind(subject, os.fstat(found).st_mode)
        descriptor = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UdedupError(f"{subject}: can't be opened: {error.strerror}") from error
    finally:
        os.close(found)
    if file_size(descriptor, os.fstat(descriptor)) == 0:
        os.close(descriptor)
        raise UdedupError(f"{subject}: is empty; there is nothing to mount")
    return descriptor


def _check_place(descriptor: int, subject: str, allowed: Allowed) -> None:
    real = Path(f"/proc/self/fd/{descriptor}").readlink()
    if not allowed.holds(real):
        raise UdedupError(
            f"{subject} is outside the directories allowed for it; if you trust the image, start the engine with"
            " --allow-backing DIR"
        )


def check_kind(subject: str, mode: int) -> None:
    """Raises UdedupError if ``mode`` is neither a regular file's nor a block device's."""
    if stat.S_ISDIR(mode):
        raise UdedupError(f"{subject}: is a directory; give an image file or a block device")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UdedupError(f"{subject}: is neither a regular file nor a block device")


def file_size(descriptor: int, status: os.stat_result) -> int:
    """Bytes in a file, or in a block device (for which stat says 0)."""
    return os.lseek(descriptor, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size
