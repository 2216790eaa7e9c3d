"""fallocate(2) on files of the mount: discards and zeros, for which pyfuse3 has no handler.

native/engine/fallocate.c says how libfuse comes to have one all the same. Where it can't, the kernel goes on answering
EOPNOTSUPP, and a guest's discards free nothing: a warning tells.
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pyfuse3
import trio

from udedup._native import ffi, lib  # type: ignore[import-not-found, unused-ignore]
from udedup.fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE

log = logging.getLogger(__name__)

Handler = Callable[[int, int, int, int], Awaitable[None]]
"""``handler(file, mode, offset, length)``: raises FUSEError, or nothing."""

WAYS: Final = (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)
"""Modes that leave zeros behind. Room for what is written later is never set aside."""


def prepare() -> None:
    """Has the session that is made next pass such requests on, if that can be; before it is made."""
    result = lib.udd_fallocate_prepare(os.fsencode(pyfuse3.__file__))
    if result:
        log.warning("pyfuse3 %s can't pass on fallocate: %s", pyfuse3.__version__, os.strerror(-result))


def attach(nursery: trio.Nursery, handler: Handler) -> None:
    """Has ``nursery`` run ``handler`` for each request; before the session is served.

    What it raises besides FUSEError ends the mount, as with pyfuse3's own handlers.
    """
    if not lib.udd_fallocate_handled():
        log.warning("discards on clones will fail and free no room")

    def asked(request: Any) -> None:
        nursery.start_soon(answer, handler, request.request, request.file, request.mode, request.offset, request.length)

    ffi.def_extern(name="udd_fallocate_asked")(asked)


async def answer(handler: Handler, request: Any, file: int, mode: int, offset: int, length: int) -> None:
    """Runs ``handler`` and tells the kernel how it went, whatever happens."""
    error = errno.EIO
    try:
        await handler(file, mode, offset, length)
        error = 0
    except pyfuse3.FUSEError as failed:
        error = failed.errno
    finally:
        lib.udd_fallocate_answer(request, error)
