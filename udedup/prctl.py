"""prctl(2), which Python does not have."""

import ctypes
import os


def prctl(option: int, argument: int = 0) -> int:
    """Calls prctl with one argument; the others are 0. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.prctl(option, *(ctypes.c_ulong(value) for value in (argument, 0, 0, 0)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
