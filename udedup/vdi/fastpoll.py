"""Lets pyfuse3 take waiting requests without a round through trio's scheduler.

Most of the cost of a small read is not the read: it is two epoll_wait and an epoll_ctl around each request. While
this is in force pyfuse3 first asks poll(2) whether another request is waiting and takes it at once; only an idle
mount waits through trio. Other tasks of the loop get their turn after every ``REQUESTS_MAX`` requests (of reads, after
so many batches, see native/engine/session.c) or ``HOLD_SECONDS``, whichever comes first.

A reader that has its answer asks for the next block in less time than a thread takes to fall asleep and to be woken,
so it is looked for the next request for ``SPIN_NS`` before waiting. That ends as soon as the loop has something else
to do, and is left for a while when nothing came of it: :class:`Spinning`.

Rests on pyfuse3's private ``_wait_fuse_readable``, so it is used with the versions it has been tried with only.
"""

import logging
import operator
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pyfuse3
import trio

from udedup._native import lib  # type: ignore[import-not-found, unused-ignore]

log = logging.getLogger(__name__)

WaitReadable = Callable[[], Awaitable[bool]]

ATTRIBUTE: Final = "_wait_fuse_readable"
EPOLL: Final = "_core._run.GLOBAL_RUN_CONTEXT.runner.io_manager._epoll"
TRIED: Final = ("3.5",)
REQUESTS_MAX: Final = 64
HOLD_SECONDS: Final = 0.002
SPIN_NS: Final = 30_000
PAUSE_MAX: Final = 63
"""Requests, at most, before which it is not looked for long, so that readers in no hurry cost no CPU."""


class Spinning:
    """When it pays to look for the next request again and again: while there is one before the look ends.

    After each look in vain twice as many requests are waited for otherwise before the next.
    """

    def __init__(self) -> None:
        self._pause = 0
        self._left = 0

    def next(self) -> bool:
        """Whether to look for long, this time."""
        if self._left:
            self._left -= 1
            return False
        return True

    def ended(self, *, found: bool) -> None:
        """What came of it when it was."""
        self._pause = 0 if found else min(2 * self._pause + 1, PAUSE_MAX)
        self._left = self._pause


def unsupported(version: str, original: object) -> str | None:
    """Why fast poll can't be used with this pyfuse3, or None if it can."""
    found = re.match(r"\d+\.\d+", version)
    if found is None or found[0] not in TRIED:
        return f"pyfuse3 {version} is not {' or '.join(TRIED)}"
    if not callable(original):
        return f"pyfuse3 {version} has no {ATTRIBUTE}"
    return None


def loop_descriptor() -> int:
    """The descriptor of this loop's epoll, readable when there is something to do; -1 if it can't be had.

    Private to trio. Without it the rest of the loop waits for SPIN_NS more.
    """
    try:
        found: int = operator.attrgetter(EPOLL)(trio).fileno()
    except AttributeError:
        log.warning("trio %s has no %s: the engine may answer its agents a little later", trio.__version__, EPOLL)
        return -1
    return found


def make_wait(descriptor: int, original: WaitReadable) -> WaitReadable:
    """A replacement for ``_wait_fuse_readable`` on the FUSE device open as ``descriptor``."""
    loop = loop_descriptor()
    # Looked up once: this is run for every request.
    ask, there, monotonic = lib.udd_request_wait, lib.UDD_REQUEST_THERE, time.monotonic
    spinning = Spinning()
    served = 0
    since = time.monotonic()

    async def wait() -> bool:
        """True once a request can be read, False if the session ends.

        Reading the device blocks when there is nothing in it, so between the poll that found something and the
        return there is no await, in which another task might take it.
        """
        nonlocal served, since
        if served >= REQUESTS_MAX or monotonic() - since >= HOLD_SECONDS:
            await trio.lowlevel.checkpoint()
            served, since = 0, monotonic()
        spin = SPIN_NS if spinning.next() else 0
        while (found := ask(descriptor, loop, spin)) != there:
            if spin and found == lib.UDD_REQUEST_NONE:
                spinning.ended(found=False)
            spin = 0
            # The others' turn, as many of their steps as there are.
            if not await original():
                return False
            served, since = 0, monotonic()
        if spin:
            spinning.ended(found=True)
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
