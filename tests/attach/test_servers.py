"""Servers with clients that compare what they get with what they have written, while these are attached to."""

import hashlib
import pwd
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attach.conftest import detach
from support.engine import Engine
from support.ledger import Ledger

from demo.postgres import server_binary
from udedup.attach.session import Held
from udedup.commands.host import agent_library

KEYS = 600
START_SECONDS = 60.0

pytestmark = pytest.mark.require("userfaultfd-move", "root")

Attach = Callable[..., Held]


def value(key: int, version: int) -> bytes:
    """Some pages, the same for all servers as long as they have the same version."""
    return hashlib.sha512(f"{key} {version}".encode()).digest() * 128


class RedisClient:
    """Speaks to one server, and remembers what it has written there."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + START_SECONDS
        while self._socket.connect_ex(str(path)) != 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self._file = self._socket.makefile("rb")
        self._versions = dict.fromkeys(range(KEYS), 0)

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _ask(self, *words: bytes) -> bytes:
        parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)]
        self._socket.sendall(b"".join(parts))
        answer = self._file.readline()
        if not answer.startswith(b"$"):
            return answer
        size = int(answer[1:])
        return self._file.read(size + 2)[:-2]

    def write(self, key: int) -> None:
        assert self._ask(b"SET", b"%d" % key, value(key, self._versions[key])) == b"+OK\r\n"

    def change(self, key: int) -> None:
        self._versions[key] += 1
        self.write(key)

    def check(self, key: int) -> None:
        assert self._ask(b"GET", b"%d" % key) == value(key, self._versions[key]), f"key {key} has changed"

    def fill(self) -> None:
        for key in self._versions:
            self.write(key)

    def check_all(self) -> None:
        for key in self._versions:
            self.check(key)


@contextmanager
def busy(client: RedisClient, seed: int) -> Iterator[None]:
    """Reads and writes all the time, in a thread; what it finds wrong is raised at the end."""
    over = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        dice = random.Random(seed)
        try:
            while not over.is_set():
                for _ in range(8):
                    client.check(dice.randrange(KEYS))
                client.change(dice.randrange(KEYS // 10))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures, failures


@pytest.mark.require("redis")
def test_redis(tmp_path: Path, ledger: Ledger, attach: Attach, attached_engine: Engine) -> None:
    servers, clients = [], []
    for name in "ab":
        options = ["--port", "0", "--unixsocket", str(tmp_path / name), "--save", "", "--dir", str(tmp_path)]
        servers.append(subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL))
        ledger.add_process(servers[-1].pid)
        clients.append(RedisClient(tmp_path / name))
        clients[-1].fill()
    pids = {server.pid for server in servers}
    with busy(clients[0], 1), busy(clients[1], 2):
        for turn in range(3):
            for pid in pids:
                attach(pid)
            if turn == 0:
                shared = lambda status: {a["pid"] for a in status["agents"] if a["pages_sharing"] > KEYS} >= pids  # noqa: E731
                attached_engine.wait_until("sharing", shared)
            for pid in pids:
                detach(pid)
    for client, server in zip(clients, servers, strict=True):
        client.check_all()
        client.close()
        server.terminate()
        assert server.wait(20) == 0


@contextmanager
def postgres(folder: Path, ledger: Ledger) -> Iterator[Path]:
    """A server of user postgres, until the end of the block; yields the folder of its socket."""
    account = pwd.getpwnam("postgres")
    home = folder / "postgres"
    home.mkdir()
    shutil.chown(home, account.pw_uid, account.pw_gid)
    become = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    data = str(home / "data")
    initialize = [server_binary("initdb"), "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "-D", data]
    subprocess.run([*become, *initialize], stdout=subprocess.DEVNULL, check=True, cwd="/")
    options = ["listen_addresses=", f"unix_socket_directories={home}", "shared_buffers=16MB", "fsync=off"]
    settings = [word for option in options for word in ("-c", option)]
    server = subprocess.Popen(
        [*become, server_binary("postgres"), "-D", data, *settings], stderr=subprocess.DEVNULL, cwd="/"
    )
    ledger.add_process(server.pid)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (home / ".s.PGSQL.5432").exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield home
    finally:
        # Without waiting for sessions, where the test has failed.
        server.send_signal(signal.SIGINT)
        server.wait(20)


def test_postgres(open_folder: Path, ledger: Ledger, attach: Attach) -> None:
    """The process of a session, which has its rows in memory of its own, between and during queries."""
    library = open_folder / "libudedup.so"
    shutil.copy(agent_library(), library)
    library.chmod(0o755)
    with postgres(open_folder, ledger) as home:
        command = ["psql", "-h", str(home), "-U", "postgres", "-d", "postgres", "-qAtX"]
        session = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ledger.add_process(session.pid)
        assert session.stdin is not None
        assert session.stdout is not None

        def begin(query: str) -> None:
            print(query, file=session.stdin, flush=True)

        def answer() -> str:
            return session.stdout.readline().strip()  # type: ignore[union-attr]

        begin("SELECT pg_backend_pid();")
        pid = int(answer())
        rows = "SELECT number, repeat(md5(number::text), 60) AS text FROM generate_series(1, 4000) AS number"
        begin(f"CREATE TEMPORARY TABLE kept AS {rows};")
        wanted = hashlib.md5("".join(row_text(number) for number in range(1, 4001)).encode()).hexdigest()
        for _ in range(4):
            begin("SELECT md5(string_agg(text, '' ORDER BY number)) FROM kept;")
            attach(pid, library=library)
            assert answer() == wanted
            begin("SELECT md5(string_agg(text, '' ORDER BY number)) FROM kept;")
            detach(pid, library)
            assert answer() == wanted
        session.communicate(timeout=20)
        assert session.returncode == 0


def row_text(number: int) -> str:
    """What a row has, computed without the server."""
    return hashlib.md5(str(number).encode()).hexdigest() * 60
