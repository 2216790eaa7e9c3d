"""Lets pyfuse3 take waiting requests without a round through trio's scheduler.

Most of the cost of a small read is not the read: it is two epoll_wait and an epoll_ctl around each request. While
this is in force pyfuse3 first asks poll(2) whether another request is waiting and takes it at once; only an idle
mount waits through trio. Other tasks of the loop get their turn after every ``REQUESTS_MAX`` requests or
``HOLD_SECONDS``, whichever comes first.

Rests on pyfuse3's private ``_wait_fuse_readable``, so it is used with the versions it has been tried with only.
"""

import logging
import re
import select
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pyfuse3
import trio

log = logging.getLogger(__name__)

WaitReadable = Callable[[], Awaitable[bool]]

ATTRIBUTE: Final = "_wait_fuse_readable"
TRIED: Final = ("3.5",)
REQUESTS_MAX: Final = 64
HOLD_SECONDS: Final = 0.002


def unsupported(version: str, original: object) -> str | None:
    """Why fast poll can't be used with this pyfuse3, or None if it can."""
    found = re.match(r"\d+\.\d+", version)
    if found is None or found[0] not in TRIED:
        return f"pyfuse3 {version} is not {' or '.join(TRIED)}"
    if not callable(original):
        return f"pyfuse3 {version} has no {ATTRIBUTE}"
    return None


def make_wait(descriptor: int, original: WaitReadable) -> WaitReadable:
    """A replacement for ``_wait_fuse_readable`` on the FUSE device open as ``descriptor``."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    served = 0
    since = time.monotonic()

    async def wait() -> bool:
        """True once a request can be read, False if the session ends.

        Reading the device blocks when there is nothing in it, so between the poll that found something and the
        return there is no await, in which another task might take it.
        """
        nonlocal served, since
        if served >= REQUESTS_MAX or time.monotonic() - since >= HOLD_SECONDS:
            await trio.lowlevel.checkpoint()
            served, since = 0, time.monotonic()
        while not poll.poll(0):
            if not await original():
                return False
            served, since = 0, time.monotonic()
        served += 1
        return True

    return wait


@contextmanager
def fast_poll(descriptor: int) -> Iterator[bool]:
    """Puts fast poll in force for the mount whose FUSE device is ``descriptor``; yields whether it could."""
    original = getattr(pyfuse3, ATTRIBUTE, None)
    reason = unsupported(pyfuse3.__version__, original)
    if reason is not None or original is None:
        log.warning("fast poll is off, reads through the mount are slower: %s", reason)
        yield False
        return
    setattr(pyfuse3, ATTRIBUTE, make_wait(descriptor, original))
    try:
        yield True
    finally:
        setattr(pyfuse3, ATTRIBUTE, original)
