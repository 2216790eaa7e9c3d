"""A stand-in for libudedup.so: the real protocol over a real socket, with Python buffers as the process's memory.

It behaves like the real agent as far as the engine can see: it reports pages that did not change since its previous
round, compares before it merges, keeps runs and drop records. It runs in a thread, so tests can use it around a trio
engine. Subclasses misbehave in one way each.
"""

import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from udedup._native import ffi, lib

PAGE = 4096
HEADER = struct.Struct("<IHHIiQ")
END = 1 << 47
"""Above all addresses."""


def page(number: int) -> bytes:
    """A page that is equal to others with the same number only."""
    return number.to_bytes(8, "little") * (PAGE // 8)


class FakeAgent:
    """One agent. ``memory`` maps page addresses to contents."""

    def __init__(self, path: Path, memory: dict[int, bytes], *, flags: int = 0, label: str = "") -> None:
        self.memory = memory
        self.placed: dict[int, tuple[int, int]] = {}
        """Merged pages: address → (segment, slot)."""
        self.segments: dict[int, mmap.mmap] = {}
        """By number; negative ones are of an earlier engine (see :meth:`successor`)."""
        self.memfds: dict[int, int] = {}
        """Their descriptors, those of a fork child excepted."""
        self.device = 0
        self.inodes: dict[int, int] = {}
        """Of an earlier engine's segments."""
        self.handed: int | None = None
        """A descriptor to go with the next answer."""
        self.requests: list[int] = []
        """Types of all requests so far."""
        self.run_lengths: list[int] = []
        """Pages of each run the engine asked to be merged."""
        self.refused = ""
        self.farewell: str | None = None
        self.checksums: dict[int, int] = {}
        self.cursor = 0
        self.reported = END
        """During a count of runs: end of what was reported."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(str(path))
        self.huge: set[int] = set()
        """Addresses of what it says are huge pages; a merge splits them."""
        self.zeroed: set[int] = set()
        """Zero pages of huge pages that it merged by itself."""
        self.engine_id = (0, 0)
        self.area: mmap.mmap
        self._flags = flags
        self._label = label
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    # ---- joining ----

    def hello(self) -> bytes:
        """UDD_HELLO."""
        message = ffi.new("struct udd_hello *")
        message.header.magic, message.header.type = lib.UDD_MAGIC, lib.UDD_HELLO
        message.version = lib.UDD_WIRE_VERSION
        message.flags = self._flags
        message.engine_id = self.engine_id
        message.label = self._label.encode()
        message.command = b"fake"
        return bytes(ffi.buffer(message))

    def join(self) -> "FakeAgent":
        """Says hello, takes the shared area and starts to serve. Blocks, so call it in a thread."""
        self.sock.send(self.hello())
        packet, descriptors, _, _ = socket.recv_fds(self.sock, 65536, 4)
        kind = HEADER.unpack_from(packet)[1]
        if kind == lib.UDD_REFUSED:
            self.refused = packet[HEADER.size :].split(b"\0", 1)[0].decode()
            return self
        assert kind == lib.UDD_WELCOME
        welcome = ffi.from_buffer("struct udd_welcome *", packet)
        self.engine_id = (welcome.engine_id[0], welcome.engine_id[1])
        self.descriptors = len(descriptors)
        self.area = mmap.mmap(descriptors[0], lib.UDD_SHARED_BYTES)
        for descriptor in descriptors:
            os.close(descriptor)
        self.base = ffi.cast("char *", ffi.from_buffer(self.area))
        self.stats = ffi.cast("struct udd_stats *", self.base + lib.UDD_SHARED_STATS)
        self.hints = ffi.cast("struct udd_hint_ring *", self.base + lib.UDD_SHARED_HINTS)
        self.drops = ffi.cast("struct udd_drop_ring *", self.base + lib.UDD_SHARED_DROPS)
        self.stats.merging = 1
        self._thread.start()
        return self

    def leave(self) -> None:
        """Closes the connection."""
        self.sock.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(5)
        self.sock.close()
        self.forget_descriptors()

    def forget_descriptors(self) -> None:
        """As a fork child has none."""
        for descriptor in self.memfds.values():
            os.close(descriptor)
        self.memfds.clear()

    def successor(self, path: Path, *, flags: int | None = None) -> "FakeAgent":
        """This process as it joins the engine at ``path``, after this one's is gone. What was merged still is."""
        heir = type(self)(path, self.memory, flags=lib.UDD_HELLO_REJOIN if flags is None else flags, label=self._label)
        heir.engine_id = self.engine_id
        heir.placed = {address: (-abs(segment), slot) for address, (segment, slot) in self.placed.items()}
        heir.segments = {-abs(number): memory for number, memory in self.segments.items()}
        for number, descriptor in self.memfds.items():
            heir.device, heir.inodes[-abs(number)] = os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino
        heir.memfds = {-abs(number): descriptor for number, descriptor in self.memfds.items()}
        self.memfds = {}
        heir.reported = 0
        return heir

    # ---- the application's side ----

    def hint(
        self, address: int, length: int, *, inode: int = 0, offset: int = 2**64 - 1, written: bool = False
    ) -> None:
        """A read of ``length`` bytes to ``address`` is complete, or a write (``written``) from there."""
        ticket = self.hints.head
        self.hints.head = ticket + 1
        slot = self.hints.slots[ticket % lib.UDD_HINT_SLOTS]
        slot.address, slot.length = address, length
        slot.flags = lib.UDD_HINT_WRITE if written else 0
        slot.inode, slot.offset = inode, offset
        slot.nanoseconds = time.monotonic_ns() | (1 << 63 if inode else 0)
        slot.sequence = ticket + 1
        if self.hints.waiting:
            self.hints.waiting = 0
            self.sock.send(HEADER.pack(lib.UDD_MAGIC, lib.UDD_DOORBELL, 0, 0, 0, 0))

    def write(self, address: int, content: bytes) -> None:
        """The application writes to a page, breaking it if it is merged."""
        with self._lock:
            self.memory[address] = content
            self.drop(address)

    def drop(self, address: int) -> None:
        """A page is no longer merged."""
        if address in self.placed:
            segment, slot = self.placed.pop(address)
            self.push_drop(address, segment, slot)

    def push_drop(self, address: int, segment: int, slot: int, pages: int = 1) -> None:
        """One record for the engine; during a count of runs only of what it was told of."""
        if address >= self.reported or segment < 0:
            return
        record = self.drops.slots[self.drops.head % lib.UDD_DROP_SLOTS]
        record.address, record.segment, record.slot, record.pages, record.flags = address, segment, slot, pages, 1
        self.drops.head += 1

    def read(self, address: int) -> bytes:
        """What the application sees: through the store if merged."""
        with self._lock:
            if address not in self.placed:
                return self.memory[address]
            segment, slot = self.placed[address]
            return self.segments[segment][slot * PAGE : (slot + 1) * PAGE]

    # ---- requests ----

    def _serve(self) -> None:
        while True:
            try:
                packet, descriptors, _, _ = socket.recv_fds(self.sock, 262144, 4)
            except ConnectionResetError:
                # The engine closed with an answer of ours unread; its last message is still to come.
                continue
            except OSError:
                return
            if not packet:
                return
            _, kind, count, sequence, _, _ = HEADER.unpack_from(packet)
            self.requests.append(kind)
            if kind == lib.UDD_BYE:
                self.farewell = packet[HEADER.size :].split(b"\0", 1)[0].decode()
                return
            with self._lock:
                answer = self.answer(kind, count, packet, descriptors)
            if answer is None:
                continue
            status, items, value, body = answer
            handed, self.handed = self.handed, None
            message = HEADER.pack(lib.UDD_MAGIC, lib.UDD_DONE, items, sequence, status, value) + body
            try:
                socket.send_fds(self.sock, [message], [] if handed is None else [handed])
            except BrokenPipeError:
                continue

    def answer(
        self, kind: int, count: int, packet: bytes, descriptors: list[int]
    ) -> tuple[int, int, int, bytes] | None:
        """(status, count, value, body) of the answer, None for silence."""
        handlers: dict[int, Callable[[int, bytes], tuple[int, int, int, bytes]]] = {
            lib.UDD_SCAN: self.on_scan,
            lib.UDD_VISIT: self.on_visit,
            lib.UDD_COPY: self.on_copy,
            lib.UDD_HUGE: self.on_huge,
            lib.UDD_MERGE: self.on_merge,
            lib.UDD_UNMERGE: self.on_unmerge,
            lib.UDD_RUNS: self.on_runs,
            lib.UDD_SEGMENT_DROP: self.on_segment_drop,
            lib.UDD_HANDOVER: self.on_handover,
        }
        if kind == lib.UDD_SEGMENT:
            return self.on_segment(packet, descriptors)
        return handlers[kind](count, packet)

    def on_segment(self, packet: bytes, descriptors: list[int]) -> tuple[int, int, int, bytes]:
        number = struct.unpack_from("<I", packet, HEADER.size)[0]
        self.segments[number] = mmap.mmap(descriptors[0], lib.UDD_SEGMENT_BYTES, prot=mmap.PROT_READ)
        self.memfds[number] = descriptors[0]
        for old in [old for old in self.inodes if self.inodes[old] == os.fstat(descriptors[0]).st_ino]:
            self.placed = {
                address: (number if segment == old else segment, slot)
                for address, (segment, slot) in self.placed.items()
            }
            del self.segments[old], self.inodes[old]
            if old in self.memfds:
                os.close(self.memfds.pop(old))
            self.reported = 0
            return 0, 0, 1, b""
        return 0, 0, 0, b""

    def on_handover(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        cursor = struct.unpack_from("<Q", packet, HEADER.size)[0]
        for old in sorted(self.inodes, reverse=True):
            if -old > cursor:
                self.handed = self.memfds.get(old)
                return 0, 1, -old, struct.pack("<QQ", self.device, self.inodes[old])
        return 0, 0, 0, bytes(16)

    def on_segment_drop(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        number = struct.unpack_from("<I", packet, HEADER.size)[0]
        if any(segment == number for segment, _ in self.placed.values()):
            return -16, 0, 0, b""
        self.segments.pop(number).close()
        os.close(self.memfds.pop(number))
        return 0, 0, 0, b""

    def report(self, address: int, flags: int) -> bytes:
        """struct udd_report, without a copy."""
        if address in self.placed:
            return struct.pack("<QQQQ", address, 0, 0, lib.UDD_REPORT_MERGED | flags)
        if self.memory[address] == bytes(PAGE):
            flags |= lib.UDD_REPORT_ZERO
        digest = xxhash.xxh3_128_intdigest(self.memory[address])
        return struct.pack("<QQQQ", address, digest & (2**64 - 1), digest >> 64, flags)

    def on_scan(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        pages = struct.unpack_from("<I", packet, HEADER.size)[0]
        addresses = sorted(address for address in self.memory if address >= self.cursor)
        reports = []
        visited = changed = 0
        for address in addresses[:pages]:
            if len(reports) == lib.UDD_REPORTS_MAX:
                break
            visited += 1
            checksum = xxhash.xxh3_64_intdigest(self.memory[address])
            if self.checksums.get(address) != checksum:
                self.checksums[address] = checksum
                changed += 1
            elif address not in self.placed and address not in self.zeroed:
                reports.append(self.report(address, 0))
        rest = addresses[visited:]
        self.cursor = rest[0] if rest else 0
        head = struct.pack("<IIII", visited, changed, 0, not rest)
        return 0, len(reports), 0, head + b"".join(reports)

    def on_visit(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        pages = self.ranges(count, packet)
        if HEADER.unpack_from(packet)[5]:
            for address in pages:
                if self.memory.get(address) == bytes(PAGE):
                    self.zeroed.add(address)
                    self.huge.discard(self.huge_page(address))
            pages = [address for address in pages if address not in self.zeroed]
        reports = [self.report(address, lib.UDD_REPORT_HINTED) for address in pages if address in self.memory]
        return 0, len(reports), 0, struct.pack("<IIII", len(pages), 0, 0, 0) + b"".join(reports)

    def ranges(self, count: int, packet: bytes) -> list[int]:
        """All page addresses in a request's ranges."""
        pages = []
        for i in range(count):
            address, length = struct.unpack_from("<QQ", packet, HEADER.size + 16 * i)
            pages += [address + PAGE * n for n in range(length)]
        return pages

    def on_copy(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        valid = 0
        for i, address in enumerate(self.ranges(count, packet)):
            if address in self.memory:
                start = lib.UDD_SHARED_COPY + i * PAGE
                self.area[start : start + PAGE] = self.memory[address]
                valid |= 1 << i
        return 0, 0, 0, valid.to_bytes(8 * lib.UDD_COPY_WORDS, "little")

    def on_huge(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        addresses = struct.unpack_from(f"<{count}Q", packet, HEADER.size)
        huge = sum(1 << i for i, address in enumerate(addresses) if self.huge_page(address) in self.huge)
        return 0, 0, 0, huge.to_bytes(lib.UDD_ITEMS_MAX // 8, "little")

    def huge_page(self, address: int) -> int:
        """Start of the huge page that an address would be in."""
        return address - address % int(lib.UDD_HUGE_BYTES)

    def runs(self, count: int, packet: bytes) -> list[tuple[int, int, int, int]]:
        """(address, pages, segment, slot)."""
        return [struct.unpack_from("<QIIIxxxx", packet, HEADER.size + 24 * i) for i in range(count)]

    def on_merge(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        results = b""
        for address, pages, segment, slot in self.runs(count, packet):
            self.run_lengths.append(pages)
            merged = mismatch = gone = 0
            for i in range(pages):
                at = address + i * PAGE
                content = self.segments[segment][(slot + i) * PAGE : (slot + i + 1) * PAGE]
                if at not in self.memory:
                    gone |= 1 << i
                elif self.memory[at] != content:
                    mismatch |= 1 << i
                else:
                    self.drop(at)
                    self.placed[at] = (segment, slot + i)
                    self.huge.discard(self.huge_page(at))
                    merged |= 1 << i
            results += struct.pack("<QQQQQ", merged, mismatch, 0, gone, 0)
        self.stats.pages_merged = len(self.placed)
        return 0, count, 0, results

    def on_unmerge(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        pages = list(self.placed)
        for address in pages:
            self.drop(address)
        return 0, 0, len(pages), b""

    def on_runs(self, count: int, packet: bytes) -> tuple[int, int, int, bytes]:
        cursor = struct.unpack_from("<Q", packet, HEADER.size)[0]
        # The lock is held over one answer only, so drops may come between two of them.
        if HEADER.unpack_from(packet)[5] == 1 and cursor == 0:
            self.reported = 0
        items = [
            struct.pack("<QIIIxxxx", address, 1, *self.placed[address])
            for address in sorted(self.placed)
            if address >= cursor and self.placed[address][0] > 0
        ][: lib.UDD_ITEMS_MAX]
        if HEADER.unpack_from(packet)[5] == 1:
            self.reported = struct.unpack_from("<Q", items[-1])[0] + PAGE if items else END
        return 0, len(items), self.drops.head, b"".join(items)
