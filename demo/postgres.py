"""Debian's PostgreSQL as one of the programs: a session that holds files of the image in temporary tables.

Shared buffers are shared memory, which is not merged; what a session keeps in its temporary buffers is its own. Two
servers that load the same in the same order hold the same pages.
"""

import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from demo import content
from demo.content import Piece
from demo.image import Image
from demo.programs import LOAD_SECONDS, PipedProgram, compare
from udedup.errors import UdedupError

USER = "postgres"
FILES_BYTES = 48 << 20
"""Of the image's libraries, so many bytes are loaded."""

PER_CHANGE = 5


def server_binary(name: str) -> str:
    """Path of one of the server's programs. Raises UdedupError if there is no server."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not found:
        raise UdedupError("PostgreSQL is not installed: apt-get install postgresql")
    return str(found[-1])


class PostgresServer(PipedProgram):
    """A server of its own, and the session in it, spoken to through psql."""

    kind = "postgres"

    def __init__(self, name: str, prefix: Sequence[str], folder: Path, image: Image, run_folder: Path) -> None:
        """``folder``: the image's file system; user postgres must be able to read it."""
        self._files = _chosen(image)
        self.items = len(self._files)
        self._folder = run_folder / name
        self._folder.mkdir()
        shutil.chown(self._folder, USER, USER)
        account = pwd.getpwnam(USER)
        become = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        data = str(self._folder / "data")
        initialize = [server_binary("initdb"), "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "-D", data]
        done = subprocess.run([*become, *initialize], capture_output=True, text=True, check=False, cwd="/")
        if done.returncode:
            raise UdedupError(f"initdb failed: {done.stderr.strip().splitlines()[-1]}")
        options = ["listen_addresses=", f"unix_socket_directories={self._folder}", "shared_buffers=16MB", "fsync=off"]
        options += [f"temp_buffers={2 * FILES_BYTES >> 10}kB", "autovacuum=off"]
        settings = [word for option in options for word in ("-c", option)]
        with (run_folder / f"{name}.log").open("wb") as log:
            self._server = subprocess.Popen(
                [*prefix, *become, server_binary("postgres"), "-D", data, *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        try:
            self._wait_serving()
            super().__init__(
                name, (), ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", USER, "-h", str(self._folder)]
            )
            (pid,) = self._ask("SELECT pg_backend_pid();")
            self._session_pid = int(pid)
            self._tell("CREATE TEMP TABLE files (name text PRIMARY KEY, content bytea);")
            # Compressed they would fit nobody's.
            self._tell("ALTER TABLE files ALTER content SET STORAGE EXTERNAL;")
            for piece in self._files:
                self._tell(
                    f"INSERT INTO files VALUES ({_quoted(piece.name)},"
                    f" pg_read_binary_file({_quoted(str(folder / piece.name))}));"
                )
        except BaseException:
            self._server.kill()
            raise

    def _wait_serving(self) -> None:
        deadline = time.monotonic() + LOAD_SECONDS
        while subprocess.run(["pg_isready", "-q", "-h", str(self._folder)], check=False).returncode:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._folder.name} does not serve")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The session's process, a child of the server."""
        return self._session_pid

    def _ask(self, *lines: str) -> list[str]:
        return self.ask_until_mark("\\echo", *lines)

    def wait_loaded(self) -> None:
        (count,) = self._ask("SELECT count(*) FROM files;")
        if int(count) != self.items:
            raise RuntimeError(f"{self.name} holds {count} of {self.items} files")

    def change(self) -> None:
        statements = []
        for piece in self._files[::PER_CHANGE]:
            start, new = content.changed_range(piece.size, piece.name)
            statements.append(
                f"UPDATE files SET content = overlay(content placing '\\x{new.hex()}' from {start + 1})"
                f" WHERE name = {_quoted(piece.name)};"
            )
        self._ask("BEGIN;", *statements, "COMMIT;")

    def wrong(self, *, changed: bool) -> list[str]:
        others = {piece.name for piece in self._files[::PER_CHANGE]} if changed else set()
        expected = {piece.name: piece.changed_sha256 if piece.name in others else piece.sha256 for piece in self._files}
        rows = self._ask("SELECT encode(sha256(content), 'hex') || ' ' || name FROM files;")
        return compare(self.name, expected, {name: digest for digest, _, name in (row.partition(" ") for row in rows)})

    def stop(self) -> None:
        super().stop()
        self._server.send_signal(signal.SIGINT)
        if self._server.wait(LOAD_SECONDS):
            raise RuntimeError(f"{self.name}: the server ended with {self._server.returncode}")

    def kill(self) -> None:
        super().kill()
        self._server.kill()
        self._server.wait()


def _chosen(image: Image) -> list[Piece]:
    chosen: list[Piece] = []
    for piece in image.files:
        if sum(each.size for each in chosen) + piece.size <= FILES_BYTES:
            chosen.append(piece)
    return chosen


def _quoted(text: str) -> str:
    escaped = text.replace("'", "''")
    return f"'{escaped}'"
