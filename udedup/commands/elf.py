"""Reads from an ELF file the few facts that decide whether the agent can enter it: loader and needed libraries."""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC_ENTRY = struct.Struct("<qQ")
_MAGIC = b"\x7fELF"
_CLASS_64, _LITTLE_ENDIAN, _X86_64 = 2, 1, 62
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 1, 5, 10
_SIZE_MAX = 1 << 20  # of any table read here; a header that claims more is broken


class Elf(NamedTuple):
    """What an ELF file says of how it is loaded."""

    x86_64: bool
    """Whether it is a 64-bit little-endian x86-64 file; if not, the rest is empty."""

    interpreter: str | None
    """Path of the dynamic loader (PT_INTERP), None for a static program or a library."""

    needed: tuple[str, ...]
    """Names of the libraries it links to (DT_NEEDED), in order."""


def read_elf(path: Path) -> Elf | None:
    """Returns what ``path`` says, None if it is no ELF file or a damaged one. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            return None
        ident, _, machine, _, _, offset, _, _, _, entry_size, count, *_ = _HEADER.unpack(head)
        if (ident[4], ident[5], machine) != (_CLASS_64, _LITTLE_ENDIAN, _X86_64):
            return Elf(x86_64=False, interpreter=None, needed=())
        if entry_size != _PROGRAM_HEADER.size:
            return None
        table = _read_at(file, offset, count * entry_size)
        headers = list(_PROGRAM_HEADER.iter_unpack(table[: len(table) - len(table) % entry_size]))
        return Elf(x86_64=True, interpreter=_interpreter(file, headers), needed=_needed(file, headers))


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset > os.fstat(file.fileno()).st_size:
        return b""  # a damaged header
    file.seek(offset)
    return file.read(min(size, _SIZE_MAX))


def _interpreter(file: BinaryIO, headers: list[tuple[int, ...]]) -> str | None:
    for kind, _, offset, _, _, size, _, _ in headers:
        if kind == _PT_INTERP:
            return _read_at(file, offset, size).rstrip(b"\0").decode(errors="replace")
    return None


def _needed(file: BinaryIO, headers: list[tuple[int, ...]]) -> tuple[str, ...]:
    entries: list[tuple[int, int]] = []
    for kind, _, offset, _, _, size, _, _ in headers:
        if kind == _PT_DYNAMIC:
            table = _read_at(file, offset, size)
            entries = list(_DYNAMIC_ENTRY.iter_unpack(table[: len(table) - len(table) % _DYNAMIC_ENTRY.size]))
    values = dict(entries)
    if _DT_STRTAB not in values:
        return ()
    address = values[_DT_STRTAB]
    for kind, _, offset, start, _, size, _, _ in headers:
        if kind == _PT_LOAD and start <= address < start + size:
            strings = _read_at(file, offset + address - start, values.get(_DT_STRSZ, 0))
            names = (strings[value:].split(b"\0", 1)[0] for tag, value in entries if tag == _DT_NEEDED)
            return tuple(name.decode(errors="replace") for name in names)
    return ()
