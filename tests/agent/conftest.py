"""Compiling the helpers of these tests, one engine for all that need none of their own, programs under the agent."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.engine import Engine, start_engine
from support.ledger import Ledger

REPOSITORY = Path(__file__).parents[2]
LIBRARY = REPOSITORY / "udedup" / "libudedup.so"
PROGRAM_SECONDS = 20.0
"""How long a helper program may take; those that wait for something give up earlier, and say for what."""


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles C with warnings as errors; each set of arguments once."""
    folder = tmp_path_factory.mktemp("compiled")
    made: dict[tuple[str, ...], Path] = {}

    def compile_once(*arguments: str | Path) -> Path:
        key = tuple(map(str, arguments))
        if key not in made:
            program = folder / f"{Path(key[0]).stem}-{len(made)}"
            warnings = ("-Wall", "-Wextra", "-Werror")
            command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", *warnings, *key, "-o", str(program)]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made[key] = program
        return made[key]

    return compile_once


@attrs.frozen
class Wrapper:
    """Runs programs with the agent of one engine, or without any."""

    engine: Engine | None
    """None: programs run bare."""

    ledger: Ledger

    def environment(self, **extra: str) -> dict[str, str]:
        """What ``udedup run`` would set, without the time it takes."""
        if self.engine is None:
            return {**os.environ, **extra}
        return {**os.environ, "LD_PRELOAD": str(LIBRARY), "UDEDUP_SOCKET": str(self.engine.socket), **extra}

    def start(
        self, *argv: str | Path, extra: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[str]":
        """Starts a program; ``options`` are Popen's."""
        process = subprocess.Popen([*map(str, argv)], env=self.environment(**(extra or {})), text=True, **options)
        self.ledger.add_process(process.pid)
        return process

    def run(
        self, *argv: str | Path, extra: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a program to its end. One that does not end is killed, and fails the test with what it printed."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(*argv, extra=extra, start_new_session=True, **pipes, **options)
        try:
            output, errors = process.communicate(timeout=PROGRAM_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children hold the pipes, too
            output, errors = process.communicate(timeout=PROGRAM_SECONDS)
            pytest.fail(f"{argv[1:]} hangs; it printed {output!r}, {errors!r}", pytrace=False)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def check(self, *argv: str | Path, **options: Any) -> str:
        """Runs a program that must succeed; returns what it printed."""
        done = self.run(*argv, **options)
        status = done.returncode
        ended = signal.Signals(-status).name if status < 0 else f"status {status}"
        if status:
            pytest.fail(f"{' '.join(map(str, argv[1:]))}: {ended}: {done.stderr}", pytrace=False)
        return done.stdout


@contextmanager
def lasting_engine(folder: Path, pytestconfig: pytest.Config, name: str, **options: Any) -> Iterator[Engine]:
    """An engine for several tests, without a limit on its rate; ``options`` are start_engine's.

    It has a ledger of its own, called after ``name``, because the common one is swept after every test.
    """
    assert pytestconfig.cache is not None
    base = pytestconfig.cache.mkdir(f"udedup-ledger-{name}")
    Ledger.sweep_earlier(base)
    ledger = Ledger.of_this_run(base)
    engine = start_engine(folder, ledger, "--sleep-millisecs", "0", **options)
    yield engine
    status = engine.stop()
    assert engine.process.stdout is not None
    engine.process.stdout.close()
    ledger.close()
    assert status == 0, engine.log.read_text()


@pytest.fixture(scope="session")
def shared_engine(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Engine]:
    """An engine for all tests that only need one to be there."""
    with lasting_engine(tmp_path_factory.mktemp("shared"), pytestconfig, "agent", mount=False) as engine:
        yield engine


@pytest.fixture
def wrapped(shared_engine: Engine, ledger: Ledger) -> Wrapper:
    """Runs programs under the shared engine."""
    assert shared_engine.process.poll() is None, shared_engine.log.read_text()
    return Wrapper(shared_engine, ledger)


@pytest.fixture
def bare(ledger: Ledger) -> Wrapper:
    """Runs programs without an agent."""
    return Wrapper(None, ledger)
