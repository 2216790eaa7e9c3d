"""Control clients: takes their requests (see ``udedup.engine.control``) and answers them."""

import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar, Literal

import msgspec
import trio

from udedup.engine.accounting import Counters
from udedup.engine.control import CHUNK_BYTES, LAST, MORE, REQUEST_BYTES_MAX
from udedup.engine.link import Peer
from udedup.errors import UdedupError

SEND_SECONDS = 10.0


class StatusRequest(msgspec.Struct, tag_field="op", tag="status", frozen=True):
    """Everything about the engine."""

    kernel: bool = True
    """Whether to include what takes long."""


class MountRequest(msgspec.Struct, tag_field="op", tag="mount", frozen=True):
    """More images for the mount."""

    images: list[tuple[str | None, str]]
    """(name in the mount or null for the file's own, absolute path)."""

    format: str | None = None
    """Of the images, in QEMU's words; null: found out."""

    secret: str | None = None
    """Absolute path of the file with their passphrase."""


class UmountRequest(msgspec.Struct, tag_field="op", tag="umount", frozen=True):
    """One image fewer in the mount."""

    image: str
    """Its name there, …"""

    path: str
    """… or this is its path there, or that of the image itself."""


class CloneRequest(msgspec.Struct, tag_field="op", tag="clone", frozen=True):
    """A new clone, shown in the mount."""

    name: str

    base: str
    """Absolute path."""

    overlay: str | None = None
    """Absolute path of what it is to be kept in; null: in the state directory."""

    format: str | None = None
    """Of the base, in QEMU's words; null: found out."""

    secret: str | None = None
    """Absolute path of the file with its passphrase."""


class ClonesRequest(msgspec.Struct, tag_field="op", tag="clones", frozen=True):
    """Which clones there are."""


class CloneChangeRequest(msgspec.Struct, tag_field="op", tag="clone_change", frozen=True):
    """Something is to be done with a clone there is."""

    name: str

    change: Literal["show", "commit", "discard"]


class UnmergeRequest(msgspec.Struct, tag_field="op", tag="unmerge", frozen=True):
    """Private memory back."""

    pid: int | None = None
    """null: all processes."""


class PauseRequest(msgspec.Struct, tag_field="op", tag="pause", frozen=True):
    """No further merging; what is merged stays so."""

    pid: int | None = None
    """null: all processes."""


class MergeRequest(msgspec.Struct, tag_field="op", tag="merge", frozen=True):
    """Undoes an earlier "unmerge" or "pause": they take part again."""

    pid: int | None = None
    """null: all processes."""


class CheckDomainRequest(msgspec.Struct, tag_field="op", tag="check_domain", frozen=True):
    """Whether the asker may use a label."""

    label: str


Request = (
    StatusRequest
    | MountRequest
    | UmountRequest
    | CloneRequest
    | ClonesRequest
    | CloneChangeRequest
    | UnmergeRequest
    | PauseRequest
    | MergeRequest
    | CheckDomainRequest
)


class Client:
    """One connection of a control client; ``perform`` does what is asked and raises UdedupError."""

    _decoder: ClassVar[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        perform: Callable[[Request, Peer], Awaitable[object]],
        counters: Counters,
    ) -> None:
        self._socket = sock
        self._peer = peer
        self._perform = perform
        self._counters = counters

    async def serve(self, packet: bytes) -> None:
        """Answers ``packet`` and what follows, until the client leaves or stops reading."""
        while packet:
            answer = await self._answer(packet)
            with trio.move_on_after(SEND_SECONDS) as scope:
                await self._send(answer)
            if scope.cancelled_caught:
                return
            packet = await receive_packet(self._socket, REQUEST_BYTES_MAX)

    async def _answer(self, packet: bytes) -> bytes:
        try:
            request = self._decoder.decode(packet)
        except msgspec.DecodeError as error:
            self._counters.requests_refused += 1
            return _refuse(f"the engine did not understand the request: {error}")
        try:
            result = await self._perform(request, self._peer)
        except UdedupError as error:
            return _refuse(str(error))
        return msgspec.json.encode({"ok": True, "result": result})

    async def _send(self, answer: bytes) -> None:
        step = CHUNK_BYTES - 1
        for start in range(0, len(answer), step):
            mark = LAST if start + step >= len(answer) else MORE
            while True:
                try:
                    self._socket.send(mark + answer[start : start + step], socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                else:
                    break


def _refuse(error: str) -> bytes:
    return msgspec.json.encode({"ok": False, "error": " ".join(error.split())})


async def receive_packet(sock: socket.socket, longest: int) -> bytes:
    """The next packet, cut to ``longest`` + 1 bytes; b"" at the end of the connection."""
    while True:
        try:
            return sock.recv(longest + 1)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
        except ConnectionResetError:
            return b""


def require_owner(peer: Peer, what: str) -> None:
    """Raises UdedupError unless the asker is root or runs as the engine's user."""
    if peer.uid not in (0, os.geteuid()):
        raise UdedupError(f"{what} is for root and the engine's user only, you are uid {peer.uid}")


def absolute(path: str) -> Path:
    """A path from a request. Raises UdedupError if it depends on a directory that is the asker's."""
    if not Path(path).is_absolute():
        raise UdedupError(f"the path {path!r} is not absolute")
    return Path(path)
