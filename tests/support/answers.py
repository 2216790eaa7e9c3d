"""A stand-in for an engine's control socket: real packets, made-up answers."""

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from udedup.engine.control import CHUNK_BYTES, LAST, MORE


class Answers:
    """Listens at a path in threads; ``answer`` takes a request and returns a result, or raises ValueError to refuse."""

    def __init__(self, path: Path, answer: Callable[[dict[str, Any]], object]) -> None:
        self.requests: list[dict[str, Any]] = []
        """All that were asked."""
        self._answer = answer
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.bind(str(path))
        self._sock.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No more connections."""
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(ConnectionResetError, BrokenPipeError):  # they may leave at any time
            while packet := client.recv(CHUNK_BYTES):
                asked = json.loads(packet)
                self.requests.append(asked)
                try:
                    said: dict[str, object] = {"ok": True, "result": self._answer(asked)}
                except ValueError as error:
                    said = {"ok": False, "error": str(error)}
                raw = msgspec.json.encode(said)
                step = CHUNK_BYTES - 1
                for start in range(0, len(raw), step):
                    mark = LAST if start + step >= len(raw) else MORE
                    client.send(mark + raw[start : start + step])
