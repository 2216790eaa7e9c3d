"""Builds the disk image, an ext4 file system with libraries, a SQLite database and a Redis dump, unless it is there."""

import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

import msgspec
from attrs import frozen

from demo import content
from demo.content import DATABASE, DUMP, Piece
from demo.redis_client import RedisClient

BLOCK_BYTES = 4096
_SPARE = 1.15  # inode tables and the like, and what mke2fs keeps back


@frozen
class Image:
    """The finished image and what must be in it."""

    path: str
    """The raw disk image, absolute."""

    size: int
    """Bytes, a whole number of blocks."""

    files: tuple[Piece, ...]
    """The libraries, by path in the image."""

    documents: tuple[Piece, ...]
    """The rows of the database and, equally, the values of the Redis dump."""

    database_bytes: int
    """Size of the database file."""


def build(folder: Path) -> Image:
    """Returns the image kept below ``folder``, which is built first if it is not there."""
    folder = folder / "main-job"
    description = folder / "image.json"
    if not description.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix="udedup-demo-") as tree:
            image = _build(folder / "disk.img", Path(tree))
        # Last, so that a build that was interrupted is not taken for a finished one.
        description.write_bytes(msgspec.json.encode(image))
    return msgspec.json.decode(description.read_bytes(), type=Image)


def _build(path: Path, tree: Path) -> Image:
    (tree / "lib").mkdir()
    (tree / "data").mkdir()
    files = []
    for source, data in content.libraries():
        name = "lib/" + str(source).strip("/").replace("/", "-")
        (tree / name).write_bytes(data)
        files.append(content.describe(name, data))
    documents = {str(source): data for source, data in content.documents()}
    _build_database(tree / DATABASE, documents)
    _build_dump(tree / DUMP, documents)

    used = sum(-(-entry.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES for entry in tree.rglob("*"))
    size = int(used * _SPARE) // BLOCK_BYTES * BLOCK_BYTES
    with path.open("wb") as file:
        file.truncate(size)
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    mke2fs = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-O", "^has_journal", "-m", "0"]
    subprocess.run([*mke2fs, "-d", str(tree), str(path)], check=True, env=environment)
    return Image(
        path=str(path.absolute()),
        size=size,
        files=tuple(files),
        documents=tuple(content.describe(name, data) for name, data in documents.items()),
        database_bytes=(tree / DATABASE).stat().st_size,
    )


def _build_database(path: Path, documents: dict[str, bytes]) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE documents (name TEXT PRIMARY KEY, content BLOB NOT NULL)")
        database.executemany("INSERT INTO documents VALUES (?, ?)", documents.items())


def _build_dump(path: Path, documents: dict[str, bytes]) -> None:
    """Has a real server write the dump, as it would be found on a disk."""
    with tempfile.TemporaryDirectory(prefix="udedup-demo-") as name:
        folder = Path(name)
        socket = folder / "socket"
        options = ["--port", "0", "--unixsocket", str(socket), "--dir", name, "--dbfilename", path.name, "--save", ""]
        server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        try:
            while not socket.exists():
                time.sleep(0.05)
            with RedisClient(socket) as client:
                for key, value in documents.items():
                    client.call(b"SET", key.encode(), value)
                client.call(b"SAVE")
        finally:
            server.terminate()
            server.wait()
        shutil.move(folder / path.name, path)
