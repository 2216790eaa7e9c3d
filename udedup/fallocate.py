"""Holes in files: fallocate(2) with flags, which Python does not have."""

import ctypes
import os
from typing import Final

KEEP_SIZE: Final = 1 << 0
PUNCH_HOLE: Final = 1 << 1
ZERO_RANGE: Final = 1 << 4


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Gives the room of [offset, offset + length), in bytes, back; it reads as zeros then. Raises OSError."""
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, offset, length)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """What fallocate(2) does for bytes [offset, offset + length). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
