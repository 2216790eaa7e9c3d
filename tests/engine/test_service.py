"""The service manager's protocols, with the test in the manager's place."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import trio
import trio.testing

from udedup.engine.service import Service
from udedup.errors import UdedupError


@pytest.fixture
def manager(socket_path: Path) -> Iterator[socket.socket]:
    """Where the manager listens for news."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(str(socket_path))
        yield sock


def news(manager: socket.socket) -> list[bytes]:
    """What was said since the last time."""
    found = []
    while True:
        try:
            found.append(manager.recv(1000))
        except BlockingIOError:
            return found


def test_without_a_manager_nothing_is_taken() -> None:
    environment = {"PATH": "/bin"}
    assert Service.take(environment) == Service()
    assert environment == {"PATH": "/bin"}


def test_beginning_and_end_are_told(manager: socket.socket, socket_path: Path) -> None:
    service = Service.take({"NOTIFY_SOCKET": str(socket_path)})
    with service.serving():
        assert news(manager) == [b"READY=1"]
    assert news(manager) == [b"STOPPING=1"]


def test_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind("")
        name = sock.getsockname()
        assert isinstance(name, bytes)
        Service.take({"NOTIFY_SOCKET": "@" + name[1:].decode()}).say("READY=1")
        assert news(sock) == [b"READY=1"]


def test_a_manager_that_is_gone_or_deaf_stops_nothing(
    manager: socket.socket, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service.take({"NOTIFY_SOCKET": str(socket_path)})
    for _ in range(2000):
        service.say("WATCHDOG=1")
    assert "can't be told WATCHDOG=1" in caplog.text
    socket_path.unlink()
    service.say("READY=1")
    assert "READY=1: No such file" in caplog.text


async def test_signs_of_life(
    manager: socket.socket, socket_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Twice in the time the manager gives; none while the loop is stuck."""
    pid = str(os.getpid())
    environment = {"NOTIFY_SOCKET": str(socket_path), "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": pid}
    nursery.start_soon(Service.take(environment).show_life)
    await trio.sleep(31)
    assert news(manager) == [b"WATCHDOG=1"] * 3
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}])
async def test_who_is_not_watched_shows_no_life(
    manager: socket.socket, socket_path: Path, environment: dict[str, str]
) -> None:
    await Service.take({"NOTIFY_SOCKET": str(socket_path), **environment}).show_life()
    assert news(manager) == []


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon"])
def test_times_that_are_none(value: str) -> None:
    with pytest.raises(UdedupError, match=f"WATCHDOG_USEC={value}"):
        Service.take({"WATCHDOG_USEC": value})


def test_sockets_for_another_process_are_left_alone() -> None:
    assert Service.take({"LISTEN_PID": "1", "LISTEN_FDS": "1"}).listener is None


def stream(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def not_listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(str(path))
    return sock


def without_path(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind("\0udedup-test-" + path.parent.name)
    sock.listen()
    return sock


def network(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def plain_file(path: Path) -> IO[bytes]:
    return path.open("wb")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (stream, "of another kind"),
        (not_listening, "of another kind"),
        (network, "of another kind"),
        (without_path, "has no path"),
        (plain_file, "is no socket"),
        (lambda path: None, "is no socket"),
    ],
)
def test_descriptors_that_agents_could_not_connect_to(
    socket_path: Path, kind: Callable[[Path], socket.socket | IO[bytes] | None], text: str
) -> None:
    """In a process of its own, whose descriptor 3 is the test's to choose."""
    program = (
        "import os, sys\n"
        "from udedup.engine.service import Service\n"
        "from udedup.errors import UdedupError\n"
        "given = int(sys.argv[1])\n"
        "if given >= 0: os.dup2(given, 3)\n"
        "try:\n"
        "    Service.take({'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'})\n"
        "except UdedupError as error:\n"
        "    print(error)\n"
    )
    file = kind(socket_path)
    given = -1 if file is None else file.fileno()
    try:
        # Without one, subprocess closes descriptor 3.
        done = subprocess.run(
            [sys.executable, "-c", program, str(given)],
            capture_output=True,
            text=True,
            check=True,
            pass_fds=[given] if given >= 0 else [],
        )
    finally:
        if file is not None:
            file.close()
    assert done.stdout.startswith("socket activation: descriptor 3 ")
    assert text in done.stdout
    assert done.stdout.count("\n") == 1


def test_more_sockets_than_one() -> None:
    with pytest.raises(UdedupError, match="2 sockets were given"):
        Service.take({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"})
