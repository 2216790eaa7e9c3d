"""The engine's socket: one engine per socket file, stale files replaced, files of others left alone."""

import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from udedup.errors import UdedupError

log = logging.getLogger(__name__)

BACKLOG = 128
LOCK_SECONDS = 2.0


@contextmanager
def listening(
    path: Path,
    mode: int | None,
    group: int | None = None,
    *,
    kind: socket.SocketKind = socket.SOCK_SEQPACKET,
    option: str = "--socket",
) -> Iterator[socket.socket]:
    """A listening socket at ``path``, removed again at the end. Raises UdedupError.

    ``mode`` are its permissions (None: the engine's user may connect, and ``group``), ``group`` a gid (None: no other).
    ``option`` is what a person can name another path with.
    """
    with _folder_lock(path.parent, option):
        _make_way(path, option)
        sock = _bind(path, mode, group, kind, option)
    with sock:
        identity = _identity(path)
        try:
            yield sock
        finally:
            if identity is not None and _identity(path) == identity:
                _remove(path)


def _remove(path: Path) -> None:
    """A file that stays does no harm: the next engine replaces it."""
    try:
        path.unlink()
    except OSError as error:
        log.warning("the socket %s stays there: %s", path, error.strerror)


@contextmanager
def _folder_lock(folder: Path, option: str) -> Iterator[None]:
    """Two engines that start at once must not both find the file stale: the folder itself is the lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UdedupError(f"no folder {folder} for the socket: {error.strerror}; name another with {option}") from None
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UdedupError(
                        f"the folder {folder} of the socket stays locked by somebody: try again"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _make_way(path: Path, option: str) -> None:
    """Removes a socket file that nobody listens on; refuses every other file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UdedupError(f"no look at the socket {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(status.st_mode):
        raise UdedupError(f"{path} is there and is no socket: remove it, or name another with {option}")
    if status.st_uid != os.geteuid():
        raise UdedupError(f"the socket {path} belongs to uid {status.st_uid}: name another with {option}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            # Of another type, or so busy that its queue is full: somebody listens.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise UdedupError(f"the socket {path} can't be tried: {error.strerror}") from None
    raise UdedupError(f"an engine runs on {path} already: use it, or name another socket with {option}")


def _bind(path: Path, mode: int | None, group: int | None, kind: socket.SocketKind, option: str) -> socket.socket:
    if mode is None:
        mode = 0o600 if group is None else 0o660
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    try:
        before = os.umask(0o777)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
        if group is not None:
            os.chown(path, -1, group)
        path.chmod(mode)
    except OSError as error:
        sock.close()
        raise UdedupError(f"no socket at {path}: {error.strerror or error}; name another with {option}") from None
    return sock


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
