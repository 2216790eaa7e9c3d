"""The Python programs of the demonstration. They know nothing of udedup.

``files FOLDER``: holds every library of a folder and the database beside it in memory.
``disk IMAGE``: holds the whole disk in one aligned area, as a virtual machine's page cache would.

Each prints ``loaded`` and then obeys lines on stdin: ``change`` changes a part of what it holds, ``verify`` prints the
SHA-256 of every item by name, as one line of JSON.
"""

import hashlib
import json
import mmap
import os
import sqlite3
import sys
from pathlib import Path
from typing import Protocol

from demo.content import DATABASE, changed_range

READ_BYTES = 1 << 20


class Held(Protocol):
    """What a worker holds."""

    def change(self) -> None:
        """Overwrites a few bytes of every item."""

    def digests(self) -> dict[str, str]:
        """Returns SHA-256 by name."""


class Files:
    """Files, each in a bytearray, and a database deserialized into memory."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, bytearray] = {}
        for path in sorted((folder / "lib").iterdir()):
            data = bytearray(path.stat().st_size)
            with path.open("rb") as file:
                if file.readinto(data) != len(data):
                    raise OSError(f"{path}: short read")
            self._files[f"lib/{path.name}"] = data
        self._database = sqlite3.connect(":memory:")
        self._database.deserialize((folder / DATABASE).read_bytes())

    def change(self) -> None:
        """Changes every file, in memory; the database stays as it is."""
        for name, data in self._files.items():
            start, new = changed_range(len(data), name)
            data[start : start + len(new)] = new

    def digests(self) -> dict[str, str]:
        """Returns SHA-256 of files by path in the image and of documents by key."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()}
        for name, data in self._database.execute("SELECT name, content FROM documents"):
            digests[name] = hashlib.sha256(data).hexdigest()
        return digests


class Disk:
    """A whole disk in anonymous memory."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = memoryview(self._memory)
        descriptor = os.open(path, os.O_RDONLY)
        for offset in range(0, size, READ_BYTES):
            part = view[offset : offset + READ_BYTES]
            if os.preadv(descriptor, [part], offset) != len(part):
                raise OSError(f"{path}: short read at {offset}")
        os.close(descriptor)

    def change(self) -> None:
        """Overwrites a few bytes of every mebibyte."""
        for offset in range(0, len(self._memory), READ_BYTES):
            start, new = changed_range(min(READ_BYTES, len(self._memory) - offset), f"disk-{offset}")
            self._memory[offset + start : offset + start + len(new)] = new

    def digests(self) -> dict[str, str]:
        """Returns SHA-256 of each mebibyte by its offset."""
        view = memoryview(self._memory)
        return {
            f"disk-{offset}": hashlib.sha256(view[offset : offset + READ_BYTES]).hexdigest()
            for offset in range(0, len(view), READ_BYTES)
        }


def main() -> None:
    """Loads, then obeys."""
    kind, place = sys.argv[1], Path(sys.argv[2])
    held: Held = Files(place) if kind == "files" else Disk(place)
    print("loaded", flush=True)
    for line in sys.stdin:
        if line.strip() == "change":
            held.change()
            print("changed", flush=True)
        else:
            print(json.dumps(held.digests()), flush=True)


if __name__ == "__main__":
    main()
