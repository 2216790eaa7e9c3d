"""Requests to the mount that are answered past pyfuse3: reads, faster so, and fallocate(2), which it does not know.

native/engine/session.c says how libfuse comes to tell us. Where it can't, reads take pyfuse3's way, and the kernel
answers fallocate with EOPNOTSUPP, so that a guest's discards free nothing: a warning tells.
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import pyfuse3
import trio

from udedup._native import ffi, lib  # type: ignore[import-not-found, unused-ignore]
from udedup.fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from udedup.vdi.fastpoll import SPIN_NS, loop_descriptor

log = logging.getLogger(__name__)

Data = bytes | memoryview
Rest = Callable[[], Awaitable[Data]]
"""What is left to do of a read that has to wait."""

HOLES: Final = (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)
"""Modes of fallocate(2) that leave zeros behind. Room for what is written later is never set aside."""
GONE: Final = -errno.ENOENT
"""Whoever has asked was interrupted meanwhile."""


class Handlers(Protocol):
    """Of the file system. They raise FUSEError only; what else they raise ends the mount."""

    def begin_read(self, fh: int, off: int, size: int) -> Data | Rest:
        """The bytes, valid until control is given up; or what has to be awaited for them."""

    def reads_done(self) -> None:
        """Called after reads that were answered without :meth:`begin_read`."""

    async def fallocate(self, fh: int, mode: int, off: int, length: int) -> None:
        """See fallocate(2)."""


def prepare() -> None:
    """Has the session that is made next tell us of such requests, if that can be; before it is made."""
    result = lib.udd_session_prepare(os.fsencode(pyfuse3.__file__))
    if result:
        log.warning("pyfuse3 %s can't be got round: %s", pyfuse3.__version__, os.strerror(-result))


def attach(nursery: trio.Nursery, handlers: Handlers) -> None:
    """Has ``handlers`` answer, in ``nursery`` if it takes time; before the session is served."""
    if not lib.udd_session_ours():
        log.warning("reads through the mount are slower, and discards on clones will fail and free no room")
    lib.udd_session_look(loop_descriptor(), SPIN_NS)
    begin = handlers.begin_read

    def read(request: Any, file: int, offset: int, size: int) -> None:
        try:
            found = begin(file, offset, size)
        except pyfuse3.FUSEError as failed:
            check(lib.udd_request_fail(request, failed.errno))
        except BaseException as error:
            nursery.start_soon(answer_read, request, raising(error))
        else:
            if callable(found):
                nursery.start_soon(answer_read, request, found)
            else:
                check(lib.udd_request_reply(request, ffi.from_buffer(found), len(found)))

    def reads_done() -> None:
        try:
            handlers.reads_done()
        except BaseException as error:
            nursery.start_soon(raising(error))

    def fallocate(request: Any, file: int, mode: int, offset: int, length: int) -> None:
        nursery.start_soon(answer_fallocate, request, handlers, file, mode, offset, length)

    ffi.def_extern(name="udd_read_asked")(read)
    ffi.def_extern(name="udd_reads_done")(reads_done)
    ffi.def_extern(name="udd_fallocate_asked")(fallocate)


def raising(error: BaseException) -> Rest:
    """For a task to raise what must not be raised into C."""

    async def rest() -> Data:
        raise error

    return rest


async def answer_read(request: Any, rest: Rest) -> None:
    """Awaits the bytes and gives them to who has asked, or an error, whatever happens."""
    failure = errno.EIO
    try:
        data = await rest()
        failure = 0
        check(lib.udd_request_reply(request, ffi.from_buffer(data), len(data)))
    except pyfuse3.FUSEError as error:
        failure = error.errno
    finally:
        if failure:
            check(lib.udd_request_fail(request, failure))


async def answer_fallocate(request: Any, handlers: Handlers, file: int, mode: int, offset: int, length: int) -> None:
    """Says how it went, whatever happens."""
    failure = errno.EIO
    try:
        await handlers.fallocate(file, mode, offset, length)
        failure = 0
    except pyfuse3.FUSEError as error:
        failure = error.errno
    finally:
        check(lib.udd_request_fail(request, failure))


def check(result: int) -> None:
    """Of an answer."""
    if result not in (0, GONE):
        log.warning("an answer to the kernel is lost: %s", os.strerror(-result))
