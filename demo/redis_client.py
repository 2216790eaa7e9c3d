"""The little of Redis's protocol (RESP 2) that the demonstration speaks."""

import socket
from pathlib import Path
from types import TracebackType


class RedisClient:
    """A blocking connection over a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._replies = self._socket.makefile("rb")

    def __enter__(self) -> "RedisClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._replies.close()
        self._socket.close()

    def call(self, *words: bytes) -> bytes | None:
        """Sends one command and returns its reply: the text of a status or number, or a value, None if there is none.

        Raises RuntimeError with Redis's own words if it answers with an error.
        """
        parts = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
        self._socket.sendall(b"*%d\r\n%b" % (len(words), parts))
        line = self._replies.readline().rstrip(b"\r\n")
        kind, rest = line[:1], line[1:]
        if kind in (b"+", b":"):
            return rest
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._replies.read(size + 2)[:-2]
        raise RuntimeError(f"redis: {rest.decode(errors='replace') or 'connection closed'}")
