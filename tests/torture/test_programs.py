"""Real programs do the same wrapped as unwrapped, with an engine at full speed, and when it is killed in the middle."""

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
from support.engine import Engine

PROGRAM_SECONDS = 540
STRESS_SECONDS = 5
MERGE_SECONDS = 3.0
"""How long data rests so that it is merged, s."""

READY_SECONDS = 20.0
CPYTHON = "/usr/bin/python3"
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

pytestmark = [pytest.mark.require("userfaultfd-move"), pytest.mark.timeout(2 * PROGRAM_SECONDS + 60)]


@attrs.frozen
class Program:
    """A program that checks its own memory and ends with 0 if all is well."""

    name: str
    """For people."""
    argv: tuple[str, ...]
    """The command."""
    needs: str
    """Capability of the machine."""

    def run(self, folder: Path) -> "subprocess.CompletedProcess[str]":
        """Runs it to its end without an agent."""
        return subprocess.run(
            self.argv,
            cwd=folder,
            env=os.environ | {"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PROGRAM_SECONDS,
            check=False,
        )


def stressor(name: str, *options: str) -> Program:
    """A stressor of stress-ng that verifies what it does."""
    argv = ("stress-ng", f"--{name}", "2", *options, "--verify", "--timeout", str(STRESS_SECONDS))
    return Program(f"stress-ng-{name}", argv, "stress-ng")


def cpython(name: str) -> Program:
    """A part of CPython's own tests."""
    return Program(name, (CPYTHON, "-m", "test", "--timeout", "300", name), "cpython-tests")


PROGRAMS = (
    stressor("vm", "--vm-bytes", "128M"),
    stressor("mmap", "--mmap-bytes", "64M"),
    stressor("mremap", "--mremap-bytes", "32M"),
    stressor("malloc", "--malloc-bytes", "64M"),
    stressor("brk"),
    stressor("fork"),
    stressor("madvise"),
    stressor("userfaultfd", "--userfaultfd-bytes", "16M"),
    Program("memtester", ("memtester", "64M", "1"), "memtester"),
    Program("redis-test-memory", ("redis-server", "--test-memory", "64"), "redis"),
    cpython("test_mmap"),
    cpython("test_subprocess"),
    cpython("test_multiprocessing_fork"),
    cpython("test_io"),
)

QUERIES = """
PRAGMA mmap_size = 268435456;
PRAGMA cache_size = -65536;
CREATE TABLE word (id INTEGER PRIMARY KEY, text TEXT, twin TEXT);
WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 120000)
INSERT INTO word SELECT n, hex(n * 2654435761 % 4294967296), printf('%0100d', n / 64) FROM number;
CREATE INDEX by_text ON word (text);
UPDATE word SET text = text || 'x' WHERE id % 7 = 0;
DELETE FROM word WHERE id % 11 = 0;
SELECT count(*), sum(length(text)), min(text), max(text), sum(id) FROM word;
PRAGMA integrity_check;
VACUUM;
SELECT count(*), sum(unicode(substr(text, 3, 1)) * id) FROM word;
PRAGMA integrity_check;
"""


def outcome(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit status and output of a wrapped program, once it has ended."""
    try:
        output, _ = process.communicate(timeout=PROGRAM_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"wrapped, it does not end:\n{output[-4000:]}", pytrace=False)
    return process.returncode, output


def wrap(engine: Engine, argv: tuple[str, ...], folder: Path) -> "subprocess.Popen[str]":
    """Starts a program under the engine, in a process group of its own."""
    process: subprocess.Popen[str] = engine.wrap(
        *argv,
        cwd=folder,
        env=os.environ | {"PATH": PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process


def judge(program: Program, status: int, output: str, folder: Path) -> None:
    """Fails the test unless the program ended well, or ends just as badly on its own."""
    if status == 0:
        return
    alone = program.run(folder)
    if alone.returncode == status:
        pytest.xfail(f"{program.name} ends with {status} unwrapped, too: {alone.stdout[-400:]}")
    pytest.fail(f"wrapped, it ends with {status}, unwrapped with {alone.returncode}:\n{output[-6000:]}", pytrace=False)


@pytest.mark.parametrize("program", [pytest.param(p, id=p.name, marks=pytest.mark.require(p.needs)) for p in PROGRAMS])
def test_a_program_passes_as_it_does_unwrapped(program: Program, engine: Engine, tmp_path: Path) -> None:
    status, output = outcome(wrap(engine, program.argv, tmp_path))
    judge(program, status, output, tmp_path)
    assert engine.process.poll() is None, f"the engine did not survive: {engine.log.read_text()}"


SURVIVORS = tuple(p for p in PROGRAMS if p.name in {"stress-ng-vm", "stress-ng-fork", "memtester", "test_mmap"})


@pytest.mark.parametrize("program", [pytest.param(p, id=p.name, marks=pytest.mark.require(p.needs)) for p in SURVIVORS])
def test_a_program_passes_if_the_engine_is_killed(program: Program, engine: Engine, tmp_path: Path) -> None:
    process = wrap(engine, program.argv, tmp_path)
    time.sleep(STRESS_SECONDS / 2)
    engine.process.kill()
    status, output = outcome(process)
    judge(program, status, output, tmp_path)


@pytest.mark.require("sqlite3")
@pytest.mark.parametrize("database", [":memory:", "words.db"])
def test_sqlite_answers_as_it_does_unwrapped(database: str, engine: Engine, tmp_path: Path) -> None:
    script = tmp_path / "script.sql"
    script.write_text(QUERIES)
    folders = [tmp_path / name for name in ("alone", "first", "second")]
    for folder in folders:
        folder.mkdir()
    argv = (
        "sqlite3",
        "-batch",
        "-cmd",
        ".bail on",
        database,
        f".read {script}",
        ".system sleep 2",
        f".read {script}.again",
    )
    (tmp_path / "script.sql.again").write_text(QUERIES.partition("CREATE INDEX")[2].partition(";")[2])
    alone = Program("sqlite3", argv, "sqlite3").run(folders[0])
    assert alone.returncode == 0, alone.stdout
    assert alone.stdout.count("ok\n") == 4, alone.stdout
    wrapped = [wrap(engine, argv, folder) for folder in folders[1:]]
    for process in wrapped:
        assert outcome(process) == (0, alone.stdout)


class Redis:
    """A redis-server that runs wrapped."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        folder.mkdir()
        self.socket = folder / "socket"
        self.process = wrap(
            engine,
            (
                "redis-server",
                *("--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder)),
                *("--save", "", "--enable-debug-command", "yes", "--logfile", str(folder / "log")),
            ),
            folder,
        )
        deadline = time.monotonic() + READY_SECONDS
        while not self.socket.exists():
            assert self.process.poll() is None, "redis-server ended"
            assert time.monotonic() < deadline, "redis-server does not get ready"
            time.sleep(0.05)

    def ask(self, *words: str) -> str:
        """Sends one command and returns the answer as redis-cli prints it."""
        command = ["redis-cli", "-e", "-s", str(self.socket), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def fill(self) -> None:
        """Loads data that is the same in every server."""
        self.ask("DEBUG", "POPULATE", "60000", "key", "300")
        for number in range(50):
            self.ask("SET", f"large:{number}", hashlib.sha256(str(number).encode()).hexdigest() * 512)

    def benchmark(self) -> None:
        """Writes and reads a lot."""
        command = [
            "redis-benchmark",
            "-s",
            str(self.socket),
            "-q",
            "-n",
            "20000",
            "-t",
            "set,get,lpush,hset",
            "-r",
            "1000",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PROGRAM_SECONDS)

    def save(self) -> None:
        """Writes a snapshot by a fork child and waits for its end."""
        self.ask("BGSAVE")
        deadline = time.monotonic() + PROGRAM_SECONDS
        while "rdb_bgsave_in_progress:1" in self.ask("INFO", "persistence"):
            assert time.monotonic() < deadline, "BGSAVE does not end"
            time.sleep(0.1)
        assert "rdb_last_bgsave_status:ok" in self.ask("INFO", "persistence")


@contextmanager
def two_servers(engine: Engine, folder: Path) -> Iterator[tuple[Redis, Redis]]:
    """Two servers with the same data, ended at the end; the digest of each is what it was when it was filled."""
    servers = Redis(engine, folder / "first"), Redis(engine, folder / "second")
    for server in servers:
        server.fill()
    yield servers
    for server in servers:
        server.process.terminate()
    for server in servers:
        assert outcome(server.process)[0] == 0


@pytest.mark.require("redis")
def test_redis_keeps_its_data(engine: Engine, tmp_path: Path) -> None:
    with two_servers(engine, tmp_path) as (first, second):
        digest = first.ask("DEBUG", "DIGEST")
        assert second.ask("DEBUG", "DIGEST") == digest
        engine.wait_until("merged", lambda status: status["pages_sharing"] > 1000)
        for server in (first, second):
            assert server.ask("DEBUG", "DIGEST") == digest
            server.save()
            server.ask("DEBUG", "RELOAD")
            assert server.ask("DEBUG", "DIGEST") == digest
        first.benchmark()
        digest = first.ask("DEBUG", "DIGEST")
        time.sleep(MERGE_SECONDS)
        first.save()
        first.ask("DEBUG", "RELOAD")
        assert first.ask("DEBUG", "DIGEST") == digest


@pytest.mark.require("redis")
def test_redis_keeps_its_data_if_the_engine_is_killed(engine: Engine, tmp_path: Path) -> None:
    with two_servers(engine, tmp_path) as (first, second):
        digest = first.ask("DEBUG", "DIGEST")
        engine.wait_until("merged", lambda status: status["pages_sharing"] > 1000)
        engine.process.kill()
        for server in (first, second):
            assert server.ask("DEBUG", "DIGEST") == digest
            server.save()
            server.ask("DEBUG", "RELOAD")
            assert server.ask("DEBUG", "DIGEST") == digest
            server.benchmark()
