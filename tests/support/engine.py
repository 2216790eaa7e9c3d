"""Real engines and wrapped programs for tests, each on its own socket and mount."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from support.ledger import Ledger

READY_SECONDS = 30.0
END_SECONDS = 20.0
UDEDUP = (sys.executable, "-m", "udedup")
"""The command under test, as this interpreter has it."""


class Engine:
    """An engine process that serves."""

    def __init__(
        self, process: "subprocess.Popen[str]", socket: Path, mount: Path | None, log: Path, ledger: Ledger
    ) -> None:
        self.process = process
        self.socket = socket
        self.mount = mount
        self.log = log
        self._ledger = ledger

    @property
    def pid(self) -> int:
        """The engine's process."""
        return self.process.pid

    def wrap(
        self,
        *argv: str | Path,
        domain: str | None = None,
        quiet: bool = False,
        prefix: Sequence[str] = (),
        **options: Any,
    ) -> "subprocess.Popen[Any]":
        """Starts a program under ``udedup run`` with this engine; ``prefix``: words before; ``options`` are Popen's."""
        own = [*(() if domain is None else ("--domain", domain)), *(("--quiet-breaks",) if quiet else ())]
        command = [*prefix, *UDEDUP, "run", "--socket", str(self.socket), *own, "--", *map(str, argv)]
        process = subprocess.Popen(command, **options)
        self._ledger.add_process(process.pid)
        return process

    def command(self, *argv: str | Path, timeout: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Runs ``udedup SUBCOMMAND --socket …`` to its end and returns it with what it printed."""
        command = [*UDEDUP, str(argv[0]), "--socket", str(self.socket), *map(str, argv[1:])]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    def status(self) -> dict[str, Any]:
        """Returns what ``udedup status --json`` prints."""
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def wait_until(self, what: str, reached: Callable[[dict[str, Any]], bool], timeout: float = 60.0) -> dict[str, Any]:
        """Returns the first status for which ``reached`` holds; fails the test, saying ``what``, if none does."""
        deadline = time.monotonic() + timeout
        while True:
            status = self.status()
            if reached(status):
                return status
            assert self.process.poll() is None, (
                f"the engine ended with {self.process.returncode}: {self.log.read_text()}"
            )
            assert time.monotonic() < deadline, f"not {what} after {timeout:.0f} s: {json.dumps(status, indent=1)}"
            time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends the engine by a signal and returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(END_SECONDS)


def start_engine(
    folder: Path,
    ledger: Ledger,
    *options: str,
    mount: bool = True,
    images: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Engine:
    """Starts an engine with its socket, mount and log in ``folder`` and waits until it serves.

    ``prefix``: words before the command; they must end in its ``exec``.
    """
    socket, directory, log = folder / "socket", folder / "mount", folder / "engine.log"
    arguments = ["engine", "--socket", str(socket), *options]
    if mount:
        directory.mkdir(exist_ok=True)
        ledger.add_mount(directory)
        arguments += ["--mount", str(directory)]
    for name, path in (images or {}).items():
        arguments += ["--image", f"{name}={path}"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*prefix, *UDEDUP, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=None if environment is None else {**os.environ, **environment},
        )
    ledger.add_process(process.pid)
    assert process.stdout is not None
    line = read_line(process.stdout, READY_SECONDS)
    assert line.startswith("ready "), f"the engine did not get ready ({line!r}): {log.read_text()}"
    return Engine(process, socket, directory if mount else None, log, ledger)


def read_line(stream: IO[str], timeout: float) -> str:
    """Returns the next line of an unread pipe, or fails the test if none comes in ``timeout`` seconds."""
    assert select.select([stream], [], [], timeout)[0], f"no line within {timeout:.0f} s"
    return stream.readline()


def udedup(*argv: str | Path, timeout: float = 60.0, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Runs the command ``udedup`` to its end and returns it with what it printed."""
    command: Sequence[str] = [*UDEDUP, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)
