"""The metrics' endpoint, and those who ask it: in good order, slowly, wrongly, and without end."""

import errno
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from udedup.engine import metrics
from udedup.engine.addresses import Loopback
from udedup.engine.metrics import CONNECTIONS, FRESH_SECONDS, REQUEST_BYTES, Endpoint, metrics_socket
from udedup.engine.shortage import Shortage
from udedup.errors import UdedupError

TEXT = b"# HELP x X.\n# TYPE x gauge\nx 1\n"
HOST = "127.77.1.1"
GET = b"GET /metrics HTTP/1.1\r\nHost: localhost:9105\r\n\r\n"

Open = Callable[[], Awaitable[trio.SocketStream]]


class Source:
    """Makes a text, and counts how often."""

    def __init__(self, text: bytes = TEXT) -> None:
        self.text = text
        self.made = 0
        self.fails: OSError | None = None

    async def render(self) -> bytes:
        self.made += 1
        await trio.lowlevel.checkpoint()
        if self.fails is not None:
            raise self.fails
        return self.text


@asynccontextmanager
async def serving(source: Source, address: Path | Loopback) -> AsyncIterator[Open]:
    """An endpoint; gives what connects to it."""
    with metrics_socket(address, None) as sock:

        async def connect() -> trio.SocketStream:
            client = trio.socket.socket(sock.family, socket.SOCK_STREAM)
            await client.connect(sock.getsockname())
            return trio.SocketStream(client)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(Endpoint(source.render, Shortage()).serve, sock)
            yield connect
            nursery.cancel_scope.cancel()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics"


def free_port(host: str) -> Loopback:
    """Where nobody listens; other programs hardly use any address but 127.0.0.1."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return Loopback(host, sock.getsockname()[1])


async def everything(stream: trio.SocketStream) -> bytes:
    """What is sent until the connection ends."""
    return b"".join([part async for part in stream])


async def ask(connect: Open, request: bytes = GET) -> tuple[int, bytes]:
    """Status and body of the answer, whose length is as it says."""
    async with await connect() as stream:
        await stream.send_all(request)
        head, _, body = (await everything(stream)).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert b"Connection: close" in lines
    if not request.startswith(b"HEAD"):
        assert f"Content-Length: {len(body)}".encode() in lines
    return int(lines[0].split()[1]), body


async def test_answer(path: Path) -> None:
    async with serving(Source(), path) as connect:
        assert await ask(connect) == (200, TEXT)
        assert await ask(connect, b"GET /metrics?x=1 HTTP/1.0\r\n\r\n") == (200, TEXT)
        assert await ask(connect, b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") == (200, b"")
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /metrics/../x HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1", 405),
        (b"\x16\x03\x01 what TLS begins with\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * REQUEST_BYTES, 431),
    ],
)
async def test_wrong_requests(path: Path, request_: bytes, status: int) -> None:
    source = Source()
    async with serving(source, path) as connect:
        found, body = await ask(connect, request_)
        assert found == status
        assert body.endswith(b": metrics are at /metrics\n")
        assert source.made == 0
        assert await ask(connect) == (200, TEXT)


BEGINNINGS = (GET[:-2], GET[:-2], b"GET ", b"CONNECT x:1 HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n", b"\x16\x03\x01")
WORDS = (
    *(b"/metrics ", b"http://localhost/metrics ", b"HTTP/1.1\r\n", b"HTTP/2.0\r\n", b"Host: localhost\r\n"),
    *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"5\r\n"),
    *(b"Expect: 100-continue\r\n", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"\r\n", b"\n", b"\0", b"\xff", b": "),
)


async def test_whatever_is_asked(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """There is an answer or none, and the next one is answered."""
    chance, answers = random.Random(1), set()
    async with serving(Source(), path) as connect:
        for _ in range(300):
            words = chance.choices((b"\r\n", *WORDS), k=chance.randrange(1, 8))
            request = chance.choice(BEGINNINGS) + b"".join(words)
            async with await connect() as stream:
                await stream.send_all(request)
                await stream.send_eof()
                answer = await everything(stream)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 "), request
                answers.add(answer[9:12])
        assert await ask(connect) == (200, TEXT)
    assert answers >= {b"200", b"400"}


async def test_texts_are_made_once_in_a_while(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """However many ask at once or one after the other."""
    source = Source()
    async with serving(source, path) as connect:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, connect)
        assert source.made == 1
        await trio.sleep(FRESH_SECONDS)
        await ask(connect)
        assert source.made == 2


async def test_silence_is_ended(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(Source(), path) as connect, await connect() as stream:
        began = trio.current_time()
        assert await everything(stream) == b""
        assert trio.current_time() - began == pytest.approx(metrics.REQUEST_SECONDS, abs=0.1)


async def test_a_request_in_drops_is_ended(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """However steadily it comes."""
    async with serving(Source(), path) as connect, await connect() as stream:
        began = trio.current_time()

        async def drip() -> None:
            for number in range(1000):
                await stream.send_all(GET[number % 20 : number % 20 + 1])
                await trio.sleep(0.1)

        with pytest.raises(trio.BrokenResourceError):
            await drip()
        assert trio.current_time() - began < metrics.REQUEST_SECONDS + 1


async def test_who_does_not_read_is_left(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """And all others are served meanwhile."""
    source = Source(bytes(64 << 20))
    async with serving(source, path) as connect, await connect() as stuck:
        await stuck.send_all(GET)
        await trio.sleep(1)
        began = trio.current_time()
        status, body = await ask(connect)
        assert (status, len(body)) == (200, 64 << 20)
        assert trio.current_time() - began < 1
        await trio.sleep(metrics.SEND_SECONDS)
        assert len(await everything(stuck)) < 64 << 20


async def test_more_than_there_is_room_for(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Those beyond wait until the silent ones have had their time."""
    async with serving(Source(), path) as connect:
        silent = [await connect() for _ in range(CONNECTIONS)]
        began = trio.current_time()
        assert await ask(connect) == (200, TEXT)
        assert 1 < trio.current_time() - began < metrics.REQUEST_SECONDS + 1
        for stream in silent:
            await stream.aclose()


async def test_who_leaves_at_once(path: Path) -> None:
    async with serving(Source(bytes(8 << 20)), path) as connect:
        for request in (b"", b"GET /met", GET):
            stream = await connect()
            await stream.send_all(request)
            await stream.aclose()
        assert (await ask(connect))[0] == 200


async def test_shortage(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Of descriptors: there is no text now, and there is one later."""
    source = Source()
    source.fails = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    async with serving(source, path) as connect:
        assert (await ask(connect))[0] == 503
        source.fails = None
        assert await ask(connect) == (200, TEXT)


# ---- loopback ----


@pytest.mark.parametrize("host", [HOST, "::1"])
async def test_loopback(host: str) -> None:
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    async with serving(Source(), free_port(host)) as connect:
        assert await ask(connect) == (200, TEXT)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:9105", 200),
        (b"127.0.0.1", 200),
        (b"[::1]:9105", 200),
        (b"[::1]", 200),
        (b"localhost", 200),
        (b"evil.example", 403),
        (b"evil.example:9105", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"localhost.evil.example:9105", 403),
        (b"10.0.0.1", 403),
        (b"", 403),
    ],
)
async def test_names_of_others_are_not_for_us(path: Path, host: bytes, status: int) -> None:
    """What a web page can have the user's browser ask, by a name of its own for this machine (DNS rebinding)."""
    source = Source()
    async with serving(source, path) as connect:
        assert (await ask(connect, b"GET /metrics HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"))[0] == status
        assert source.made == (status == 200)


def test_taken_addresses(path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with (
            pytest.raises(UdedupError, match=f"no metrics at 127.0.0.1:{port}: Address already in use; name another"),
            metrics_socket(Loopback("127.0.0.1", port), None),
        ):
            pass
    path.touch()
    with pytest.raises(UdedupError, match="is no socket: remove it, or name another with --metrics"):
        metrics_socket(path, None).__enter__()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9105", Loopback("127.0.0.1", 9105)),
        (":9105", Loopback("127.0.0.1", 9105)),
        ("localhost:1", Loopback("127.0.0.1", 1)),
        ("127.8.9.10:65535", Loopback("127.8.9.10", 65535)),
        ("[::1]:9105", Loopback("::1", 9105)),
    ],
)
def test_addresses(text: str, expected: Loopback) -> None:
    assert Loopback.parse(text) == expected
    assert Loopback.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "65536",
        "x",
        "127.0.0.1",
        "0.0.0.0:9105",
        "[::]:9105",
        "::1:9105",
        "10.0.0.1:9105",
        "a.example:9105",
        "-1",
    ],
)
def test_other_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"has no port|is no address of this machine alone"):
        Loopback.parse(text)
