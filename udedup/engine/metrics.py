"""The metrics' endpoint: HTTP on a Unix socket or a loopback port, for Prometheus and its like.

Whoever asks, and however: the engine does not wait. There are few connections at a time, each with one request, which
must be short and be there in time; the answer must be read in time; the text is made at most once in a while, and in
small pieces. Answers are for those only that call it by an address of this machine: a web page that has its own name
mean 127.0.0.1 learns nothing, be it from a loopback port or from what forwards one to a socket.

Needs the extra ``metrics``.
"""

import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final

import h11
import trio

from udedup.engine.addresses import Loopback, is_loopback
from udedup.engine.exposition import render
from udedup.engine.link import Peer
from udedup.engine.listener import listening
from udedup.engine.shortage import Shortage
from udedup.errors import UdedupError

if TYPE_CHECKING:
    from udedup.engine.server import Engine

log = logging.getLogger(__name__)

CONNECTIONS: Final = 8
"""Served at a time; others wait in the kernel's queue."""

BACKLOG: Final = 16
ACCEPT_PAUSE: Final = 0.02
"""After each connection, s: what those that follow each other without end can take of the engine."""

REQUEST_SECONDS: Final = 5.0
"""From the connection to the end of the request."""

SEND_SECONDS: Final = 10.0
"""For reading the answer."""

REQUEST_BYTES: Final = 8192
"""Longest request."""

FRESH_SECONDS: Final = 1.0
"""How old an answer may be."""

PATH: Final = b"/metrics"
METRICS: Final = "text/plain; version=0.0.4; charset=utf-8"
PLAIN: Final = "text/plain; charset=utf-8"


@contextmanager
def metrics_socket(address: Path | Loopback, group: int | None) -> Iterator[socket.socket]:
    """A listening socket; at a path it is the engine's user's alone, and ``group``'s if given. Raises UdedupError."""
    if isinstance(address, Path):
        with listening(address, None, group, kind=socket.SOCK_STREAM, option="--metrics") as sock:
            yield sock
        return
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address.host, address.port))
            sock.listen(BACKLOG)
        except OSError as error:
            raise UdedupError(
                f"no metrics at {address}: {error.strerror}; name another address with --metrics"
            ) from None
        yield sock


class Endpoint:
    """Answers requests; ``render`` makes the text."""

    def __init__(self, render: Callable[[], Awaitable[bytes]], shortage: Shortage) -> None:
        self._render = render
        self._shortage = shortage
        self._turn = trio.Lock()
        self._text = b""
        self._made = -math.inf

    async def serve(self, sock: socket.socket) -> None:
        """Takes connections until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        free = trio.Semaphore(CONNECTIONS)
        async with trio.open_nursery() as nursery:

            async def answer(stream: trio.SocketStream) -> None:
                try:
                    await self._answer(stream)
                finally:
                    free.release()

            while True:
                await free.acquire()
                nursery.start_soon(answer, await self._accept(listener))
                await trio.sleep(ACCEPT_PAUSE)

    async def _accept(self, listener: trio.SocketListener) -> trio.SocketStream:
        while True:
            try:
                return await listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if not self._shortage.explains(error, "who asks for metrics has to wait"):
                    raise
                await trio.sleep(ACCEPT_PAUSE)

    async def _answer(self, stream: trio.SocketStream) -> None:
        """One connection, from its request to its end."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES)
        async with stream:
            try:
                request = None
                with trio.move_on_after(REQUEST_SECONDS):
                    request = await _request(connection, stream)
                if request is None:
                    return
                status, text = await self._look(request)
                with_body = request.method != b"HEAD"
            except h11.RemoteProtocolError as error:
                status, text, with_body = HTTPStatus(error.error_status_hint), b"", True
            except trio.BrokenResourceError:
                return
            with trio.move_on_after(SEND_SECONDS):
                try:
                    for piece in _response(connection, status, text, with_body=with_body):
                        await stream.send_all(piece)
                except trio.BrokenResourceError:
                    log.debug("who asked for metrics left before all of them were there")

    async def _look(self, request: h11.Request) -> tuple[HTTPStatus, bytes]:
        """What there is to say; nothing: the status says it."""
        if not _is_meant(request):
            return HTTPStatus.FORBIDDEN, b""
        if request.target.partition(b"?")[0] != PATH:
            return HTTPStatus.NOT_FOUND, b""
        if request.method not in (b"GET", b"HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, b""
        try:
            return HTTPStatus.OK, await self._fresh()
        except OSError as error:
            if not self._shortage.explains(error, "who asks for metrics gets none"):
                raise
            return HTTPStatus.SERVICE_UNAVAILABLE, b""

    async def _fresh(self) -> bytes:
        """The text; who comes while it is made waits for it."""
        async with self._turn:
            if trio.current_time() - self._made >= FRESH_SECONDS:
                self._text = await self._render()
                self._made = trio.current_time()
            return self._text


def endpoint(engine: "Engine") -> Endpoint:
    """For all that there is to know of an engine."""
    own = Peer(os.getpid(), os.geteuid(), os.getegid())

    async def text() -> bytes:
        return await render(await engine.status(own, with_kernel=False, exact=False), engine.counters.lead_times)

    return Endpoint(text, engine.shortage)


async def _request(connection: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """What is asked for; None if the connection ends before. Raises h11.RemoteProtocolError."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await stream.receive_some(REQUEST_BYTES))


def _is_meant(request: h11.Request) -> bool:
    """Whether it is this machine that is asked, by the request's own word; old clients don't say."""
    for name, value in request.headers:
        if name == b"host":
            text = value.decode("ascii", "replace")
            host, colon, port = text.rpartition(":")
            return is_loopback(host if colon and port.isdigit() else text)
    return True


def _response(connection: h11.Connection, status: HTTPStatus, text: bytes, *, with_body: bool) -> Iterator[bytes]:
    """The answer in pieces; the text is not copied."""
    good = status is HTTPStatus.OK
    body = text if good else f"{status.value} {status.phrase}: metrics are at {PATH.decode()}\n".encode()
    headers = [
        ("Content-Type", METRICS if good else PLAIN),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET, HEAD"))
    yield connection.send(h11.Response(status_code=status.value, headers=headers, reason=status.phrase)) or b""
    if with_body:
        yield body
