"""The connection to one agent: one request at a time, each with its answer, each within its time."""

import array
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterable
from typing import NoReturn, Protocol

import attrs
import trio

from udedup.engine.native import lib
from udedup.engine.wire import HEADER, PACKET_MAX, AgentError, SilentError


class LinkClosedError(Exception):
    """The agent's end was closed; ``asked`` says whether an answer was still due."""

    def __init__(self, asked: bool) -> None:
        super().__init__("in the middle of a request" if asked else "left")
        self.asked = asked


STRAYS_MAX = 4
"""Descriptors that wait to be closed, at most; see Strays."""

LATE_SECONDS = 0.1
"""A deadline noticed so much later says that this process was held up, not the agent."""


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

    memfd: int | None
    """The descriptor that came along."""


class Bell(Protocol):
    """What is called when the agent rings."""

    def __call__(self) -> None:
        """Raises AgentError if it must not."""


class Strays:
    """Closes descriptors that agents should not have sent, each in a thread of its own.

    Closing a file waits for whoever serves its file system, and that may be the agent's friend.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    @property
    def full(self) -> bool:
        """Whether so many don't get closed that no more should be taken in."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return len(self._threads) >= STRAYS_MAX

    def close(self, descriptor: int) -> None:
        """Begins to."""
        thread = threading.Thread(target=os.close, args=(descriptor,), daemon=True)
        self._threads.append(thread)
        thread.start()


class Link:
    """Requests to one agent. ``request`` is called by one task only; ``receive`` runs in another."""

    def __init__(self, sock: socket.socket, *, answer_seconds: float, on_doorbell: Bell, strays: Strays) -> None:
        self._socket = sock
        self._answer_seconds = answer_seconds
        self._on_doorbell = on_doorbell
        self._strays = strays
        self._sequence = 0
        self._awaited: trio.Event | None = None
        self._answer: Answer | None = None
        self._takes_memfd = False

    async def request(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        count: int = 0,
        value: int = 0,
        descriptor: int | None = None,
        takes_memfd: bool = False,
        seconds: float | None = None,
    ) -> Answer:
        """Asks and returns the answer. Raises SilentError if there is none in time (``seconds``, else the default).

        With ``takes_memfd`` the answer may come with one memfd, which is the caller's to close then.
        """
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        self._awaited = trio.Event()
        self._takes_memfd = takes_memfd and not self._strays.full
        message = HEADER.pack(lib.UDD_MAGIC, kind, count, self._sequence, 0, value) + payload
        limit = self._answer_seconds if seconds is None else seconds
        sent = False
        while self._answer is None:
            with trio.move_on_after(limit) as patience:
                if not sent:
                    await self._send(message, descriptor)
                    sent = True
                if self._awaited is not None:
                    await self._awaited.wait()
            # After a stop of this process (SIGSTOP, a suspended machine) answers wait to be read: they are not late.
            if patience.cancelled_caught and trio.current_time() < patience.deadline + LATE_SECONDS:
                break
        answer, self._answer = self._answer, None
        if answer is None:
            raise SilentError(f"it did not answer request {kind} within {limit:g} s")
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
            # Without room for them the kernel drops all descriptors.
            room = socket.CMSG_LEN(struct.calcsize("i")) if self._takes_memfd else 0
            try:
                packet, ancillary, _, _ = self._socket.recvmsg(PACKET_MAX + 1, room, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                packet, ancillary = b"", []
            memfd = self._memfd_of(ancillary)
            try:
                if not packet:
                    raise LinkClosedError(self._awaited is not None)
                self._take(packet, memfd)
                memfd = None
            finally:
                if memfd is not None:
                    os.close(memfd)

    def _memfd_of(self, ancillary: Iterable[tuple[int, int, bytes]]) -> int | None:
        """The one descriptor that came along. Raises AgentError if it is anything but a memfd."""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                (descriptor,) = struct.unpack("i", data)
                try:
                    # Not a call that a file system has a say in. Plain files have no seals.
                    fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
                except OSError:
                    self._strays.close(descriptor)
                    raise AgentError("it sent a descriptor that is no memfd") from None
                return int(descriptor)
        return None

    def _take(self, packet: bytes, memfd: int | None) -> None:
        """Raises AgentError; ``memfd`` is taken over if not."""
        if not HEADER.size <= len(packet) <= PACKET_MAX:
            raise AgentError(f"it sent a message of {len(packet)} bytes")
        magic, kind, count, sequence, status, value = HEADER.unpack_from(packet)
        if magic != lib.UDD_MAGIC:
            raise AgentError("it sent something that is no message")
        if kind == lib.UDD_DOORBELL and memfd is None:
            self._on_doorbell()
        elif kind == lib.UDD_DONE:
            if self._awaited is None or sequence != self._sequence:
                raise AgentError(f"it answered request {sequence}, which is not under way")
            if status > 0:
                raise AgentError(f"it answered with the impossible status {status}")
            self._answer = Answer(status, count, value, packet, memfd)
            self._awaited.set()
            self._awaited = None
            self._takes_memfd = False
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
        if self._answer is not None and self._answer.memfd is not None:
            os.close(self._answer.memfd)
        self._answer = None
        # It leads back to the agent: a cycle would keep both, and the shared area, until Python looks for garbage.
        self._on_doorbell = _nobody
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


def _nobody() -> None:
    """Rings for whom is gone."""
    raise AgentError("it rings after its end")


def send(sock: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """Sends one packet, with descriptors beside it."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []
    sock.sendmsg([message], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
