"""What a call into a program needs to know of it: where its C library, its loader and its allocators are."""

import struct
from collections.abc import Iterable
from pathlib import Path

import attrs

from udedup.attach.process import Mapping, Process
from udedup.attach.symbols import Symbols
from udedup.commands.host import AGENT_NAME
from udedup.engine.native import CData, ffi
from udedup.errors import UdedupError

_LIBC, _LOADER = "libc.so.6", "ld-linux-x86-64.so.2"
_RESTORER = bytes.fromhex("48c7c00f0000000f05")
"""mov $SYS_rt_sigreturn, %rax; syscall: what glibc has handlers of signals return to."""

_ERRNO_CODE = bytes.fromhex("488b05"), bytes.fromhex("644803042500000000c3")
"""``__errno_location``: mov offset(%rip), %rax; add %fs:0, %rax; ret."""

_ENDBR = bytes.fromhex("f30f1efa")
_WAITING = (
    *(
        "accept",
        "accept4",
        "clock_nanosleep",
        "epoll_pwait",
        "epoll_pwait2",
        "epoll_wait",
        "nanosleep",
        "pause",
        "poll",
    ),
    *("ppoll", "pselect", "read", "readv", "recv", "recvfrom", "recvmmsg", "recvmsg", "select", "sigsuspend"),
    *("sigtimedwait", "sigwaitinfo", "wait4", "waitid"),
)
"""Functions that do nothing but one system call that waits."""


@attrs.frozen
class Library:
    """A library of a program, with its symbols."""

    mappings: tuple[Mapping, ...]
    """All of it."""

    symbols: Symbols
    """Of its file, the very one that is mapped."""

    @property
    def bias(self) -> int:
        """What is to be added to a symbol's value."""
        return next(mapping.start - mapping.offset for mapping in self.mappings)

    @property
    def code(self) -> list[tuple[int, int]]:
        """Where its code is: first address, and the one behind the last."""
        return [(mapping.start, mapping.end) for mapping in self.mappings if mapping.executable]

    def address(self, name: str) -> int:
        """Returns where ``name`` is in the program. Raises UdedupError if the library has no such symbol."""
        try:
            return self.bias + self.symbols.all()[name].value
        except KeyError:
            raise UdedupError(f"{self.mappings[0].path} has no {name}: it is of another version") from None


def find_library(process: Process, name: str) -> Library | None:
    """Returns the library of this file name that is loaded, None if there is none. Raises UdedupError."""
    maps = [mapping for mapping in process.maps() if Path(mapping.path.removesuffix(" (deleted)")).name == name]
    if not maps:
        return None
    # Of several, in namespaces of the loader's, the first is the program's own.
    return _open(process, [mapping for mapping in maps if mapping.inode == maps[0].inode])


def _open(process: Process, mappings: list[Mapping]) -> Library:
    first = mappings[0]
    file = process.root(first.path)
    if first.deleted or not file.exists() or file.stat().st_ino != first.inode:
        raise UdedupError(f"{first.path.removesuffix(' (deleted)')} was replaced since {process} started: restart it")
    return Library(tuple(mappings), Symbols(file))


def _needed(process: Process, name: str) -> Library:
    library = find_library(process, name)
    if library is None:
        raise UdedupError(f"{process} has no {name}: the agent cannot enter it")
    return library


@attrs.frozen
class Program:
    """A program that functions can be called in."""

    process: Process
    """Which."""

    libc: Library
    """Its C library."""

    description: CData
    """``struct udd_program``."""

    _parts: tuple[CData, ...]
    """Which that points to."""

    @classmethod
    def examine(cls, process: Process) -> "Program":
        """Reads what there is to know. Raises UdedupError if something is not as this can deal with it."""
        libc, loader = _needed(process, _LIBC), _needed(process, _LOADER)
        barred = {*loader.code, *_allocators(process)}
        # Where the hooks of a program are that shares its memory already, threads wait as well.
        agent = find_library(process, AGENT_NAME)
        busy = {*barred, *libc.code, *(agent.code if agent else ())}
        calm = [
            (mapping.start, mapping.end)
            for mapping in process.maps()
            if mapping.executable and mapping.path.startswith("/")
        ]
        calm = [code for code in calm if code not in busy]
        symbols = libc.symbols.all()
        waiting = [
            (libc.bias + symbol.value, libc.bias + symbol.value + symbol.size)
            for symbol in (symbols[name] for name in _WAITING if name in symbols)
        ]
        parts = tuple(code_array(code) for code in (calm, sorted(barred), waiting))
        return cls(process, libc, _describe(process, libc, parts), parts)


def _describe(process: Process, libc: Library, parts: tuple[CData, ...]) -> CData:
    calm, barred, waiting = parts
    limit = process.limit("Max stack size")
    description: CData = ffi.new(
        "struct udd_program *",
        {
            "pid": process.pid,
            "tid_offset": _thread_number_offset(process, libc),
            "errno_offset": _errno_offset(process, libc),
            "restorer": _restorer(process, libc),
            "stack_start": process.stack_start,
            "stack_limit": 1 << 46 if limit is None else limit,
            "filtered": process.status.get("Seccomp", "0") != "0",
            "calm": calm,
            "calm_count": len(calm),
            "barred": barred,
            "barred_count": len(barred),
            "waiting": waiting,
            "waiting_count": len(waiting),
        },
    )
    return description


def code_array(code: Iterable[tuple[int, int]]) -> CData:
    """Returns ranges of addresses as an array of ``struct udd_code``."""
    array: CData = ffi.new("struct udd_code[]", list(code))
    return array


def _allocators(process: Process) -> list[tuple[int, int]]:
    """Code of libraries, or of the program itself, that bring a malloc() of their own."""
    by_file: dict[tuple[str, int], list[Mapping]] = {}
    for mapping in process.maps():
        if mapping.path.startswith("/") and Path(mapping.path).name not in (_LIBC, _LOADER):
            by_file.setdefault((mapping.path, mapping.inode), []).append(mapping)
    found = []
    for mappings in by_file.values():
        code = [(mapping.start, mapping.end) for mapping in mappings if mapping.executable]
        # What can't be looked into may be one.
        if code and _may_allocate(process, mappings[0]):
            found += code
    return found


def _may_allocate(process: Process, mapping: Mapping) -> bool:
    file = process.root(mapping.path)
    try:
        if file.stat().st_ino != mapping.inode:
            return True
        return Symbols(file).defines_function("malloc")
    except OSError:
        return True


def _unknown(libc: Library, what: str) -> UdedupError:
    return UdedupError(
        f"{libc.mappings[0].path} is not as udedup knows glibc ({what}): start the program wrapped instead"
    )


def _thread_number_offset(process: Process, libc: Library) -> int:
    """How far behind a thread's pointer its number is: glibc says so for debuggers."""
    bits, count, offset = struct.unpack("=3I", process.read(libc.address("_thread_db_pthread_tid"), 12))
    if (bits, count) != (32, 1):
        raise _unknown(libc, "threads' numbers")
    return int(offset)


def _errno_offset(process: Process, libc: Library) -> int:
    address = libc.address("__errno_location")
    code = process.read(address, 32)
    skipped = len(_ENDBR) if code.startswith(_ENDBR) else 0
    load, rest = _ERRNO_CODE
    code = code[skipped:]
    end = len(load) + 4
    if not (code.startswith(load) and code[end:].startswith(rest)):
        raise _unknown(libc, "errno")
    (distance,) = struct.unpack("=i", code[len(load) : end])
    (offset,) = struct.unpack("=q", process.read(address + skipped + end + distance, 8))
    return int(offset)


def _restorer(process: Process, libc: Library) -> int:
    for mapping in libc.mappings:
        if mapping.executable:
            found = libc.symbols.find_code(_RESTORER, mapping.offset, mapping.end - mapping.start)
            if found is not None:
                return mapping.start + found - mapping.offset
    raise _unknown(libc, "signals")
