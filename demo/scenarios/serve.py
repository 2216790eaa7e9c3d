"""Two guests' web servers serve static files to a load generator on the host."""

import random
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from demo.guests import MANIFEST, GuestError, GuestImage, build_image, read_file
from demo.scenarios.scenario import Scenario
from demo.scenarios.stage import Stage

GUESTS = 2
HTTP_PORT = 80
REQUESTS = 40_000
"""Per guest, of some 20,000 documents: more than its RAM holds."""

REQUESTS_PER_CONNECTION = 50
DOCUMENTS = "/usr/share/doc"
ANSWER_SECONDS = 30.0
PLAIN = r"[a-zA-Z0-9._/-]+"
START = (
    "printf 'events {}\\nhttp { access_log off; server { listen 80; root " + DOCUMENTS + "; } }\\n' >/run/nginx.conf"
    " && nginx -c /run/nginx.conf"
)


def free_port() -> int:
    """A TCP port of the host that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def list_documents(image: GuestImage) -> list[str]:
    """Paths below the server's root of all files that a URL can name as they are, from the image's manifest."""
    root = f"{DOCUMENTS}/"
    paths = (line.split("  ", 1)[1] for line in read_file(image.disk, MANIFEST).decode().splitlines())
    return [path.removeprefix(root) for path in paths if path.startswith(root) and re.fullmatch(PLAIN, path)]


async def request_all(port: int, paths: Sequence[str]) -> int:
    """Gets each path from the web server at ``port`` and returns the number of bytes. Raises GuestError."""
    total = 0
    for start in range(0, len(paths), REQUESTS_PER_CONNECTION):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            reader = _Answers(stream)
            for path in paths[start : start + REQUESTS_PER_CONNECTION]:
                with trio.fail_after(ANSWER_SECONDS):
                    await stream.send_all(b"GET /%s HTTP/1.1\r\nHost: guest\r\n\r\n" % path.encode())
                    total += await reader.read(path)
    return total


class _Answers:
    """Reads answers that state their length, one after the other, from one connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def read(self, path: str) -> int:
        """The length of the next answer's body."""
        while b"\r\n\r\n" not in self._buffer:
            await self._fill(path)
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status, *fields = head.decode("latin-1").split("\r\n")
        headers = dict(field.lower().split(": ", 1) for field in fields)
        if status.split(" ")[1] != "200":
            raise GuestError(f"/{path}: the guest's web server says {status!r}")
        length = int(headers["content-length"])
        while len(self._buffer) < length:
            await self._fill(path)
        self._buffer = self._buffer[length:]
        return length

    async def _fill(self, path: str) -> None:
        data = await self._stream.receive_some(1 << 18)
        if not data:
            raise GuestError(f"/{path}: the guest's web server closed the connection")
        self._buffer += data


async def serve(stage: Stage, image: GuestImage, name: str, seed: int, until: trio.Event | None = None) -> None:
    """A guest that serves REQUESTS requests for documents chosen by ``seed``; with ``until``, as many as it takes."""
    port = free_port()
    async with stage.guest("serve", image, name, {port: HTTP_PORT}) as guest:
        await guest.run(START)
        documents = list_documents(image)
        order = random.Random(seed)
        asked = 0
        while not until.is_set() if until else asked < REQUESTS:
            asked += REQUESTS_PER_CONNECTION
            await request_all(port, order.choices(documents, k=REQUESTS_PER_CONNECTION))
        stage.mark(f"{name} has served {asked} requests")
        await guest.shut_down()


class Serve(Scenario):
    """See the module."""

    summary = "two guests' web servers serve the same static files"
    last_start = "last guest starts"

    def prepare(self, cache: Path) -> Mapping[str, Path]:
        self._image: GuestImage = build_image("serve", cache)
        return {"serve": self._image.disk}

    async def play(self, stage: Stage) -> float:
        guests = stage.settings.guests or GUESTS

        async def live(number: int) -> None:
            await trio.sleep(number * stage.settings.stagger_seconds)
            if number == guests - 1:
                stage.mark(self.last_start)
            await serve(stage, self._image, f"guest{number + 1}", seed=number)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(guests):
                nursery.start_soon(live, number)
        return trio.current_time() - began
