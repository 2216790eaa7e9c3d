"""QEMU's qcow2, versions 2 and 3 (docs/interop/qcow2.rst in QEMU's source, where the names come from).

Two levels of tables say where each cluster of the disk is: in this file or its external data file, nowhere (then the
backing file shows), nowhere and zero, or compressed, which is left to QEMU. With extended entries the same is said
for each 32nd of a cluster. Internal snapshots have tables of their own, which are not looked at.
"""

import struct
from array import array
from typing import Final

import attrs

from udedup.errors import UdedupError
from udedup.vdi.formats.helper import Helper
from udedup.vdi.formats.layer import ZEROS, Extent, Layer, bad_map
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.formats.tables import PAGE_BYTES, PAGES_MAX, TableCache

MAGIC: Final = b"QFI\xfb"
CLUSTER_BITS: Final = range(9, 22)
EXTENDED_CLUSTER_BITS_MIN: Final = 14
SIZE_MAX: Final = 1 << 61
L1_BYTES_MAX: Final = 32 << 20
"""QEMU's limit."""

INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_EXTENDED: Final = 1 << 4
INCOMPATIBLE_KNOWN: Final = 0b11111

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_DATA_FILE: Final = 0x44415441

ENCRYPTIONS: Final = (None, "aes", "luks")
"""By the number the header has for each."""

OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
FLAG_COPIED: Final = 1 << 63
FLAG_COMPRESSED: Final = 1 << 62
FLAG_ZERO: Final = 1 << 0
SUBCLUSTER_BITS: Final = 5
SUBCLUSTERS: Final = 1 << SUBCLUSTER_BITS
ALL_SUBCLUSTERS: Final = (1 << SUBCLUSTERS) - 1

NO_ENTRIES: "Final[array[int]]" = array("Q")

SAMPLED_TABLES: Final = 16
"""Second-level tables looked through for compressed clusters when an image is opened, …"""
SAMPLED_ENTRIES: Final = 1 << 16
"""… among so many entries of the first level."""


@attrs.frozen
class Header:
    """What the first cluster says."""

    version: int
    size: int
    """Bytes of the disk."""
    cluster_bits: int
    encryption: str | None
    """How it is encrypted, in QEMU's words, None if it is not."""
    l1_entries: int
    l1_offset: int
    """Bytes from the start of the file."""
    extended: bool
    """Whether entries tell subclusters apart."""
    backing_file: bytes | None
    """Name, None if there is none."""
    backing_format: str | None
    """Of the backing file, as the header names it."""
    has_data_file: bool
    data_file: bytes | None
    """Name of the external data file."""


def parse_header(raw: bytes, subject: str) -> Header:
    """Reads the header at the start of ``raw``, which should have the first 2 MiB of the file or all of it.

    Raises UdedupError, which begins with ``subject``, for what can't be true or is not known.
    """
    if len(raw) < 72:
        raise UdedupError(f"{subject}: is cut off in its qcow2 header")
    (magic, version, backing_offset, backing_bytes, cluster_bits, size, crypt, l1_entries, l1_offset) = (
        struct.unpack_from(">4sIQIIQIIQ", raw)
    )  # fmt: skip
    if magic != MAGIC:
        raise UdedupError(f"{subject}: is not qcow2")
    if version not in (2, 3):
        raise UdedupError(f"{subject}: is qcow2 of version {version}; only 2 and 3 are known")
    incompatible, header_bytes = 0, 72
    if version == 3:
        if len(raw) < 104:
            raise UdedupError(f"{subject}: is cut off in its qcow2 header")
        (incompatible,) = struct.unpack_from(">Q", raw, 72)
        (header_bytes,) = struct.unpack_from(">I", raw, 100)
    if cluster_bits not in CLUSTER_BITS:
        raise UdedupError(f"{subject}: its header gives clusters of 2^{cluster_bits} bytes, which can't be")
    cluster = 1 << cluster_bits
    if header_bytes < (104 if version == 3 else 72) or header_bytes > min(cluster, len(raw)):
        raise UdedupError(f"{subject}: its header gives its own length as {header_bytes} bytes, which can't be")
    if incompatible & ~INCOMPATIBLE_KNOWN:
        raise UdedupError(f"{subject}: uses qcow2 features that are not known here (bits {incompatible:#x})")
    if incompatible & INCOMPATIBLE_CORRUPT:
        raise UdedupError(f"{subject}: is marked as corrupt; repair it with `qemu-img check -r all`")
    extended = bool(incompatible & INCOMPATIBLE_EXTENDED)
    if extended and cluster_bits < EXTENDED_CLUSTER_BITS_MIN:
        raise UdedupError(f"{subject}: its clusters of {cluster} bytes are too small for extended entries")
    if crypt >= len(ENCRYPTIONS):
        raise UdedupError(f"{subject}: is encrypted by method {crypt}, which is not known")
    if not 0 < size <= SIZE_MAX:
        raise UdedupError(f"{subject}: its header gives a disk of {size} bytes, which can't be served")
    _check_l1(subject, size, cluster, l1_entries, l1_offset, extended=extended)
    extensions = _extensions(raw, header_bytes, min(cluster, len(raw)), subject)
    backing = None
    if backing_offset:
        if not 0 < backing_bytes <= 1023 or backing_offset + backing_bytes > min(cluster, len(raw)):
            raise UdedupError(f"{subject}: the name of its backing file is not where its header says")
        backing = raw[backing_offset : backing_offset + backing_bytes]
    backing_format = extensions.get(EXTENSION_BACKING_FORMAT)
    return Header(
        version=version,
        size=size,
        cluster_bits=cluster_bits,
        encryption=ENCRYPTIONS[crypt],
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        extended=extended,
        backing_file=backing,
        backing_format=None if backing_format is None else backing_format.decode("ascii", "replace"),
        has_data_file=bool(incompatible & INCOMPATIBLE_DATA_FILE),
        data_file=extensions.get(EXTENSION_DATA_FILE),
    )


def _check_l1(subject: str, size: int, cluster: int, entries: int, offset: int, *, extended: bool) -> None:
    span = cluster * (cluster // (16 if extended else 8))
    if entries < -(-size // span):
        raise UdedupError(f"{subject}: its first-level table has {entries} entries, too few for {size} bytes of disk")
    if entries * 8 > L1_BYTES_MAX:
        raise UdedupError(f"{subject}: its first-level table has {entries} entries, more than can be")
    if offset == 0 or offset % cluster or offset > OFFSET_MASK:
        raise UdedupError(f"{subject}: its first-level table is at byte {offset}, which can't be")


def _extensions(raw: bytes, start: int, end: int, subject: str) -> dict[int, bytes]:
    """The header extensions by type."""
    found: dict[int, bytes] = {}
    while start + 8 <= end:
        kind, length = struct.unpack_from(">II", raw, start)
        start += 8
        if kind == EXTENSION_END:
            break
        if length > end - start:
            raise UdedupError(f"{subject}: a header extension of {length} bytes is longer than its header")
        found[kind] = raw[start : start + length]
        start += -(-length // 8) * 8
    return found


class Qcow2(Layer):
    """One qcow2 file. ``data`` is where its clusters are: the file itself or its external data file."""

    def __init__(self, header: Header, file: RawFile, data: RawFile, below: Layer | None, decoder: Helper) -> None:
        self.header = header
        self.size = header.size
        self.below = below
        self.encrypted = header.encryption is not None
        self._file = file
        self._data = data
        self._decoder = decoder
        """Reads compressed and encrypted clusters, by their place on the disk."""
        self._external = data is not file
        self._tables = TableCache(file, "Q", "big")
        self._bits = self.piece_bits = header.cluster_bits
        self._cluster = 1 << header.cluster_bits
        self._mask = self._cluster - 1
        self._offset_bits = OFFSET_MASK & ~self._mask
        """Bits of an entry that tell where a cluster is."""
        self._odd = FLAG_COPIED - 1 & ~self._offset_bits
        """Bits that an entry has only if that is not all there is to it, or is wrong."""
        self._words = 2 if header.extended else 1
        """Numbers an entry of the second level has."""
        self._entries = self._cluster // (8 * self._words)
        """Entries of a second-level table, a power of two."""
        self._table_span = self._entries << self._bits
        """Bytes of disk that one second-level table stands for."""
        self._span_entries = min(self._entries, PAGE_BYTES // (8 * self._words))
        """Entries of a span: what of one second-level table is in one page of it."""
        self._last_entry = self._span_entries - 1
        self._span_bits = self._bits + self._span_entries.bit_length() - 1
        self._spans: dict[int, array[int]] = {}
        """Entries by number of the span, as far as they have been needed; emptied when it is full."""
        self._plain = self._words == 1 and not self._external and header.encryption is None
        """Whether an entry can be all there is to know about a cluster."""

    def forget(self) -> None:
        self._spans = {}
        self._tables.forget()
        self._decoder.forget()
        self._file.forget()
        if self._external:
            self._data.forget()
        if self.below is not None:
            self.below.forget()

    def close(self) -> None:
        self._decoder.close()
        self._file.close()
        if self._external:
            self._data.close()
        if self.below is not None:
            self.below.close()

    def piece(self, offset: int, length: int) -> tuple[RawFile, int] | None:
        """Within an ordinary cluster whose entry is at hand."""
        entries = self._spans.get(offset >> self._span_bits)
        within = offset & self._mask
        if entries and self._plain and within + length <= self._cluster:
            entry = entries[(offset >> self._bits) & self._last_entry]
            host = entry & self._offset_bits
            if host and not entry & self._odd:
                return self._data, host + within
        return None

    def lookup(self, offset: int, length: int, *, wait: bool) -> Extent | None:
        entries = self._spans.get(offset >> self._span_bits)
        if entries is None:
            entries = self._load_span(offset >> self._span_bits, wait=wait)
            if entries is None:
                return None
        if not entries:
            return self.fall_through(offset, min(length, self._table_span - offset % self._table_span), wait=wait)
        index = (offset >> self._bits) & self._span_entries - 1
        wanted = ((offset & self._mask) + length + self._mask) >> self._bits
        words = entries[self._words * index : self._words * min(index + wanted, self._span_entries)]
        find = self._find_subclusters if self._words == 2 else self._find_clusters
        return find(words, offset, length, wait=wait)

    def _load_span(self, number: int, *, wait: bool) -> "array[int] | None":
        """The entries of a span, none if there is no table for it; None if that takes the disk."""
        spans = self._spans
        position, index = self.header.l1_offset, number << self._span_bits
        position += 8 * (index // self._table_span)
        page = self._tables.page(position, wait=wait)
        if page is None:
            return None
        table = page[(position & PAGE_BYTES - 1) >> 3] & OFFSET_MASK
        if len(spans) >= PAGES_MAX:
            spans.clear()
        if not table:
            spans[number] = NO_ENTRIES
            return NO_ENTRIES
        if table & self._mask:
            raise bad_map(f"a second-level table is at byte {table}, which is not the start of a cluster")
        count = self._words * self._span_entries
        first = table + 8 * self._words * (index % self._table_span >> self._bits)
        page = self._tables.page(first + 8 * (count - 1), wait=wait)
        if page is None:
            return None
        start = (first & PAGE_BYTES - 1) >> 3
        entries = page if count == len(page) else page[start : start + count]
        spans[number] = entries
        return entries

    def compressed_within(self, tables: int) -> bool:
        """Whether the first ``tables`` second-level tables in use have compressed clusters; waits for the disk."""
        span = self._table_span
        for start in range(0, min(self.size, span * SAMPLED_ENTRIES), span):
            position = self.header.l1_offset + 8 * (start // span)
            page = self._tables.page(position, wait=True)
            assert page is not None
            table = page[(position & PAGE_BYTES - 1) >> 3] & OFFSET_MASK
            if not table:
                continue
            raw = self._file.read_some(table, self._cluster, wait=True) or b""
            # The flag is in the first byte of an entry.
            if any(byte & FLAG_COMPRESSED >> 56 for byte in raw[:: 8 * self._words]):
                return True
            tables -= 1
            if not tables:
                break
        # Of hundreds of images most are hardly read: the tables seen here are not worth keeping.
        self._tables.forget()
        return False

    def _find_clusters(self, entries: "array[int]", offset: int, length: int, *, wait: bool) -> Extent | None:
        """:meth:`lookup` among the entries of the clusters from ``offset`` on."""
        entry = entries[0]
        within = offset & self._mask
        count, run = len(entries), 1
        host = entry & OFFSET_MASK
        if entry & FLAG_COMPRESSED:
            return Extent(self._decoder, offset, min(length, self._cluster - within))
        if entry & FLAG_ZERO:
            if self.header.version < 3:
                raise bad_map("a zero cluster in an image of version 2")
            while run < count and entries[run] & (FLAG_COMPRESSED | FLAG_ZERO) == FLAG_ZERO:
                run += 1
            return Extent(ZEROS, 0, min(length, (run << self._bits) - within))
        if not host and not (self._external and entry & FLAG_COPIED):
            while run < count and not entries[run]:
                run += 1
            return self.fall_through(offset, min(length, (run << self._bits) - within), wait=wait)
        while run < count and entries[run] == entry + (run << self._bits):
            run += 1
        return self._in_data(host, offset, min(length, (run << self._bits) - within))

    def _find_subclusters(self, words: "array[int]", offset: int, length: int, *, wait: bool) -> Extent | None:
        """The same for extended entries, each of which has a bit map of its subclusters."""
        entry, bitmap = words[0], words[1]
        within = offset & self._mask
        host = entry & OFFSET_MASK
        if entry & FLAG_COMPRESSED:
            return Extent(self._decoder, offset, min(length, self._cluster - within))
        allocated, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
        if allocated & zero:
            raise bad_map("a subcluster is both allocated and zero")
        if allocated and not host and not (self._external and entry & FLAG_COPIED):
            raise bad_map("subclusters are allocated in a cluster that is not")
        if allocated == ALL_SUBCLUSTERS:
            run, count = 1, len(words) // 2
            while (
                run < count and words[2 * run] == entry + (run << self._bits) and words[2 * run + 1] == ALL_SUBCLUSTERS
            ):
                run += 1
            return self._in_data(host, offset, min(length, (run << self._bits) - within))
        bits = self._bits - SUBCLUSTER_BITS
        first = within >> bits

        def run_of(kind: int) -> int:
            """Bytes up to the lowest clear bit from the first subcluster on, or to the end of the cluster."""
            beyond = ~kind >> first | 1 << SUBCLUSTERS - first
            end = first + (beyond & -beyond).bit_length() - 1
            return min(length, (end << bits) - within)

        if allocated >> first & 1:
            return self._in_data(host, offset, run_of(allocated))
        if zero >> first & 1:
            return Extent(ZEROS, 0, run_of(zero))
        return self.fall_through(offset, run_of(~(allocated | zero)), wait=wait)

    def _in_data(self, host: int, offset: int, length: int) -> Extent:
        """The extent of a cluster at byte ``host`` of the data, and of those that follow it there."""
        within = offset & self._mask
        if host & self._mask:
            raise bad_map(f"a cluster is at byte {host}, which is not a multiple of its size")
        if self._external and host != offset - within:
            raise bad_map(f"a cluster of the data file is at byte {host} and belongs at {offset - within}")
        if self.header.encryption is not None:
            return Extent(self._decoder, offset, length)
        return self._data.place(host + within, length, (host, host + self._cluster))
