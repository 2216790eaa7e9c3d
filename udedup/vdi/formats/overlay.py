"""A qcow2 file that is written: what a clone has of its own above a base that nobody writes.

Only what is needed for that: version 3, one reference to each cluster, neither snapshots nor compressed clusters nor
encryption. Anything else is refused when the file is opened. QEMU's own tools read and write what this leaves.

The file is never wrong on the disk, whatever reaches it in whatever order before the power goes:

- A write to a block that the file has goes where the block is. Any other goes to a cluster that nothing on the disk
  refers to; its reference count is written too, and the tables change in memory only.
- :meth:`Overlay.flush` first has all that reach the disk (fdatasync), then writes the tables' entries, each of which
  lies within one sector and so is old or new, then has those reach the disk. A table that is new is complete on the
  disk before the first level points to it.
- A cluster that is discarded is used again only after a flush has taken the last entry that points to it off the disk,
  and after those who were reading it have gone.

What is lost at worst is what was written after the last flush, and clusters that are counted but not referred to
(``qemu-img check -r leaks`` finds them).
"""

import errno
import logging
import struct
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import attrs

from udedup.errors import UdedupError
from udedup.vdi.formats.helper import Helper
from udedup.vdi.formats.layer import Extent, Layer, bad_map
from udedup.vdi.formats.qcow2 import (
    ALL_SUBCLUSTERS,
    FLAG_COMPRESSED,
    FLAG_COPIED,
    FLAG_ZERO,
    OFFSET_MASK,
    SUBCLUSTERS,
    Header,
    Qcow2,
)
from udedup.vdi.formats.tables import PAGE_BYTES, read_numbers, to_big_endian
from udedup.vdi.formats.writable import WritableFile

log = logging.getLogger(__name__)

INCOMPATIBLE_DIRTY: Final = 1 << 0
REFCOUNT_ORDER: Final = 4
"""Reference counts of 2^4 bits."""
COUNT_BYTES: Final = 2
PART_BYTES_MIN: Final = 4096
"""A block lies within one part, or a crash could leave it half in place and half not yet entered in a table."""
COUNTS_BYTES_MAX: Final = 8 << 20
"""QEMU's limit for the table of their blocks."""
TABLES_MAX: Final = 256
"""Second-level tables kept in memory; each is as large as a cluster."""
VECTORS_MAX: Final = 512
"""Buffers given to the kernel in one write (its own limit is 1024)."""


@attrs.frozen
class Counts:
    """Where the header says that the reference counts are."""

    offset: int
    """Bytes: of the table of blocks of counts."""
    clusters: int
    """Length of that table."""


def parse_counts(raw: bytes, header: Header, subject: str) -> Counts:
    """Reads from the file's first bytes what only a writer needs.

    Raises UdedupError, which begins with ``subject``, for a file that can't be written here.
    """
    if header.version < 3 or header.has_data_file or header.encryption is not None:
        raise UdedupError(f"{subject}: has a version, a data file or an encryption that clones can't have")
    offset, clusters, snapshots = struct.unpack_from(">QII", raw, 48)
    (incompatible,) = struct.unpack_from(">Q", raw, 72)
    (autoclear,) = struct.unpack_from(">Q", raw, 88)
    (order,) = struct.unpack_from(">I", raw, 96)
    if snapshots:
        raise UdedupError(f"{subject}: has internal snapshots, which clones can't have; convert it to a fresh qcow2")
    if incompatible & INCOMPATIBLE_DIRTY:
        raise UdedupError(f"{subject}: was not closed in order; repair it with `qemu-img check -r all`")
    if autoclear:
        raise UdedupError(f"{subject}: has bitmaps, which would no longer be true; remove them with `qemu-img bitmap`")
    if order != REFCOUNT_ORDER:
        raise UdedupError(f"{subject}: has reference counts of {1 << order} bits; clones have 16")
    cluster = 1 << header.cluster_bits
    if cluster // (SUBCLUSTERS if header.extended else 1) < PART_BYTES_MIN:
        raise UdedupError(f"{subject}: keeps parts of less than {PART_BYTES_MIN} bytes; give it larger clusters")
    if not offset or offset % cluster or not clusters or clusters * cluster > COUNTS_BYTES_MAX:
        raise UdedupError(f"{subject}: the table of its reference counts is not where it can be")
    # Of blocks, each of which has a cluster full of counts. What is discarded may stay in use beside what is new.
    if clusters * cluster // 8 * (cluster // COUNT_BYTES) * cluster < 2 * header.size:
        raise UdedupError(f"{subject}: its clusters of {cluster} bytes can't be counted; give it larger ones")
    return Counts(offset, clusters)


class Allocator:
    """Which clusters of the file are in use. In memory it is ahead of the disk in nothing: each count is written."""

    def __init__(self, file: WritableFile, counts: Counts, cluster_bits: int) -> None:
        """Reads all counts; waits for the disk. Raises OSError."""
        self._file = file
        self._counts = counts
        self._bits = cluster_bits
        self._cluster = 1 << cluster_bits
        self._per_block = self._cluster // COUNT_BYTES
        self._table = read_numbers(file, counts.offset, counts.clusters * self._cluster // 8, "Q")
        self._blocks: dict[int, array[int]] = {}
        for number, entry in enumerate(self._table):
            if entry:
                if entry % self._cluster:
                    raise bad_map(f"a block of reference counts is at byte {entry}")
                self._blocks[number] = read_numbers(file, entry, self._per_block, "H")
        self._next = 0
        """No cluster before this one is free."""

    def allocate(self) -> int:
        """Takes a free cluster and returns where it is, in bytes. Raises OSError; nothing has changed then."""
        while True:
            number, index = divmod(self._next, self._per_block)
            block = self._blocks.get(number)
            if block is None:
                self._add_block(number)
                continue
            try:
                index = block.index(0, index)
            except ValueError:
                self._next = (number + 1) * self._per_block
                continue
            self._set(number * self._per_block + index, 1)
            self._next = number * self._per_block + index + 1
            return (self._next - 1) << self._bits

    def ready(self, count: int) -> bool:
        """Whether the next ``count`` clusters can be had for nothing but writing that they are taken."""
        number, index = divmod(self._next, self._per_block)
        block = self._blocks.get(number)
        return block is not None and index + count <= self._per_block and not any(block[index : index + count])

    def free(self, offset: int) -> None:
        """Gives the cluster at byte ``offset`` back. Raises OSError; then it stays taken."""
        cluster = offset >> self._bits
        self._set(cluster, 0)
        self._next = min(self._next, cluster)
        self._file.punch(offset, self._cluster)

    def _set(self, cluster: int, count: int) -> None:
        number, index = divmod(cluster, self._per_block)
        self._file.write(self._table[number] + COUNT_BYTES * index, struct.pack(">H", count))
        self._blocks[number][index] = count

    def _add_block(self, number: int) -> None:
        """Adds a block of counts. It is the first of the clusters that it counts, none of which has been in use."""
        if number >= len(self._table):
            raise OSError(errno.ENOSPC, "its reference counts are all in use")
        offset = number * self._per_block << self._bits
        block = array("H", bytes(self._cluster))
        block[0] = 1
        self._file.write(offset, struct.pack(">H", 1) + bytes(self._cluster - COUNT_BYTES))
        self._file.sync()
        self._file.write(self._counts.offset + 8 * number, struct.pack(">Q", offset))
        self._table[number] = offset
        self._blocks[number] = block


class Table:
    """One second-level table in memory."""

    def __init__(self, offset: int, words: "array[int]", *, linked: bool) -> None:
        self.offset = offset
        """Bytes, in the file."""
        self.words = words
        """All its entries, changed or not."""
        self.linked = linked
        """Whether the first level on the disk points to it."""
        self.changed: set[int] = set()
        """Pages of PAGE_BYTES whose entries on the disk are older."""

    def put(self, start: int, words: "array[int]") -> None:
        """Changes the numbers from ``start`` on at once: others read them meanwhile."""
        self.words[start : start + len(words)] = words
        self.changed.update(range(8 * start // PAGE_BYTES, (8 * (start + len(words)) - 1) // PAGE_BYTES + 1))

    def page(self, number: int) -> "array[int]":
        """A copy of one page, of PAGE_BYTES or what there is."""
        return self.words[number * PAGE_BYTES // 8 : (number + 1) * PAGE_BYTES // 8]


class Readers:
    """Tells when all who were reading at some moment have gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = 0
        self._reading: Counter[int] = Counter()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Counts its body as one who reads."""
        with self._lock:
            epoch = self._epoch
            self._reading[epoch] += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading[epoch] -= 1
                if not self._reading[epoch]:
                    del self._reading[epoch]

    def turn(self) -> int:
        """Returns a name for this moment, for :meth:`gone`."""
        with self._lock:
            self._epoch += 1
            return self._epoch - 1

    def gone(self, moment: int) -> bool:
        """Whether nobody reads any more who did at that moment."""
        with self._lock:
            return not any(epoch <= moment for epoch in self._reading)


@attrs.frozen
class State:
    """What the file has of one cluster of the disk. A cluster has 32 subclusters, or one: itself."""

    host: int
    """Where it is, in bytes; 0: nowhere."""
    allocated: int
    """A bit for each subcluster that is there."""
    zero: int
    """A bit for each that is known to be zero."""


@attrs.frozen
class Pending:
    """What a flush brings to the disk: what the tables were when it began. They change meanwhile."""

    pages: "list[tuple[Table, dict[int, array[int]]]]"
    """Tables and those of their pages, by number, that the disk has older."""
    entries: dict[int, int]
    """Of the first level, by place."""
    dropped: list[int]
    """Clusters to which nothing points any more after it."""
    holes: set[tuple[int, int]]
    """(table, index) of clusters that have lost parts."""


class Overlay(Qcow2):
    """See above. Reads may come from any thread; whoever writes waits for the disk in a worker thread.

    Except :meth:`write_at_hand`, which goes on beside a flush, too. What it has written since that began is none of it.

    After a sync that failed nobody knows what is on the disk, and whatever was written since the one before may be
    gone: from then on writing and flushing fail with EIO.
    """

    def __init__(
        self, header: Header, counts: Counts, file: WritableFile, below: Layer | None, decoder: Helper
    ) -> None:
        """Waits for the disk. Raises OSError."""
        super().__init__(header, file, file, below, decoder)
        self.piece_bits = None
        self._writable = file
        self._allocator = Allocator(file, counts, header.cluster_bits)
        self._l1 = read_numbers(file, header.l1_offset, header.l1_entries, "Q")
        self._l1_changed: set[int] = set()
        self._loaded: dict[int, Table] = {}
        """By number: the place of the first level that points to it."""
        self._loading = threading.Lock()
        self._flushing = threading.Lock()
        """Held by a flush from beginning to end, and by whoever may wait for it. Taken before the next one."""
        self._writing = threading.Lock()
        """Protects tables, counts, and what a flush has to do; not held while anybody waits for a sync."""
        self._parts = SUBCLUSTERS if header.extended else 1
        self._part_bytes = self._cluster // self._parts
        self._all = (1 << self._parts) - 1
        self.readers = Readers()
        """Of this moment."""
        self._dropped: list[int] = []
        """Clusters that entries on the disk may still point to."""
        self._limbo: deque[tuple[int, int]] = deque()
        """(moment, cluster) of those that only readers may still know."""
        self._holes: set[tuple[int, int]] = set()
        """(table, index) of clusters that have lost parts and keep others."""
        self._behind = False
        """Whether something was written since the last sync."""
        self._failed = False

    # ---- reading ----

    def piece(self, offset: int, length: int) -> None:
        """Nobody may know where something is without being one of the readers."""

    def lookup(self, offset: int, length: int, *, wait: bool) -> Extent | None:
        number, within = divmod(offset, self._table_span)
        table = self._loaded.get(number)
        if table is None:
            if not self._l1[number] & OFFSET_MASK:
                return self.fall_through(offset, min(length, self._table_span - within), wait=wait)
            if not wait:
                return None
            table = self._load(number)
        index = within >> self._bits
        wanted = ((offset & self._mask) + length + self._mask) >> self._bits
        words = table.words[self._words * index : self._words * min(index + wanted, self._entries)]
        find = self._find_subclusters if self._words == 2 else self._find_clusters
        return find(words, offset, length, wait=wait)

    def read_cached(self, view: memoryview, offset: int) -> bool:
        with self.readers.one():
            return Layer.read_cached(self, view, offset)

    def read_into(self, view: memoryview, offset: int) -> None:
        with self.readers.one():
            super().read_into(view, offset)

    def forget(self) -> None:
        """The base has changed. What this file holds nobody else writes."""
        if self.below is not None:
            self.below.forget()

    def check_entries(self) -> None:
        """Looks through the whole map; waits for the disk. Raises OSError for what can't be written here."""
        for number, entry in enumerate(self._l1):
            if not entry & OFFSET_MASK:
                continue
            words = self._load(number).words
            for index in range(0, len(words), self._words):
                if words[index]:
                    self._state(words, index // self._words)
            self._loaded.clear()

    # ---- writing ----

    @property
    def behind(self) -> bool:
        """Whether a flush has something to do."""
        return self._behind or bool(self._dropped or self._l1_changed)

    def write(self, offset: int, data: bytes) -> None:
        """Writes ``data`` from byte ``offset`` on, which must be within the disk. Raises OSError."""
        with self._flushing:
            try:
                with self._changing():
                    self._write(offset, memoryview(data))
            except OSError as error:
                if error.errno != errno.ENOSPC or not (self._dropped or self._holes or self._limbo):
                    raise
                # There may be room in what was discarded.
                self._flush()
                with self._changing():
                    self._write(offset, memoryview(data))

    def write_at_hand(self, offset: int, data: bytes) -> bool:
        """:meth:`write` if that takes nothing but giving the data to the kernel, and nobody is in the way.

        False if it does, or can't be done; nothing has changed then that anybody could see.
        """
        if not self._writing.acquire(blocking=False):
            return False
        try:
            if self._failed or not self._at_hand(offset, len(data)):
                return False
            self._write(offset, memoryview(data))
        except OSError as error:
            # What stays in the way :meth:`write` finds, too; for want of room it can do something.
            log.debug("%s: can't be written at once: %s", self._writable.path, error.strerror)
            return False
        finally:
            self._writing.release()
        return True

    def zero(self, offset: int, length: int) -> None:
        """Makes [offset, offset + length) read as zeros and gives back the room it took. Raises OSError."""
        part = self._part_bytes
        with self._flushing, self._changing():
            end = offset + length
            first, last = -(-offset // part) * part, end // part * part
            if end == self.size:
                # What follows the last byte is nobody's.
                last = -(-end // part) * part
            if first > last:
                self._write_zeros(offset, end)
                return
            self._write_zeros(offset, min(first, end))
            self._write_zeros(last, end)
            while first < last:
                number, within = divmod(first, self._table_span)
                upto = min(last, (number + 1) * self._table_span)
                # A new table only where it says something: a guest discards the whole of a disk that is new to it.
                if self._l1[number] & OFFSET_MASK or not self._zero_below(first, upto):
                    self._clear(number, within, within + upto - first)
                first = upto

    def _zero_below(self, start: int, end: int) -> bool:
        """Whether the layers below are known to have nothing but zeros in a stretch."""
        end = 0 if self.below is None else min(end, self.below.size)
        while start < end:
            assert self.below is not None
            data, length = self.below.stretch(start, end - start)
            if data:
                return False
            start += length
        return True

    def flush(self) -> None:
        """Returns once all that was written before is on the disk for good. Raises OSError."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        with self._changing():
            pending = self._take_pending()
        try:
            if pending.pages or pending.entries:
                self._write_tables(pending, linked=False)
                self._sync()
                self._write_tables(pending, linked=True)
                for number, entry in pending.entries.items():
                    self._put(self.header.l1_offset + 8 * number, struct.pack(">Q", entry))
            if self._behind:
                self._sync()
        except BaseException:
            with self._writing:
                self._take_back(pending)
            raise
        with self._changing():
            for number in pending.entries:
                self._loaded[number].linked = True
            self._give_back(pending)
            if len(self._loaded) > TABLES_MAX:
                # Others' tables have changed since, and the disk doesn't have them.
                kept = {number: table for number, table in self._loaded.items() if table.changed or not table.linked}
                self._loaded = kept

    def _take_pending(self) -> Pending:
        tables = [table for table in self._loaded.values() if table.changed]
        pending = Pending(
            pages=[(table, {page: table.page(page) for page in sorted(table.changed)}) for table in tables],
            entries={number: self._l1[number] for number in sorted(self._l1_changed)},
            dropped=self._dropped,
            holes=self._holes,
        )
        for table in tables:
            table.changed.clear()
        self._l1_changed, self._dropped, self._holes = set(), [], set()
        return pending

    def _take_back(self, pending: Pending) -> None:
        """For the next flush, when this one has failed."""
        for table, pages in pending.pages:
            table.changed.update(pages)
        self._l1_changed.update(pending.entries)
        self._dropped += pending.dropped
        self._holes |= pending.holes
        self._behind = True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._writing:
            if self._failed:
                raise OSError(errno.EIO, "a sync failed before, and what is on the disk is not known")
            yield

    def _sync(self) -> None:
        # First: what is written meanwhile may or may not be part of it.
        self._behind = False
        try:
            self._writable.sync()
        except BaseException:
            self._failed = True
            raise

    def _put(self, offset: int, *data: bytes | memoryview) -> None:
        try:
            self._writable.write(offset, *data)
        finally:
            # Not before: a sync that begins in between would take it for done.
            self._behind = True

    def _write_tables(self, pending: Pending, *, linked: bool) -> None:
        for table, pages in pending.pages:
            if table.linked is linked:
                for page, words in pages.items():
                    self._put(table.offset + page * PAGE_BYTES, to_big_endian(words))

    def _write_zeros(self, start: int, end: int) -> None:
        """Writes zeros to a stretch within one part, unless it is zero."""
        if start >= end:
            return
        number, within = divmod(start, self._table_span)
        table = self._table(number)
        state = self._state(table.words, within >> self._bits)
        if not state.zero >> (start & self._mask) // self._part_bytes & 1:
            self._write(start, memoryview(bytes(end - start)))

    def _at_hand(self, offset: int, length: int) -> bool:
        """Whether writing this takes neither a table to be loaded, nor what is around the data, nor a new block."""
        fresh = 0
        for start in range(offset - (offset & self._mask), offset + length, self._cluster):
            number, place = divmod(start, self._table_span)
            table = self._loaded.get(number)
            if table is None:
                return False
            state = self._state(table.words, place >> self._bits)
            low, high = max(offset - start, 0), min(offset + length - start, self._cluster)
            missing = self._parts_of(low, high) & ~state.allocated
            if missing and (low % self._part_bytes or high % self._part_bytes):
                return False
            fresh += not state.host
        return not fresh or self._allocator.ready(fresh)

    def _parts_of(self, low: int, high: int) -> int:
        """A bit for each part of a cluster that has some of its bytes [low, high)."""
        return (2 << (high - 1) // self._part_bytes) - (1 << low // self._part_bytes)

    def _write(self, offset: int, data: memoryview) -> None:
        taken: list[int] = []
        pieces: list[tuple[int, bytes | memoryview]] = []
        changes: list[tuple[Table, int, State]] = []
        done = 0
        try:
            while done < len(data):
                start = offset + done
                within = start & self._mask
                count = min(len(data) - done, self._cluster - within)
                number, place = divmod(start, self._table_span)
                table, index = self._table(number), place >> self._bits
                state = self._state(table.words, index)
                written = self._parts_of(within, within + count)
                if written & ~state.allocated:
                    host = state.host
                    if not host:
                        host = self._allocator.allocate()
                        taken.append(host)
                    allocated = state.allocated | written
                    changes.append((table, index, State(host, allocated, state.zero & ~written)))
                    piece = self._whole_parts(start, data[done : done + count], state.allocated)
                    pieces.append((host + piece[0], piece[1]))
                else:
                    pieces.append((state.host + within, data[done : done + count]))
                done += count
            self._write_pieces(pieces)
        except OSError:
            # Nothing refers to them.
            for host in taken:
                self._allocator.free(host)
            raise
        for table, index, state in changes:
            self._enter(table, index, state)

    def _whole_parts(self, start: int, data: memoryview, allocated: int) -> tuple[int, bytes | memoryview]:
        """Bytes from the start of the cluster, and ``data`` with what is missing of parts that were not there."""
        within, size = start & self._mask, self._part_bytes
        base = start - within
        before, after = within % size, -(within + len(data)) % size
        if before and allocated >> within // size & 1:
            before = 0
        if after and allocated >> (within + len(data)) // size & 1:
            after = 0
        if not before and not after:
            return within, data
        low, high = within - before, within + len(data) + after
        whole = memoryview(bytearray(high - low))
        # The disk may end within the part.
        end = min(high, self.size - base)
        if before:
            super().read_into(whole[:before], base + low)
        if after and end > within + len(data):
            super().read_into(whole[before + len(data) : end - low], base + within + len(data))
        whole[before : before + len(data)] = data
        return low, whole

    def _write_pieces(self, pieces: list[tuple[int, bytes | memoryview]]) -> None:
        """Writes them, those that follow each other in the file together."""
        while pieces:
            start, end, together = pieces[0][0], pieces[0][0], 0
            while together < min(len(pieces), VECTORS_MAX) and pieces[together][0] == end:
                end += len(pieces[together][1])
                together += 1
            self._put(start, *(data for _, data in pieces[:together]))
            pieces = pieces[together:]

    def _clear(self, number: int, start: int, end: int) -> None:
        """Makes whole parts zero, from byte ``start`` to byte ``end`` of what a table stands for."""
        table = self._table(number)
        while start < end:
            index, within = divmod(start, self._cluster)
            if within or end - start < self._cluster:
                count = min(self._cluster - within, end - start)
                gone = ((1 << count // self._part_bytes) - 1) << within // self._part_bytes
                state = self._state(table.words, index)
                self._replace(number, table, index, State(state.host, state.allocated & ~gone, state.zero | gone))
                start += count
                continue
            upto = end >> self._bits
            words = table.words[self._words * index : self._words * upto]
            self._dropped += [entry & OFFSET_MASK for entry in words[:: self._words] if entry & OFFSET_MASK]
            self._behind = True
            table.put(self._words * index, self._encode(State(0, 0, self._all)) * (upto - index))
            start = upto << self._bits

    def _replace(self, number: int, table: Table, index: int, state: State) -> None:
        """Enters the state of a cluster that has lost parts."""
        if state.host and not state.allocated:
            self._dropped.append(state.host)
            state = State(0, 0, state.zero)
        elif state.host:
            self._holes.add((number, index))
        self._enter(table, index, state)

    def _enter(self, table: Table, index: int, state: State) -> None:
        self._behind = True
        table.put(self._words * index, self._encode(state))

    def _give_back(self, pending: Pending) -> None:
        """For when no entry on the disk points to what was dropped."""
        if pending.dropped:
            moment = self.readers.turn()
            self._limbo.extend((moment, host) for host in pending.dropped)
        for number, index in pending.holes:
            self._punch_parts(self._state(self._table(number).words, index))
        while self._limbo and self.readers.gone(self._limbo[0][0]):
            self._allocator.free(self._limbo[0][1])
            self._limbo.popleft()

    def _punch_parts(self, state: State) -> None:
        if state.host:
            for part in range(self._parts):
                if not state.allocated >> part & 1:
                    self._writable.punch(state.host + part * self._part_bytes, self._part_bytes)

    # ---- entries ----

    def _state(self, words: "array[int]", index: int) -> State:
        """Of the cluster at place ``index`` of a table. Raises OSError for one that can't be written."""
        entry = words[self._words * index]
        host = entry & OFFSET_MASK
        if entry & FLAG_COMPRESSED:
            raise bad_map("it has compressed clusters, which clones can't have")
        if host & self._mask or bool(host) != bool(entry & FLAG_COPIED):
            raise bad_map(f"a cluster is at byte {host} and not its own")
        if self._words == 2:
            bitmap = words[2 * index + 1]
            state = State(host, bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS)
        else:
            zero = entry & FLAG_ZERO
            state = State(host, int(bool(host) and not zero), zero)
        if state.allocated & state.zero or (state.allocated and not host):
            raise bad_map("parts of a cluster are allocated that can't be")
        return state

    def _encode(self, state: State) -> "array[int]":
        entry = state.host | FLAG_COPIED if state.host else 0
        if self._words == 2:
            return array("Q", (entry, state.allocated | state.zero << SUBCLUSTERS))
        return array("Q", (entry | state.zero,))

    def _table(self, number: int) -> Table:
        """A table to be changed: loaded, or new. Raises OSError."""
        table = self._loaded.get(number)
        if table is not None:
            return table
        if self._l1[number] & OFFSET_MASK:
            return self._load(number)
        offset = self._allocator.allocate()
        try:
            # Now, not at the flush: room that is lacking must be missed by who asks for it.
            self._put(offset, bytes(self._cluster))
        except OSError:
            self._allocator.free(offset)
            raise
        table = Table(offset, array("Q", bytes(self._cluster)), linked=False)
        self._loaded[number] = table
        self._l1[number] = offset | FLAG_COPIED
        self._l1_changed.add(number)
        return table

    def _load(self, number: int) -> Table:
        with self._loading:
            table = self._loaded.get(number)
            if table is None:
                offset = self._l1[number] & OFFSET_MASK
                if offset & self._mask:
                    raise bad_map(f"a second-level table is at byte {offset}, which is not the start of a cluster")
                table = Table(offset, read_numbers(self._writable, offset, self._cluster // 8, "Q"), linked=True)
                self._loaded[number] = table
            return table
