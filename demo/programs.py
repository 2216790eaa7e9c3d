"""The programs that run: each kind knows when it has loaded, how to change its data, and how to check it."""

import json
import shlex
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from demo import content
from demo.content import DATABASE, DUMP, Piece
from demo.image import Image
from demo.redis_client import RedisClient
from demo.worker import READ_BYTES

END_SECONDS = 20.0
LOAD_SECONDS = 60.0
MARK = "--done--"


class Program(ABC):
    """A running program and the data it must hold."""

    kind: str
    """For people."""

    items: int
    """How many contents it holds that are checked one by one."""

    name: str
    """Of this one."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The program's process: `udedup run` becomes it."""

    @abstractmethod
    def wait_loaded(self) -> None:
        """Returns once the program holds all its data."""

    @abstractmethod
    def change(self) -> None:
        """Has the program overwrite a part of its data."""

    @abstractmethod
    def wrong(self, *, changed: bool) -> list[str]:
        """Returns a line for each item whose content is not what it must be, before or after ``change``."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the program as its kind is ended, with status 0, or raises RuntimeError."""

    @abstractmethod
    def kill(self) -> None:
        """Ends the program in any case."""


class PipedProgram(Program):
    """A program that is spoken to over pipes."""

    def __init__(self, name: str, prefix: Sequence[str], command: Sequence[str]) -> None:
        """Starts ``command`` behind ``prefix`` (``udedup run …`` or nothing)."""
        self.name = name
        self._process = subprocess.Popen(
            [*prefix, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._expect_end(0)

    def _expect_end(self, status: int) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._process.wait(END_SECONDS) != status:
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}, not {status}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def ask_until_mark(self, echo: str, *lines: str) -> list[str]:
        """Sends lines to a shell that has a command, ``echo``, to print a word; returns the lines of the answer."""
        for line in lines:
            self._tell(line)
        self._tell(f"{echo} {MARK}")
        return list(iter(self._read_line, MARK))

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early, with status {self._process.wait(END_SECONDS)}")
        return line.rstrip("\n")


def compare(name: str, expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Returns a line for each digest that is missing, too many or different."""
    wrong = [item for item in expected.keys() | found.keys() if expected.get(item) != found.get(item)]
    return [f"{name}: {item}: wrong content" for item in sorted(wrong)]


class _Worker(PipedProgram):
    """A Python program of demo/worker.py."""

    expected: dict[bool, dict[str, str]]
    """Digests by item, before (False) and after (True) the change."""

    def wait_loaded(self) -> None:
        self._read_line()

    def change(self) -> None:
        self._tell("change")
        self._read_line()

    def wrong(self, *, changed: bool) -> list[str]:
        self._tell("verify")
        return compare(self.name, self.expected[changed], json.loads(self._read_line()))


class FilesWorker(_Worker):
    """Holds the image's files and its database."""

    kind = "python, files"

    def __init__(self, name: str, prefix: Sequence[str], folder: Path, image: Image) -> None:
        documents = {piece.name: piece.sha256 for piece in image.documents}
        self.expected = {
            False: {piece.name: piece.sha256 for piece in image.files} | documents,
            True: {piece.name: piece.changed_sha256 for piece in image.files} | documents,
        }
        self.items = len(self.expected[False])
        super().__init__(name, prefix, [sys.executable, "-m", "demo.worker", "files", str(folder)])


class DiskWorker(_Worker):
    """Holds the raw image."""

    kind = "python, disk"

    def __init__(self, name: str, prefix: Sequence[str], disk: Path, image: Image) -> None:
        pieces = list(_disk_pieces(Path(image.path)))
        self.expected = {
            False: {piece.name: piece.sha256 for piece in pieces},
            True: {piece.name: piece.changed_sha256 for piece in pieces},
        }
        self.items = len(pieces)
        super().__init__(name, prefix, [sys.executable, "-m", "demo.worker", "disk", str(disk)])


def _disk_pieces(path: Path) -> Iterator[Piece]:
    """The raw image as the disk, not the mount, has it."""
    with path.open("rb") as file:
        for number, data in enumerate(iter(lambda: file.read(READ_BYTES), b"")):
            yield content.describe(f"disk-{number * READ_BYTES}", data)


class SqliteShell(PipedProgram):
    """Debian's sqlite3 with the database in memory."""

    kind = "sqlite3"
    _PER_CHANGE = 7  # every seventh row is changed

    def __init__(self, name: str, prefix: Sequence[str], folder: Path, image: Image) -> None:
        self._image = image
        self.items = len(image.documents)
        self._changed = {piece.name for piece in image.documents[:: self._PER_CHANGE]}
        super().__init__(name, prefix, ["sqlite3", "-batch"])
        self._tell(f".open --deserialize {shlex.quote(str(folder / DATABASE))}")

    def _ask(self, *lines: str) -> list[str]:
        return self.ask_until_mark(".print", *lines)

    def wait_loaded(self) -> None:
        self._ask("SELECT count(*) FROM documents;")

    def change(self) -> None:
        statements = []
        for piece in self._image.documents[:: self._PER_CHANGE]:
            start, new = content.changed_range(piece.size, piece.name)
            name = piece.name.replace("'", "''")
            statements.append(
                f"UPDATE documents SET content = CAST(substr(content, 1, {start}) || X'{new.hex()}' "
                f"|| substr(content, {start + len(new) + 1}) AS BLOB) WHERE name = '{name}';"
            )
        self._ask("BEGIN;", *statements, "COMMIT;")

    def wrong(self, *, changed: bool) -> list[str]:
        expected = {
            piece.name: piece.changed_sha3 if changed and piece.name in self._changed else piece.sha3
            for piece in self._image.documents
        }
        rows = self._ask("SELECT lower(hex(sha3(content, 256))) || ' ' || name FROM documents;")
        found = {name: digest for digest, _, name in (row.partition(" ") for row in rows)}
        return compare(self.name, expected, found)


class RedisServer(PipedProgram):
    """Debian's redis-server with the dump loaded."""

    kind = "redis-server"
    _PER_CHANGE = 5

    def __init__(self, name: str, prefix: Sequence[str], folder: Path, image: Image, run_folder: Path) -> None:
        self._image = image
        self.items = len(image.documents)
        self._socket = run_folder / f"{name}.socket"
        dump = folder / DUMP
        options = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", "--logfile", str(run_folder / name)]
        super().__init__(name, prefix, ["redis-server", *options, "--dir", str(dump.parent), "--dbfilename", dump.name])

    def wait_loaded(self) -> None:
        deadline = time.monotonic() + LOAD_SECONDS
        while not self._loaded():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not load its data")
            time.sleep(0.05)

    def _loaded(self) -> bool:
        try:
            client = RedisClient(self._socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        with client:
            return b"\r\nloading:0\r\n" in (client.call(b"INFO", b"persistence") or b"")

    def change(self) -> None:
        with RedisClient(self._socket) as client:
            for piece in self._image.documents[:: self._PER_CHANGE]:
                start, new = content.changed_range(piece.size, piece.name)
                client.call(b"SETRANGE", piece.name.encode(), b"%d" % start, new)

    def wrong(self, *, changed: bool) -> list[str]:
        changed_names = {piece.name for piece in self._image.documents[:: self._PER_CHANGE]} if changed else set()
        expected = {
            piece.name: piece.changed_sha256 if piece.name in changed_names else piece.sha256
            for piece in self._image.documents
        }
        with RedisClient(self._socket) as client:
            names = {name: client.call(b"GET", name.encode()) for name in expected}
            found = {name: content.sha256(value) for name, value in names.items() if value is not None}
            if int(client.call(b"DBSIZE") or 0) != len(expected):
                return [f"{self.name}: not {len(expected)} keys"]
        return compare(self.name, expected, found)

    def stop(self) -> None:
        self._process.terminate()
        self._expect_end(0)


def start_all(prefix: Sequence[str], disk: Path, folder: Path, image: Image, run_folder: Path) -> list[Program]:
    """Starts two or three programs of each kind, all or none."""
    with ExitStack() as undo:
        programs: list[Program] = []

        def add(program: Program) -> None:
            undo.callback(program.kill)
            programs.append(program)

        for number in (1, 2):
            add(DiskWorker(f"disk{number}", prefix, disk, image))
            add(FilesWorker(f"files{number}", prefix, folder, image))
            add(SqliteShell(f"sqlite{number}", prefix, folder, image))
        for number in (1, 2, 3):
            add(RedisServer(f"redis{number}", prefix, folder, image, run_folder))
        undo.pop_all()
        return programs
