"""When the machine or the engine's control group has no more memory or descriptors: going on with what there is.

What was asked for is given up. Nothing but sharing is lost by that, so there is nothing to undo and nobody to tell but
the log, which gets a line now and then.
"""

import errno
import logging

import trio

log = logging.getLogger(__name__)

ERRORS = frozenset({errno.ENOMEM, errno.ENOSPC, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS})
"""What a system call says then."""

QUIET_SECONDS = 60.0
"""Between two lines."""


class Shortage:
    """Of one engine."""

    def __init__(self) -> None:
        self.caches_may_grow = True
        """Whether to keep what may only be useful later."""
        self._next_line = 0.0

    def explains(self, error: OSError, what: str) -> bool:
        """Whether ``error`` is one; then the log says that ``what`` is given up."""
        if error.errno not in ERRORS:
            return False
        now = trio.current_time()
        if now >= self._next_line:
            self._next_line = now + QUIET_SECONDS
            log.warning("%s (%s): more such lines only in a minute", what, error.strerror)
        return True
