"""Whose socket file is it? One line for each way it can be somebody else's."""

import contextlib
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from udedup.engine.control import request
from udedup.engine.listener import listening
from udedup.errors import UdedupError


def refusal(path: Path) -> str:
    """What is said when the engine can't listen on ``path``."""
    with pytest.raises(UdedupError) as caught, listening(path, None):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_listens_and_cleans_up(socket_path: Path) -> None:
    with listening(socket_path, 0o640):
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o640
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(socket_path))
    assert not socket_path.exists()


@pytest.mark.parametrize(
    ("mode", "group", "expected"), [(None, None, 0o600), (None, 12, 0o660), (0o666, None, 0o666), (0o620, 12, 0o620)]
)
def test_closed_to_others_unless_opened(socket_path: Path, mode: int | None, group: int | None, expected: int) -> None:
    if group is not None and os.geteuid() != 0:
        pytest.skip("only root can give the socket to any group")
    with listening(socket_path, mode, group):
        status = socket_path.stat()
        assert stat.S_IMODE(status.st_mode) == expected
        assert status.st_gid == (os.getegid() if group is None else group)


def test_second_engine(socket_path: Path) -> None:
    with listening(socket_path, None):
        assert f"an engine runs on {socket_path} already" in refusal(socket_path)
        assert socket_path.is_socket()


def test_busy_engine_is_not_stale(socket_path: Path) -> None:
    """A full queue of connections refuses with EAGAIN, which is no sign of death."""
    clients = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as busy:
        busy.bind(str(socket_path))
        busy.listen(0)
        try:
            for _ in range(5):
                client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
                clients.append(client)
                try:
                    client.connect(str(socket_path))
                except BlockingIOError:
                    break
            else:
                pytest.fail("the queue never filled")
            assert "already" in refusal(socket_path)
        finally:
            for client in clients:
                client.close()


def test_stale_socket_is_replaced(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as old:
        old.bind(str(socket_path))
        old.listen()
    with listening(socket_path, None), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(socket_path))


def test_something_else_of_that_name(socket_path: Path) -> None:
    socket_path.write_text("precious")
    assert "is no socket" in refusal(socket_path)
    assert socket_path.read_text() == "precious"


def test_socket_of_another_type(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(socket_path))
        other.listen()
        assert "already" in refusal(socket_path)
    assert socket_path.is_socket()


def test_dangling_link_is_left_alone(socket_path: Path) -> None:
    socket_path.symlink_to("/nonexistent")
    assert "is no socket" in refusal(socket_path)
    assert socket_path.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_socket_of_somebody_else(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(socket_path))
    os.chown(socket_path, 12345, 12345)
    assert "belongs to uid 12345" in refusal(socket_path)
    assert socket_path.is_socket()


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no folder" in refusal(tmp_path / "missing" / "socket")


def test_path_too_long(tmp_path: Path) -> None:
    assert "no socket at" in refusal(tmp_path / ("x" * 120))


def test_a_newer_engine_s_socket_is_not_removed(socket_path: Path) -> None:
    with listening(socket_path, None):
        socket_path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as newer:
            newer.bind(str(socket_path))
            newer.listen()
            before = socket_path.stat().st_ino
    assert socket_path.stat().st_ino == before


def test_a_command_waits_while_others_have_the_queue_full(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(socket_path))
        listener.listen(1)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                client.setblocking(False)
                client.connect(str(socket_path))

        def serve() -> None:
            while True:
                accepted, _ = listener.accept()
                with accepted:
                    accepted.settimeout(0.1)
                    with contextlib.suppress(TimeoutError, OSError):
                        if accepted.recv(1000):
                            accepted.send(b'.{"ok": true, "result": 7}')
                            return

        with pytest.raises(UdedupError, match="did not answer within"):
            request(socket_path, {"op": "status"}, seconds=0.05)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert request(socket_path, {"op": "status"}, seconds=10) == 7
        thread.join(10)
