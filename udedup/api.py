"""The Python API for programs that cooperate knowingly: :func:`join`, :func:`advise`, :func:`stats`, :func:`pause`.

Programs wrapped by ``udedup run`` need none of it. The functions call ``libudedup.so`` through cffi in ABI mode; if the
process was wrapped, that is the library which is loaded already.

A program that holds much of what others hold, too:

>>> import mmap, time, udedup
>>> udedup.join()  # the default engine; programs started by `udedup run` have joined already
>>> table = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
>>> with udedup.pause():  # what is merged while it is being written to would break again at once
...     table[:] = b"".join(number.to_bytes(8, "little") * 512 for number in range(256))
>>> udedup.advise(table)  # there is something worth looking at, now
>>> udedup.stats().merging
True
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Protocol, cast

import attrs
import cffi

from udedup.errors import UdedupError
from udedup.labels import OFF

_DECLARATIONS = """
struct udedup_stats {
    uint64_t pages_merged, zero_pages, runs, break_pages, break_events, hints, merging;
    char reason[128];
};
int udedup_join(const char *socket, const char *label);
int udedup_advise(const void *address, size_t bytes);
int udedup_stats(struct udedup_stats *ret);
int udedup_pause(void);
int udedup_resume(void);
"""


class _Library(Protocol):
    """What ``udedup.h`` declares. Each returns 0 or a negative errno."""

    def udedup_join(self, socket: object, label: object) -> int: ...
    def udedup_advise(self, address: object, size: int) -> int: ...
    def udedup_stats(self, ret: object) -> int: ...
    def udedup_pause(self) -> int: ...
    def udedup_resume(self) -> int: ...


class _RawStats(Protocol):
    """``struct udedup_stats``."""

    pages_merged: int
    zero_pages: int
    runs: int
    break_pages: int
    break_events: int
    hints: int
    merging: int
    reason: object


def _text(ffi: cffi.FFI, array: object) -> str:
    """A ``char`` array as text, up to its NUL."""
    return cast(bytes, ffi.string(cast(cffi.FFI.CData, array))).decode(errors="replace")


@attrs.frozen
class Stats:
    """This process's share, as its agent counts it."""

    pages_merged: int
    """Pages mapped to the store now."""

    zero_pages: int
    """Pages left to the kernel's zero page."""

    runs: int
    """Stretches of merged pages; each costs up to two mappings."""

    break_pages: int
    """Merged pages that were written to, so far."""

    break_events: int
    """Write faults that took."""

    hints: int
    """Place hints given, so far."""

    merging: bool
    """Whether pages may be merged now."""

    reason: str
    """Why not, if not."""


@cache
def _library() -> tuple[cffi.FFI, _Library]:
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    path = Path(__file__).with_name("libudedup.so")
    try:
        return ffi, cast(_Library, ffi.dlopen(str(path)))
    except OSError as error:
        raise UdedupError(f"the agent {path} can't be loaded: {error}; reinstall udedup") from error


def join(socket: Path | str | None = None, domain: str | None = None) -> None:
    """Joins the engine, so that this process's memory is merged with that of others. Joining twice does nothing.

    ``socket`` is the engine's (default: ``$UDEDUP_SOCKET``, else the user's default), ``domain`` a label that the
    engine allows this user, ``"private"`` (share with nobody but itself) or ``"off"`` (do nothing). Raises
    :class:`UdedupError` if no engine answers within five seconds or it refuses.

    >>> try:
    ...     udedup.join()
    ... except udedup.UdedupError as error:  # it goes on as it is
    ...     print(f"memory is not shared: {error}")
    """
    if domain == OFF:
        return
    ffi, library = _library()
    path = ffi.NULL if socket is None else ffi.new("char[]", str(socket).encode())
    label = ffi.NULL if domain is None else ffi.new("char[]", domain.encode())
    result = library.udedup_join(path, label)
    if result == 0:
        return
    if -result == errno.ECONNREFUSED:
        raise UdedupError(f"no engine answers at {socket or 'the default socket'}; start one with `udedup engine`")
    if -result == errno.EACCES:
        raise UdedupError(f"this process can't join the engine: {stats().reason}")
    raise UdedupError(f"joining the engine failed: {os.strerror(-result)}")


def advise(buffer: object) -> None:
    """Hints that ``buffer`` (anything with the buffer interface, contiguous) has just got content worth merging.

    Only the whole pages inside it are meant. Raises :class:`UdedupError` before :func:`join`.

    >>> model = bytearray(range(256)) * 4096  # a NumPy array would do as well
    >>> udedup.advise(model)
    """
    ffi, library = _library()
    view = memoryview(buffer)  # type: ignore[arg-type]
    if library.udedup_advise(ffi.from_buffer(view), view.nbytes) != 0:
        raise UdedupError("this process has not joined an engine; call udedup.join() first")


def stats() -> Stats:
    """This process's statistics. Raises :class:`UdedupError` before :func:`join`.

    >>> share = udedup.stats()
    >>> share.merging, share.reason
    (True, '')
    >>> 4096 * (share.pages_merged + share.zero_pages) >= 0  # bytes that are no longer its own
    True
    """
    ffi, library = _library()
    memory = ffi.new("struct udedup_stats *")
    if library.udedup_stats(memory) != 0:
        raise UdedupError("this process has not joined an engine; call udedup.join() first")
    raw = cast(_RawStats, memory)
    return Stats(
        pages_merged=raw.pages_merged,
        zero_pages=raw.zero_pages,
        runs=raw.runs,
        break_pages=raw.break_pages,
        break_events=raw.break_events,
        hints=raw.hints,
        merging=bool(raw.merging),
        reason=_text(ffi, raw.reason),
    )


@contextmanager
def pause() -> Iterator[None]:
    """Merges nothing more of this process inside, in all its threads; what is merged stays so.

    For moments that must not be held up, and for memory that is about to be written to. May be nested, and used by
    several threads at a time: the merging goes on when the last one leaves. A child forked inside merges. In a process
    that has not joined nothing is merged anyway.

    >>> with udedup.pause():
    ...     udedup.stats().reason
    'the program has paused it'
    """
    _, library = _library()
    paused = library.udedup_pause() == 0
    try:
        yield
    finally:
        if paused:
            library.udedup_resume()
