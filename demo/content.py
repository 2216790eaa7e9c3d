"""What the programs hold: files of this machine, and documents for a database and a key-value store.

Checksums are taken here, from the original files, before anything of udedup is involved.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

DATABASE = "data/documents.sqlite"
DUMP = "data/documents.rdb"
"""Paths in the image of the SQLite database and the Redis dump that hold the documents."""

LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/gcc", "/usr/lib/python3.11", "/usr/bin")
DOCUMENT_FOLDERS = ("/usr/share/doc", "/usr/share/perl", "/usr/lib/python3", "/usr/share", "/usr/include")
LIBRARY_BYTES = 128 << 20
DOCUMENT_BYTES = 32 << 20
LIBRARY_SIZES = range(64 << 10, 32 << 20)
DOCUMENT_SIZES = range(2 << 10, 64 << 10)
CHANGED_BYTES = 64
"""How much of a file or document a change overwrites."""


@frozen
class Piece:
    """One file or document, and how to check it."""

    name: str
    """Path in the image, or key of the document."""

    size: int
    """Bytes."""

    sha256: str
    """Of the content, in hex."""

    sha3: str
    """SHA3-256 of the content, in hex: the one digest the sqlite3 shell has."""

    changed_sha256: str
    """``sha256`` after ``change``."""

    changed_sha3: str
    """``sha3`` after ``change``."""


def change(content: bytes, name: str) -> bytes:
    """Returns the content as the programs are to have changed it: a few bytes at a place that depends on the name."""
    start, new = changed_range(len(content), name)
    return content[:start] + new + content[start + len(new) :]


def changed_range(size: int, name: str) -> tuple[int, bytes]:
    """Returns where the change of a content of ``size`` bytes starts, and the bytes that go there."""
    digest = hashlib.sha256(name.encode()).digest()
    length = min(CHANGED_BYTES, size)
    return int.from_bytes(digest[:8], "little") % (size - length + 1), (digest + digest[::-1])[:length]


def sha256(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def describe(name: str, content: bytes) -> Piece:
    """Takes all checksums of one content."""
    changed = change(content, name)
    return Piece(
        name=name,
        size=len(content),
        sha256=sha256(content),
        sha3=hashlib.sha3_256(content).hexdigest(),
        changed_sha256=sha256(changed),
        changed_sha3=hashlib.sha3_256(changed).hexdigest(),
    )


def libraries() -> Iterator[tuple[Path, bytes]]:
    """Programs and libraries of this machine, path by path, up to LIBRARY_BYTES."""
    return _files(LIBRARY_FOLDERS, LIBRARY_SIZES, LIBRARY_BYTES)


def documents() -> Iterator[tuple[Path, bytes]]:
    """Smaller files of this machine, as the rows of a database or the values of a store, up to DOCUMENT_BYTES."""
    return _files(DOCUMENT_FOLDERS, DOCUMENT_SIZES, DOCUMENT_BYTES)


def _files(folders: tuple[str, ...], sizes: range, limit: int) -> Iterator[tuple[Path, bytes]]:
    total = 0
    seen: set[Path] = set()
    for path in (path for folder in folders for path in _walk(Path(folder))):
        state = path.lstat()
        if path in seen or not stat.S_ISREG(state.st_mode) or state.st_size not in sizes:
            continue
        seen.add(path)
        if total + state.st_size > limit:
            return
        content = path.read_bytes()
        total += len(content)
        yield path, content


def _walk(folder: Path) -> Iterator[Path]:
    for current, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield Path(current) / name
