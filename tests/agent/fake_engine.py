"""An engine in the test's hands: speaks the protocol of native/common/wire.h, rightly or not, to a real agent."""

import array
import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from udedup._native import ffi, lib

HEADER = struct.Struct("<IHHIiQ")
PAGE = 4096
SEALS = 0x2 | 0x4 | 0x10
"""F_SEAL_SHRINK, GROW, FUTURE_WRITE."""
ADD_SEALS = 1033
SLOTS = 128


class FakeEngine:
    """Listens at ``path`` and serves one agent, as far as it is told to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._listener.settimeout(40)
        self._sequence = 0
        self.link: socket.socket

    def take_hello(self) -> bytes:
        """Waits for an agent and for what it says first."""
        self.link, _ = self._listener.accept()
        self.link.settimeout(20)
        return self.link.recv(65536)

    def is_called_within(self, seconds: float) -> bool:
        """Whether an agent connects in that time."""
        return bool(select.select([self._listener], [], [], seconds)[0])

    def accept(self, *, flags: int = 0, engine_id: tuple[int, int] = (11, 22)) -> bytes:
        """Takes an agent's hello and welcomes it; returns the hello."""
        hello = self.take_hello()
        welcome = ffi.new("struct udd_welcome *")
        welcome.header.magic, welcome.header.type = lib.UDD_MAGIC, lib.UDD_WELCOME
        welcome.engine_id = engine_id
        welcome.agent_id, welcome.flags, welcome.vma_limit, welcome.holdoff_ms = 1, flags, 60000, 0
        area = os.memfd_create("shared")
        os.ftruncate(area, lib.UDD_SHARED_BYTES)
        self.area = mmap.mmap(area, lib.UDD_SHARED_BYTES)
        self.send(bytes(ffi.buffer(welcome)), [area])
        os.close(area)
        return hello

    def send(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends whatever it is."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.link.sendmsg([packet], rights)

    def header(self, kind: int, count: int = 0, value: int = 0) -> bytes:
        """The next request's."""
        self._sequence += 1
        return HEADER.pack(lib.UDD_MAGIC, kind, count, self._sequence, 0, value)

    def answer(self) -> tuple[int, int, int, bytes]:
        """(status, count, value, body) of the answer to the last request."""
        while True:
            packet = self.link.recv(65536)
            assert packet, "the agent hung up"
            magic, kind, count, sequence, status, value = HEADER.unpack_from(packet)
            assert magic == lib.UDD_MAGIC
            if kind != lib.UDD_DOORBELL:
                assert (kind, sequence) == (lib.UDD_DONE, self._sequence)
                return status, count, value, packet[HEADER.size :]

    def request(
        self, kind: int, body: bytes = b"", count: int = 0, descriptors: Sequence[int] = ()
    ) -> tuple[int, int, int, bytes]:
        """Sends a request and returns its answer."""
        self.send(self.header(kind, count) + body, descriptors)
        return self.answer()

    def segment(
        self,
        number: int,
        content: bytes,
        *,
        seals: int = SEALS,
        writable: bool = False,
        slots: int = SLOTS,
        size: int = SLOTS * PAGE,
    ) -> int:
        """Offers a segment that starts with ``content``; returns the agent's status."""
        store = os.memfd_create("udedup-store", os.MFD_ALLOW_SEALING)
        os.ftruncate(store, size)
        os.pwrite(store, content, 0)
        if seals:
            fcntl.fcntl(store, ADD_SEALS, seals)
        given = os.open(f"/proc/self/fd/{store}", os.O_RDWR if writable else os.O_RDONLY)
        try:
            return self.request(lib.UDD_SEGMENT, struct.pack("<II", number, slots), descriptors=[given])[0]
        finally:
            os.close(given)
            os.close(store)

    def offer(self, number: int, descriptor: int, slots: int = SLOTS) -> tuple[int, int]:
        """Offers what is there already as a segment; returns the agent's status and value."""
        status, _, value, _ = self.request(lib.UDD_SEGMENT, struct.pack("<II", number, slots), descriptors=[descriptor])
        return status, value

    def handover(self, cursor: int = 0) -> tuple[int, int, list[int]]:
        """Asks for the next segment of an earlier engine: the next cursor (0: there is none), inode, descriptors."""
        self.send(self.header(lib.UDD_HANDOVER) + struct.pack("<Q", cursor))
        packet, descriptors, _, _ = socket.recv_fds(self.link, 65536, 4)
        _, kind, count, sequence, status, value = HEADER.unpack_from(packet)
        assert (kind, sequence, status) == (lib.UDD_DONE, self._sequence, 0)
        _, inode = struct.unpack_from("<QQ", packet, HEADER.size)
        return value if count else 0, inode, descriptors

    def merge(self, address: int, pages: int, segment: int = 1, slot: int = 0) -> tuple[int, int, int, int, int]:
        """Asks for one run to be merged; returns the masks merged, mismatch, busy, gone, no_vma."""
        run = struct.pack("<QIIII", address, pages, segment, slot, 0)
        status, count, _, body = self.request(lib.UDD_MERGE, run, 1)
        assert (status, count) == (0, 1)
        merged, mismatch, busy, gone, no_vma = struct.unpack("<QQQQQ", body)
        return merged, mismatch, busy, gone, no_vma

    def scan(self) -> bytes:
        """Lets the agent scan on, so that it knows its memory; returns the reports."""
        return self.request(lib.UDD_SCAN, struct.pack("<II", 1024, 0))[3]

    def hang_up(self) -> None:
        """Closes the connection."""
        self.link.close()

    def close(self) -> None:
        """Ends for good."""
        self._listener.close()
        self.link.close()
