"""Tells at once, by inotify(7), when somebody changes a file that an image is read from.

It doesn't tell of everything (writes to mappings, to block devices, on other hosts), so whoever wants to know looks
from time to time besides. A watch is good for one event and is set anew when the image has been looked at: somebody
who writes a lot costs no more than somebody who writes once in a while.
"""

import ctypes
import errno
import logging
import os
import struct
from collections.abc import Collection, Iterable
from typing import Final

import trio

log = logging.getLogger(__name__)

# <sys/inotify.h>; Python has no names for them.
IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4
IN_MOVE_SELF: Final = 0x800
IN_ONESHOT: Final = 0x8000_0000
EVENTS: Final = IN_MODIFY | IN_ATTRIB | IN_MOVE_SELF | IN_ONESHOT
EVENT: Final = struct.Struct("=iIII")
OVERFLOW: Final = -1
READ_BYTES: Final = 1 << 16


class Watcher:
    """Watches files for changes; each stands for a number, such as that of the image it is a part of.

    Without inotify or watches (a user may have few of them), which is logged once, it doesn't tell.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int | None = None
        self._numbers: dict[int, set[int]] = {}
        """By watch."""
        self._armed: dict[int, set[int]] = {}
        """Watches, by number."""
        self._reported = False
        try:
            self._descriptor = self._call("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._report(error)

    def watch(self, number: int, descriptors: Iterable[int]) -> None:
        """Watches open files for ``number``, unless it has watches. Doesn't wait for the disk."""
        if self._descriptor is None or number in self._armed:
            return
        watches = self._armed[number] = set()
        for descriptor in descriptors:
            path = f"/proc/self/fd/{descriptor}".encode()
            try:
                watch = self._call("inotify_add_watch", self._descriptor, path, ctypes.c_uint32(EVENTS))
            except OSError as error:
                # There are no more watches, or it is no longer ours to read. Looking from time to time has to do.
                self._report(error)
                continue
            watches.add(watch)
            self._numbers.setdefault(watch, set()).add(number)

    def keep_only(self, numbers: Collection[int]) -> None:
        """Takes back the watches of all other numbers."""
        for number in [number for number in self._armed if number not in numbers]:
            self._disarm(number)

    async def changed(self) -> set[int]:
        """Waits until files have changed and returns their numbers, which have no watches any more."""
        if self._descriptor is None:
            await trio.sleep_forever()
        assert self._descriptor is not None
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            found: set[int] = set()
            raw = os.read(self._descriptor, READ_BYTES)
            place = 0
            while place < len(raw):
                watch, _, _, name_bytes = EVENT.unpack_from(raw, place)
                place += EVENT.size + name_bytes
                found |= self._armed.keys() if watch == OVERFLOW else self._numbers.get(watch, set())
            for number in found:
                self._disarm(number)
            if found:
                return found

    def close(self) -> None:
        """Ends all watches."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._armed.clear()
        self._numbers.clear()

    def _disarm(self, number: int) -> None:
        for watch in self._armed.pop(number):
            others = self._numbers.get(watch)
            if others is None:
                continue
            others.discard(number)
            if not others:
                del self._numbers[watch]
                try:
                    self._call("inotify_rm_watch", self._descriptor, watch)
                except OSError as error:
                    # It has had its event.
                    if error.errno != errno.EINVAL:
                        raise

    def _report(self, error: OSError) -> None:
        if not self._reported:
            self._reported = True
            log.warning(
                "changes of image files are noticed after a second only: no inotify: %s (see fs.inotify in sysctl)",
                error.strerror,
            )

    def _call(self, name: str, *arguments: object) -> int:
        result: int = getattr(self._libc, name)(*arguments)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
