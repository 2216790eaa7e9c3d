"""SIGHUP: the settings are read again, and the engine goes on with them.

A SIGHUP that comes because the terminal is gone ends the engine, as it ends other programs in it.
"""

import argparse
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import trio

from udedup.commands import logs
from udedup.commands.configuration import engine_config
from udedup.engine.config import EngineConfig
from udedup.engine.service import Service
from udedup.errors import UdedupError

log = logging.getLogger(__name__)


class Reloading:
    """Of one engine."""

    def __init__(self, choose: Callable[[], argparse.Namespace], service: Service) -> None:
        """``choose`` reads the options anew and raises UdedupError."""
        self._choose = choose
        self._service = service
        self._in_terminal = _terminal()

    @contextmanager
    def listening(self) -> Iterator[AsyncIterator[EngineConfig]]:
        """From here on SIGHUP means this; gives what it brings, as long as it is right."""
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            yield self._configs(signals)

    async def _configs(self, signals: AsyncIterator[int]) -> AsyncIterator[EngineConfig]:
        async for _ in signals:
            if self._in_terminal and not _terminal():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            try:
                # In a thread: who a user is may be asked of a server.
                chosen = await trio.to_thread.run_sync(self._choose)
            except UdedupError as error:
                log.warning("settings stay as they are: %s", error)
                continue
            logs.configure(chosen.log_level, chosen.log_format)
            yield engine_config(chosen, self._service)


def _terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
