"""Hostile clients, each in a process of its own: ``python -m engine.hostile SOCKET KIND``.

Each does one thing as fast as it can until it is killed; if the engine drops it, it comes back.
"""

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from engine.fake_agent import HEADER, PAGE, FakeAgent, page

from udedup._native import lib
from udedup.engine.control import request

BASE = 0x10000000


class Flooder(FakeAgent):
    """Hints without end, on ever other pages, as large as can be."""

    def attack(self) -> None:
        lap = 0
        while self.alive:
            for _ in range(500):
                lap += 1
                self.hint((lap << 31) % (1 << 47), (1 << 31) - 1)
            time.sleep(0.001)

    @property
    def alive(self) -> bool:
        return self.farewell is None and self._thread.is_alive()


class Mute(Flooder):
    """The same, and never a word on what it is asked about them."""

    def on_visit(self, count: int, packet: bytes) -> Any:
        return None


class Dawdler(Flooder):
    """The same, and answers everything just before others lose their patience."""

    def answer(self, kind: int, count: int, packet: bytes, descriptors: list[int]) -> Any:
        time.sleep(0.019)
        return super().answer(kind, count, packet, descriptors)


class Endless(Flooder):
    """Has no hints, but memory that never ends."""

    def attack(self) -> None:
        while self.alive:
            time.sleep(0.01)

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        pages = struct.unpack_from("<I", packet, HEADER.size)[0]
        self.cursor += pages * PAGE
        reports = b"".join(
            struct.pack("<QQQQ", (self.cursor + i * PAGE) % (1 << 47), self.cursor + i, 1, 0) for i in range(pages)
        )
        return 0, pages, 0, struct.pack("<IIII", pages, 0, 0, 0) + reports


class Honest(Endless):
    """No hints, and as many pages as such a process has; they don't change."""

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        pages = min(struct.unpack_from("<I", packet, HEADER.size)[0], resident - self.cursor)
        self.cursor = (self.cursor + pages) % resident
        return 0, 0, 0, struct.pack("<IIII", pages, 0, 0, self.cursor == 0)


class Idler(Endless):
    """Visits nothing, and is never at the end."""

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        return 0, 0, 0, struct.pack("<IIII", 0, 0, 0, 0)


class Publisher(Endless):
    """Each page twice, so that it gets into the store, though there is no memory behind it."""

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        pages = struct.unpack_from("<I", packet, HEADER.size)[0]
        self.cursor += pages * PAGE
        self.memory = {(self.cursor + i * PAGE) % (1 << 47): page(self.cursor + i // 2) for i in range(pages)}
        reports = b"".join(self.report(address, 0) for address in sorted(self.memory))
        return 0, pages, 0, struct.pack("<IIII", pages, 0, 0, 0) + reports


class Hoarder(Publisher):
    """The same, and never lets go of what it says it has merged."""

    def drop(self, address: int) -> None:
        self.placed.pop(address, None)

    def on_merge(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        results = b"".join(
            struct.pack("<QQQQQ", (1 << pages) - 1, 0, 0, 0, 0) for _, pages, _, _ in self.runs(count, packet)
        )
        return 0, count, 0, results


class Forger(Endless):
    """Says of every page that it is its own and merged, and gives back what it never had."""

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        for i in range(64):
            self.push_drop((1 << 40) + i * PAGE, 1 + i, i, 4096)
        return super().on_scan(count, packet)


class Replayer(Endless):
    """Answers each request twice."""

    def answer(self, kind: int, count: int, packet: bytes, descriptors: list[int]) -> Any:
        answer = super().answer(kind, count, packet, descriptors)
        if answer is not None:
            status, items, value, body = answer
            sequence = HEADER.unpack_from(packet)[3]
            self.sock.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_DONE, items, sequence, status, value) + body)
        return answer


class Unread(Flooder):
    """Hints, and never reads what it is asked for them."""

    def _serve(self) -> None:
        threading.Event().wait()


class Smuggler(Endless):
    """Sends a descriptor with each answer that must have none."""

    wrong: ClassVar[int] = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def answer(self, kind: int, count: int, packet: bytes, descriptors: list[int]) -> Any:
        self.handed = self.wrong
        return super().answer(kind, count, packet, descriptors)


def serve(kind: type[Flooder], path: Path) -> None:
    agent = kind(path, {BASE + i * PAGE: page(i) for i in range(1000)}).join()
    if not agent.refused:
        agent.attack()
        agent.sock.close()


def come_and_go(path: Path) -> None:
    """Joins, and is gone."""
    FakeAgent(path, {}).join().leave()


def ask(path: Path) -> None:
    """A control client that can't hear enough."""
    request(path, {"op": "status", "kernel": True})


def say_nothing(path: Path) -> None:
    """Connections that say nothing, as many as there can be; others that never read."""
    held = []
    try:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            held.append(sock)
            sock.connect(str(path))
            if len(held) % 2:
                sock.send(FakeAgent.hello(FakeAgent(path, {})))
    except OSError:
        time.sleep(0.5)
    finally:
        for sock in held:
            sock.close()


def garbage(path: Path) -> None:
    """Noise."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(path))
        sock.send(os.urandom(2000))
        sock.recv(1000)


def repeat(act: Callable[[Path], None]) -> Callable[[Path], None]:
    """Over and over, by several threads at a time."""

    def go_on(path: Path) -> None:
        while True:
            try:
                act(path)
            except OSError:
                time.sleep(0.01)

    def act_all(path: Path) -> None:
        for _ in range(3):
            threading.Thread(target=go_on, args=(path,), daemon=True).start()
        go_on(path)

    return act_all


def agents(kind: type[Flooder]) -> Callable[[Path], None]:
    """One such agent after the other."""

    def go_on(path: Path) -> None:
        while True:
            with contextlib.suppress(OSError):
                serve(kind, path)

    return go_on


KINDS: dict[str, Callable[[Path], None]] = {
    "honest": agents(Honest),
    "flooder": agents(Flooder),
    "mute": agents(Mute),
    "dawdler": agents(Dawdler),
    "endless": agents(Endless),
    "idler": agents(Idler),
    "publisher": agents(Publisher),
    "hoarder": agents(Hoarder),
    "forger": agents(Forger),
    "replayer": agents(Replayer),
    "unread": agents(Unread),
    "smuggler": agents(Smuggler),
    "come-and-go": repeat(come_and_go),
    "ask": repeat(ask),
    "say-nothing": repeat(say_nothing),
    "garbage": repeat(garbage),
}

if __name__ == "__main__":
    # So that the noise it makes is its own: what is measured runs on the other processors first.
    os.nice(10)
    KINDS[sys.argv[2]](Path(sys.argv[1]))
