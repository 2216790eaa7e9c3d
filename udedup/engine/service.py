"""The service manager's side of an engine: sockets it opened, being told when the engine serves, the watchdog.

systemd's protocols are variables of the environment and one line texts on a socket: sd_listen_fds(3), sd_notify(3),
sd_watchdog_enabled(3). Without a manager all of this does nothing.
"""

import logging
import os
import socket
import stat
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from udedup.errors import UdedupError

log = logging.getLogger(__name__)

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START."""

SIGNS_PER_LIMIT = 2
"""Signs of life in the time after which the manager takes the engine for hung (sd_watchdog_enabled(3))."""


@attrs.frozen
class Service:
    """What a service manager gave this process; see :meth:`take`."""

    listener: int | None = None
    """Descriptor of a listening socket; None: open one."""

    socket_path: Path | None = None
    """Where that listens."""

    notify_address: str = ""
    """Where the manager wants to be told things; empty: nowhere."""

    watchdog_seconds: float | None = None
    """Longest time without a sign of life; None: it isn't watched."""

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> "Service":
        """Reads the manager's variables and removes them: no child may take them for its own. Raises UdedupError."""
        listen_pid, descriptors = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
        environment.pop("LISTEN_FDNAMES", None)
        watchdog_pid, microseconds = environment.pop("WATCHDOG_PID", ""), environment.pop("WATCHDOG_USEC", "")
        listener, path = None, None
        if descriptors and listen_pid == str(os.getpid()):
            if descriptors != "1":
                raise UdedupError(f"socket activation: {descriptors} sockets were given, udedup takes one")
            listener, path = FIRST_DESCRIPTOR, _check_listener(FIRST_DESCRIPTOR)
        watched = microseconds and watchdog_pid in ("", str(os.getpid()))
        return cls(
            listener=listener,
            socket_path=path,
            notify_address=environment.pop("NOTIFY_SOCKET", ""),
            watchdog_seconds=_seconds(microseconds) if watched else None,
        )

    @contextmanager
    def listening(self) -> Iterator[socket.socket]:
        """The manager's socket. Its file stays the manager's, and so do the connections that wait there."""
        assert self.listener is not None
        with socket.socket(fileno=self.listener) as sock:
            sock.set_inheritable(False)
            sock.setblocking(False)
            yield sock

    def say(self, text: str) -> None:
        """Tells the manager; who can't be told is not waited for."""
        if not self.notify_address:
            return
        # A leading @ stands for the NUL of Linux's abstract addresses.
        address = "\0" + self.notify_address[1:] if self.notify_address[0] == "@" else self.notify_address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendto(text.encode(), address)
            except OSError as error:
                log.warning("the service manager at %s can't be told %s: %s", self.notify_address, text, error.strerror)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Tells the manager of the beginning and of the end."""
        self.say("READY=1")
        try:
            yield
        finally:
            self.say("STOPPING=1")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Tells the manager that settings are read again, and that this is done."""
        self.say(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            yield
        finally:
            self.say("READY=1")

    async def show_life(self) -> None:
        """Until cancelled: proves to the manager that the engine's loop goes round."""
        if self.watchdog_seconds is None:
            return
        while True:
            self.say("WATCHDOG=1")
            await trio.sleep(self.watchdog_seconds / SIGNS_PER_LIMIT)


def _seconds(microseconds: str) -> float:
    if not (microseconds.isascii() and microseconds.isdigit() and int(microseconds)):
        raise UdedupError(f"the service manager's WATCHDOG_USEC={microseconds} is no time: give microseconds")
    return int(microseconds) / 1e6


def _check_listener(descriptor: int) -> Path:
    """Returns where a descriptor listens. Raises UdedupError if it is no socket that agents can connect to."""
    todo = "use ListenSequentialPacket= with a path in udedup.socket"
    try:
        good = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        good = False
    if not good:
        raise UdedupError(f"socket activation: descriptor {descriptor} is no socket: {todo}")
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET or not listens:
            raise UdedupError(f"socket activation: descriptor {descriptor} is of another kind: {todo}")
        path = sock.getsockname()
    if not isinstance(path, str) or not path:
        raise UdedupError(f"socket activation: descriptor {descriptor} has no path: {todo}")
    return Path(path)
