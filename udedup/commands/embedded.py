"""An engine for one command's life: private socket, started before it, stopped after it.

Our process stays between the shell and the command: it passes signals on, ends as the command ended, and leaves neither
process nor file behind. If it is killed itself, the engine ends too (see ``udedup engine --parent``).
"""

import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from udedup.commands.program import Program, execute
from udedup.errors import UdedupError

_FORWARDED = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGWINCH,
    }
)
_SI_KERNEL = 0x80
"""si_code of a signal that the kernel sent (asm-generic/siginfo.h), such as the terminal's Ctrl-C."""

_ENDING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
"""Signals that end us while the engine starts, when there is no command yet to pass them to."""

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.1


def run_beside_engine(program: Program, domain: str | None, environment_for: Callable[[Path], dict[str, str]]) -> int:
    """Runs ``program`` with an engine of its own and returns its exit status, or dies by the signal that ended it.

    ``environment_for`` gives the program's environment from the engine's socket. Raises UdedupError if the engine
    does not start or refuses the domain.
    """
    with _blocked_signals() as mask:
        folder = Path(tempfile.mkdtemp(prefix="udedup-"))
        try:
            socket = folder / "socket"
            with _engine(socket) as stopped_by:
                if stopped_by is not None:
                    status = int(stopped_by)  # a wait status: ended by that signal
                else:
                    if domain is not None:
                        from udedup.engine.control import request

                        request(socket, {"op": "check_domain", "label": domain})
                    status = _run_program(program, environment_for(socket), mask)
        finally:
            shutil.rmtree(folder)
    if os.WIFSIGNALED(status):
        _die_by(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


@contextmanager
def _blocked_signals() -> Iterator[set[int]]:
    """Holds back what is to be forwarded, so that it is taken with sigwaitinfo() alone; gives the mask before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
    try:
        yield {int(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _engine(socket: Path) -> Iterator[signal.Signals | None]:
    """Runs an engine on ``socket``; gives None once it serves, or the signal that told us to end before that."""
    engine = subprocess.Popen(
        [sys.executable, "-m", "udedup", "engine", "--socket", str(socket), "--parent", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # Ctrl-C is for the command, which may go on after it and then still wants its engine.
        start_new_session=True,
    )
    assert engine.stdout is not None
    with engine, engine.stdout as output:
        try:
            yield _wait_ready(output)
        finally:
            engine.terminate()
            try:
                engine.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print(
                    f"udedup: the engine (pid {engine.pid}) did not end within {_STOP_SECONDS:.0f} s: killed",
                    file=sys.stderr,
                )
                engine.kill()


def _wait_ready(output: IO[bytes]) -> signal.Signals | None:
    """Waits for the engine's line. Signals are blocked here, so those that mean "end" are looked for by turns."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        for number in sorted(signal.sigpending() & _ENDING):
            return signal.Signals(number)
        if select.select([output], [], [], _LOOK_SECONDS)[0]:
            if output.readline().startswith(b"ready"):
                return None
            raise UdedupError("the engine for this command did not start (its own message is above)")
    raise UdedupError(
        f"the engine for this command was not ready after {_START_SECONDS:.0f} s: is the machine overloaded?"
    )


def _run_program(program: Program, environment: dict[str, str], mask: set[int]) -> int:
    """Runs the program to its end and returns its wait status."""
    # Not posix_spawn(): glibc's leaves the signals 32 and 33 ignored in what it starts.
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os._exit(execute(program, environment))
    while True:
        info = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD:
            # What the terminal sends reaches the whole foreground group: the program has it already.
            if info.si_code != _SI_KERNEL:
                os.kill(pid, info.si_signo)
            continue
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status


def _die_by(number: int) -> None:
    """Ends this process by the signal that ended the program, so that our parent sees what it would have seen."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the program left its core, ours says nothing
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    sys.stdout.flush()
    os.kill(os.getpid(), number)
