"""Where functions and variables are in the libraries of a program: the dynamic symbols of their files."""

import struct
from pathlib import Path
from typing import NamedTuple

_HEADER = struct.Struct("<40xQ10xHHH")  # e_shoff, e_shentsize, e_shnum, e_shstrndx of a 64-bit file
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNSYM = 11
_FUNCTION, _INDIRECT = 2, 10
_UNDEFINED = 0


class Symbol(NamedTuple):
    """A function or variable that a library gives to others."""

    value: int
    """Its address, if the library were loaded at 0."""

    size: int
    """Bytes."""

    function: bool
    """Whether it is code."""


class Symbols:
    """The dynamic symbols of one file; of several versions of a symbol, the last."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it can't be read."""
        self._data = path.read_bytes()
        self._table, self._names = self._sections()

    def _sections(self) -> tuple[bytes, bytes]:
        if len(self._data) < _HEADER.size or not self._data.startswith(b"\x7fELF"):
            return b"", b""
        offset, entry_size, count, _ = _HEADER.unpack_from(self._data)
        if entry_size != _SECTION.size or offset + count * entry_size > len(self._data):
            return b"", b""
        sections = [_SECTION.unpack_from(self._data, offset + at * entry_size) for at in range(count)]
        for _, kind, _, _, start, size, link, *_ in sections:
            if kind == _SHT_DYNSYM and link < count:
                names_start, names_size = sections[link][4:6]
                return self._data[start : start + size], self._data[names_start : names_start + names_size]
        return b"", b""

    def all(self) -> dict[str, Symbol]:
        """Every symbol that the file defines."""
        symbols = {}
        usable = len(self._table) - len(self._table) % _SYMBOL.size
        for name, info, _, section, value, size in _SYMBOL.iter_unpack(self._table[:usable]):
            if section != _UNDEFINED:
                end = self._names.find(b"\0", name)
                function = info & 15 in (_FUNCTION, _INDIRECT)
                symbols[self._names[name:end].decode(errors="replace")] = Symbol(value, size, function)
        return symbols

    def defines_function(self, name: str) -> bool:
        """Whether it gives others a function of this name."""
        if b"\0" + name.encode() + b"\0" not in self._names:
            return False
        symbol = self.all().get(name)
        return symbol is not None and symbol.function

    def find_code(self, code: bytes, start: int, size: int) -> int | None:
        """Returns where in the file's bytes [start, start + size) this code is."""
        found = self._data.find(code, start, start + size)
        return None if found < 0 else found
