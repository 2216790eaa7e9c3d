"""A file of ours that is written, and nobody else's meanwhile: QEMU's locks see to that.

QEMU (block/file-posix.c) locks one byte of the file for each thing it does with it and one for each thing it doesn't
let others do, shared, and then looks whether others hold the opposite. The locks belong to the open file, so they end
with it, and go before another engine as they go before QEMU.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from udedup.errors import UdedupError
from udedup.fallocate import punch_hole
from udedup.vdi.formats.raw import RawFile

USES_BASE: Final = 100
DENIES_BASE: Final = 200
READ: Final = 0
WRITE: Final = 1
RESIZE: Final = 3
# <fcntl.h>: type, whence, start, length, pid.
FLOCK: Final = struct.Struct("hhqqi4x")


class WritableFile(RawFile):
    """Open for reading and writing."""

    def write(self, offset: int, *data: bytes | memoryview) -> None:
        """Writes all of ``data``, one after the other, from byte ``offset`` on. Raises OSError."""
        buffers = [memoryview(part) for part in data]
        while buffers:
            done = os.pwritev(self.descriptor, buffers, offset)
            offset += done
            while buffers and done >= len(buffers[0]):
                done -= len(buffers.pop(0))
            if done:
                buffers[0] = buffers[0][done:]
        self._end = max(self._end, offset)

    def sync(self) -> None:
        """Returns once all that was written is on the disk for good. Raises OSError."""
        os.fdatasync(self.descriptor)

    def punch(self, offset: int, length: int) -> None:
        """Gives the room of a stretch back, where the file system can. Raises OSError."""
        length = min(length, self._end - offset)
        if length <= 0:
            return
        try:
            punch_hole(self.descriptor, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise


def lock_file(descriptor: int, subject: str, *, write: bool) -> None:
    """Takes QEMU's locks: for reading what nobody may write or resize, and with ``write`` for doing so oneself.

    Raises UdedupError, which begins with ``subject``, if others do or deny that.
    """
    uses = (READ, WRITE, RESIZE) if write else (READ,)
    denies = (WRITE, RESIZE)
    try:
        for byte in [USES_BASE + use for use in uses] + [DENIES_BASE + deny for deny in denies]:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        raise UdedupError(f"{subject}: can't be locked: {error.strerror}; is it in use?") from error
    for byte in [DENIES_BASE + use for use in uses] + [USES_BASE + deny for deny in denies]:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        if FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            doing = "written" if byte < DENIES_BASE or write else "read"
            raise UdedupError(
                f"{subject}: is in use by another engine or by QEMU, so it can't be {doing}; end that first"
            )


def open_writable(path: Path, descriptor: int, subject: str) -> WritableFile:
    """The file that is open for reading as ``descriptor``, which is closed, for writing; nobody else can write it.

    Raises UdedupError, which begins with ``subject``.
    """
    try:
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UdedupError(f"{subject}: can't be opened for writing: {error.strerror}") from error
    finally:
        os.close(descriptor)
    try:
        lock_file(again, subject, write=True)
    except BaseException:
        os.close(again)
        raise
    return WritableFile(path, again)
