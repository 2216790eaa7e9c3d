"""The connection to one agent: one request at a time, each with its answer, each within its time."""

import array
import errno
import socket
import struct
from typing import NoReturn, Protocol

import attrs
import trio

from udedup.engine.native import lib
from udedup.engine.wire import HEADER, PACKET_MAX, AgentError


class LinkClosedError(Exception):
    """The agent's end was closed; ``asked`` says whether an answer was still due."""

    def __init__(self, asked: bool) -> None:
        super().__init__("in the middle of a request" if asked else "left")
        self.asked = asked


@attrs.frozen
class Peer:
    """Who is at the other end, from the kernel (SO_PEERCRED)."""

    pid: int
    """0 if it is in a process namespace that we can't see."""

    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Reads the credentials the peer had when it connected."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return Peer(*struct.unpack("iII", raw))


@attrs.frozen
class Answer:
    """UDD_DONE, its header checked."""

    status: int
    """0 or a negative errno."""

    count: int
    """Items that follow."""

    value: int
    """Depends on the request."""

    packet: bytes
    """The whole message, header included."""


class Bell(Protocol):
    """What is called when the agent rings."""

    def __call__(self) -> None:
        """Raises AgentError if it must not."""


class Link:
    """Requests to one agent. ``request`` is called by one task only; ``receive`` runs in another."""

    def __init__(self, sock: socket.socket, *, answer_seconds: float, on_doorbell: Bell) -> None:
        self._socket = sock
        self._answer_seconds = answer_seconds
        self._on_doorbell = on_doorbell
        self._sequence = 0
        self._awaited: trio.Event | None = None
        self._answer: Answer | None = None

    async def request(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        count: int = 0,
        value: int = 0,
        descriptor: int | None = None,
        seconds: float | None = None,
    ) -> Answer:
        """Asks and returns the answer. Raises AgentError if there is none in time (``seconds``, else the default)."""
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        self._awaited = trio.Event()
        message = HEADER.pack(lib.UDD_MAGIC, kind, count, self._sequence, 0, value) + payload
        limit = self._answer_seconds if seconds is None else seconds
        with trio.move_on_after(limit):
            await self._send(message, descriptor)
            await self._awaited.wait()
        answer, self._answer = self._answer, None
        if answer is None:
            raise AgentError(f"it did not answer request {kind} within {limit:g} s")
        return answer

    async def _send(self, message: bytes, descriptor: int | None) -> None:
        ancillary = [] if descriptor is None else [descriptor]
        while True:
            try:
                send(self._socket, message, ancillary)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
            else:
                return

    async def receive(self) -> NoReturn:
        """Takes in what the agent sends until it leaves (LinkClosedError) or sends nonsense (AgentError)."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                packet = self._socket.recv(PACKET_MAX + 1)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                packet = b""
            if not packet:
                raise LinkClosedError(self._awaited is not None)
            self._take(packet)

    def _take(self, packet: bytes) -> None:
        if not HEADER.size <= len(packet) <= PACKET_MAX:
            raise AgentError(f"it sent a message of {len(packet)} bytes")
        magic, kind, count, sequence, status, value = HEADER.unpack_from(packet)
        if magic != lib.UDD_MAGIC:
            raise AgentError("it sent something that is no message")
        if kind == lib.UDD_DOORBELL:
            self._on_doorbell()
        elif kind == lib.UDD_DONE:
            if self._awaited is None or sequence != self._sequence:
                raise AgentError(f"it answered request {sequence}, which is not under way")
            if status > 0:
                raise AgentError(f"it answered with the impossible status {status}")
            self._answer = Answer(status, count, value, packet)
            self._awaited.set()
            self._awaited = None
        else:
            raise AgentError(f"it sent a message of type {kind}, which agents don't send")

    def say(self, message: bytes) -> None:
        """Sends without waiting; a message that does not fit now, or has nobody to read it, is lost."""
        try:
            send(self._socket, message, [])
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise

    def close(self) -> None:
        """Ends the connection; whoever waits on it is woken with ClosedResourceError."""
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


def send(sock: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """Sends one packet, with descriptors beside it."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []
    sock.sendmsg([message], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
