"""The control protocol, and its blocking client. Standard library only, so that commands start fast.

``udedup.client`` is the client for trio programs: the same protocol, by the same functions.

A client connects to the engine's socket (SOCK_SEQPACKET) and sends one JSON object as one packet:

- ``{"op": "status", "kernel": true}``: see ``udedup.engine.accounting.Status``; ``kernel`` false leaves out the
  numbers that must be read from /proc/PID/smaps, which take a while
- ``{"op": "mount", "images": [["name", "/absolute/path"], …], "format": null, "secret": null}``: the paths in the
  mount; the name may be null too
- ``{"op": "umount", "image": "name", "path": "/absolute/path"}``: true, or the error; one of both is enough
- ``{"op": "clone", "name": "vm1", "base": "/absolute/path", "overlay": null, "format": null, "secret": null}``: the
  path of the new clone in the mount
- ``{"op": "clones"}``: see ``udedup.engine.cloning.CloneStatus``
- ``{"op": "clone_change", "name": "vm1", "change": "show"}`` (or ``commit``, ``discard``): the clone's path in the
  mount (its base's, nothing), or the error
- ``{"op": "unmerge", "pid": 123}`` (null: all): how many pages are private again; these processes are left alone from
  then on
- ``{"op": "pause", "pid": 123}`` (null: all): likewise left alone, but what is merged stays so; how many processes
- ``{"op": "merge", "pid": 123}`` (null: all): how many processes are no longer left alone
- ``{"op": "check_domain", "label": "x"}``: true, or the error

The answer is ``{"ok": true, "result": …}`` or ``{"ok": false, "error": "one line"}``, in packets that start with ``+``
if more follow and with ``.`` if not.
"""

import errno
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from udedup.errors import UdedupError
from udedup.places import temporary_socket

MORE: Final = b"+"
LAST: Final = b"."
CHUNK_BYTES: Final = 65536
"""Longest packet of an answer."""

REQUEST_BYTES_MAX: Final = 65536
CONNECT_PAUSE: Final = 0.005
"""Between two attempts where the engine's queue is full, s."""

ANSWER_SECONDS: Final = 330.0
"""Unmerging a large process takes a while."""


def request(path: Path, message: Mapping[str, object], *, seconds: float | None = ANSWER_SECONDS) -> Any:
    """Asks the engine at ``path`` and returns ``result``, after ``seconds`` at most. Raises UdedupError."""
    packet = check_size(json.dumps(message).encode())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(seconds)
        try:
            _connect(sock, path, ANSWER_SECONDS if seconds is None else seconds)
            require_trusted(sock, path)
            sock.send(packet)
            answer = json.loads(_receive(sock))
            good = answer["ok"]
        except TimeoutError:
            raise UdedupError(explain_silence(path, seconds or ANSWER_SECONDS)) from None
        except OSError as error:
            raise UdedupError(explain(path, error)) from None
        except (ValueError, TypeError, KeyError):
            raise UdedupError(explain_nonsense(path)) from None
    if not good:
        raise UdedupError(answer["error"])
    return answer["result"]


def _connect(sock: socket.socket, path: Path, seconds: float) -> None:
    """Waits for its turn while others have the engine's queue full. Raises OSError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            sock.connect(str(path))
        except BlockingIOError:
            # What a socket of this family says, where others wait.
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(CONNECT_PAUSE)
        else:
            return


def require_trusted(sock: socket.socket, path: Path) -> None:
    """Raises UdedupError if the engine is another user's, at the place of this user's own where anybody may put one."""
    if path != temporary_socket():
        return
    _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))
    if uid not in (0, os.geteuid()):
        raise UdedupError(f"the engine at {path} is not this user's but that of uid {uid}: name yours with --socket")


def _receive(sock: socket.socket) -> bytes:
    assembly = Assembly()
    while not assembly.add(sock.recv(CHUNK_BYTES)):
        pass
    return assembly.answer


class Assembly:
    """Puts an answer together from its packets."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, packet: bytes) -> bool:
        """Takes the next packet; True: it was the last one. Raises ConnectionResetError if there is none."""
        if not packet:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        self._parts.append(packet[1:])
        return packet[:1] == LAST

    @property
    def answer(self) -> bytes:
        """JSON."""
        return b"".join(self._parts)


def check_size(packet: bytes) -> bytes:
    """Returns a request. Raises UdedupError if it is too long."""
    if len(packet) > REQUEST_BYTES_MAX:
        raise UdedupError(
            f"the request has {len(packet)} bytes, the engine takes {REQUEST_BYTES_MAX}: ask for less at a time"
        )
    return packet


def explain_silence(path: Path, seconds: float) -> str:
    """Says that no answer came."""
    return f"the engine at {path} did not answer within {seconds:g} s"


def explain_nonsense(path: Path) -> str:
    """Says that what came is no answer."""
    return f"what listens at {path} does not answer like an engine of this version"


def explain(path: Path, error: OSError) -> str:
    """Says why the engine can't be talked to, and what to do."""
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        return f"no engine listens at {path}: start one with `udedup engine`, or name its socket with --socket"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"no permission to talk to the engine at {path}: do it as the engine's user, "
            "or start the engine with --socket-group or --socket-mode"
        )
    return f"talking to the engine at {path} failed: {error.strerror or error}"
