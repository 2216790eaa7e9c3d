"""Programs that run already, and an engine for all of them."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from agent.conftest import compile_c, lasting_engine
from support.engine import Engine
from support.ledger import Ledger

from udedup.attach.session import Held
from udedup.attach.session import attach as attach_process
from udedup.attach.session import detach as detach_process
from udedup.commands.host import agent_library
from udedup.errors import UdedupError

__all__ = ["compile_c"]

T = TypeVar("T")
PATIENCE_SECONDS = 60.0
PROGRAMS = Path(__file__).parent / "programs"


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A folder that other users can reach, also while another run of tests closes pytest's own."""
    with tempfile.TemporaryDirectory(prefix="attached-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """:func:`folder_for_all`."""
    with folder_for_all() as folder:
        yield folder


@pytest.fixture(scope="session")
def attached_engine(pytestconfig: pytest.Config) -> Iterator[Engine]:
    """An engine that programs of all users can join."""
    with folder_for_all() as folder, lasting_engine(folder, pytestconfig, "attach", mount=False) as engine:
        engine.socket.chmod(0o666)
        yield engine


@pytest.fixture
def attach(attached_engine: Engine) -> Callable[..., Held]:
    """Attaches a process to the engine, as the command does, without the time that takes."""

    def attach_now(pid: int, *, library: Path | None = None, label: str | None = None) -> Held:
        agent, socket = library or agent_library(), attached_engine.socket
        return patiently(lambda: attach_process(pid, agent, socket, label, quiet=False, keep_ksm=False))

    return attach_now


def detach(pid: int, library: Path | None = None) -> Held:
    """Detaches a process, as the command does."""
    return patiently(lambda: detach_process(pid, library or agent_library()))[0]


def patiently(action: Callable[[], T]) -> T:
    """Tries again where the program says so, which it does when the machine is very busy."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return action()
        except UdedupError as error:
            if not str(error).endswith("try again") or time.monotonic() > deadline:
                raise


@pytest.fixture
def start(ledger: Ledger) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts programs that say ``ready`` on a line and end when their input does; ``options`` are Popen's."""
    started: list[subprocess.Popen[str]] = []

    def start_now(*argv: str | Path, **options: Any) -> "subprocess.Popen[str]":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*map(str, argv)], text=True, **(pipes | options))
        started.append(process)
        ledger.add_process(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate(timeout=20)
        return process

    yield start_now
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def end_in_order(process: "subprocess.Popen[str]", seconds: float = 60.0) -> str:
    """Ends a program's input, and returns what it has printed. Fails the test if it found anything wrong."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, (process.returncode, output, errors)
    return output
