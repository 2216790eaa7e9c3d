"""The writer of overlays: QEMU reads what it leaves, and no crash at any write of it leaves anything wrong."""

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from udedup.errors import UdedupError
from udedup.vdi.formats.helper import Helper, Recipe
from udedup.vdi.formats.overlay import Overlay, parse_counts
from udedup.vdi.formats.probe import Opening, open_overlay
from udedup.vdi.formats.qcow2 import parse_header
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.formats.writable import WritableFile

from .conftest import KIB, MIB, expected, qemu_img, qemu_io

KINDS = ("extended_l2=on,cluster_size=128k", "cluster_size=64k", "extended_l2=on,cluster_size=256k", "cluster_size=4k")
LENGTHS = (1, 512, 4 * KIB, 5000, 64 * KIB, 200 * KIB)
SECTOR, BLOCK = 512, 4 * KIB
LEAKS = 3
"""Exit status of `qemu-img check` for nothing worse than clusters that nobody uses."""


@attrs.frozen
class Event:
    """What an overlay did to its file."""

    offset: int
    data: bytes | None
    """None: a sync."""


class RecordingFile(WritableFile):
    """Remembers all writes and syncs, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, os.open(path, os.O_RDWR))
        self.events: list[Event] = []
        self.meanwhile: Callable[[], None] = lambda: None
        """What others do during a sync, just too late for it."""

    def write(self, offset: int, *data: bytes | memoryview) -> None:
        self.events.append(Event(offset, b"".join(data)))
        super().write(offset, *data)

    def sync(self) -> None:
        super().sync()
        self.events.append(Event(0, None))
        self.meanwhile()

    def punch(self, offset: int, length: int) -> None:
        self.events.append(Event(offset, bytes(max(min(length, self._end - offset), 0))))
        super().punch(offset, length)


def make(directory: Path, size: int, options: str, seed: int = 1) -> tuple[Path, bytearray]:
    """A base of random bytes and an empty overlay on it, and what the disk has."""
    base, overlay = directory / "base.raw", directory / "overlay.qcow2"
    content = bytearray(random.Random(seed).randbytes(size))
    base.write_bytes(content)
    qemu_img("create", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", overlay)
    return overlay, content


def recording(path: Path) -> tuple[Overlay, RecordingFile]:
    """The overlay at ``path``, opened for writing, and its file, which remembers."""
    file = RecordingFile(path)
    head = path.read_bytes()[: 2 * MIB]
    header = parse_header(head, "overlay")
    base = RawFile(path.with_name("base.raw"), os.open(path.with_name("base.raw"), os.O_RDONLY))
    helper = Helper(Recipe("qcow2", file), header.size)
    return Overlay(header, parse_counts(head, header, "overlay"), file, base, helper), file


def read(overlay: Overlay, offset: int, size: int) -> bytes:
    data = bytearray(size)
    overlay.read_into(memoryview(data), offset)
    return bytes(data)


def change(overlay: Overlay, content: bytearray, chooser: random.Random) -> tuple[int, int]:
    """Writes or zeroes a stretch of the disk and of ``content``; returns where."""
    size = min(chooser.choice(LENGTHS), len(content))
    offset = chooser.randrange(len(content) - size + 1)
    if chooser.random() < 0.6:
        offset -= offset % BLOCK
    if chooser.random() < 0.65:
        data = chooser.randbytes(size)
        overlay.write(offset, data)
    else:
        data = bytes(size)
        overlay.zero(offset, size)
    content[offset : offset + size] = data
    return offset, size


def check_status(path: Path) -> int:
    """What `qemu-img check` thinks of an overlay: 0, or LEAKS, or worse."""
    return subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, check=False).returncode


@pytest.mark.parametrize("odd", [0, SECTOR])
@pytest.mark.parametrize("options", KINDS)
def test_qemu_reads_what_is_written(tmp_path: Path, options: str, odd: int) -> None:
    path, content = make(tmp_path, 6 * MIB + odd, options)
    chooser = random.Random(odd)
    for _ in range(3):
        overlay = open_overlay(path, Opening()).layer
        assert isinstance(overlay, Overlay)
        for _ in range(150):
            offset, size = change(overlay, content, chooser)
            low, high = max(offset - BLOCK, 0), min(offset + size + BLOCK, len(content))
            assert read(overlay, low, high - low) == content[low:high]
            if chooser.random() < 0.1:
                overlay.flush()
        overlay.flush()
        overlay.close()
        assert check_status(path) == 0
        assert expected(path, "qcow2") == content


def test_goes_on_with_what_qemu_has_written(tmp_path: Path) -> None:
    path, _ = make(tmp_path, 6 * MIB, KINDS[0])
    qemu_io(path, "write -P 1 0 300k", "write -z 1M 256k", "discard 64k 64k", "write -P 2 3M 4k")
    content = bytearray(expected(path, "qcow2"))
    overlay = open_overlay(path, Opening()).layer
    assert isinstance(overlay, Overlay)
    for seed in range(100):
        change(overlay, content, random.Random(seed))
    overlay.flush()
    overlay.close()
    assert check_status(path) == 0
    assert expected(path, "qcow2") == content
    qemu_img("commit", "-q", "-d", path)
    assert path.with_name("base.raw").read_bytes() == content


class Versions:
    """What each unit of a disk may be after a crash: what it was at the last flush, or anything it was given since."""

    def __init__(self, content: bytes, unit: int) -> None:
        self.unit = unit
        self._steps: list[tuple[int, list[set[bytes]]]] = [(0, [{piece} for piece in self._pieces(content)])]

    def _pieces(self, content: bytes) -> list[bytes]:
        return [bytes(content[start : start + self.unit]) for start in range(0, len(content), self.unit)]

    def changing(self, event: int, content: bytes) -> None:
        """From this event on, the disk may also be ``content``."""
        last = self._steps[-1][1]
        pieces = self._pieces(content)
        self._steps.append((event, [old if new in old else old | {new} for old, new in zip(last, pieces, strict=True)]))

    def flushed(self, event: int, *contents: bytes) -> None:
        """From this event on it is the first of ``contents``, or, as far as the others differ from it, one of them."""
        pieces = zip(*map(self._pieces, contents), strict=True)
        self._steps.append((event, [set(allowed) for allowed in pieces]))

    def check(self, events: int, content: bytes) -> None:
        """Fails unless ``content`` is what a crash after so many events may leave."""
        allowed = [step for event, step in self._steps if event <= events][-1]
        wrong = [place for place, piece in enumerate(self._pieces(content)) if piece not in allowed[place]]
        assert not wrong, f"crash after event {events}: units {wrong[:8]} of {self.unit} bytes are neither old nor new"


def crashed(before: bytes, events: list[Event], chooser: random.Random | None, unit: int) -> bytes:
    """What a file has after a crash that ``events`` went before.

    Without a chooser all of them got to the disk; with one, of those after the last sync whatever units it chooses.
    """
    syncs = [place for place, event in enumerate(events) if event.data is None]
    durable = syncs[-1] if syncs else 0
    # The kernel's page cache, from which whole units get to the disk.
    cache, disk = bytearray(before), bytearray(before)
    for place, event in enumerate(events):
        if event.data is None:
            continue
        start, end = event.offset, event.offset + len(event.data)
        cache.extend(bytes(max(end - len(cache), 0)))
        disk.extend(bytes(len(cache) - len(disk)))
        cache[start:end] = event.data
        if chooser is None or place < durable:
            disk[start:end] = event.data
            continue
        fate = chooser.random()
        for low in range(start - start % unit, end, unit):
            if fate < 0.3 or (fate < 0.6 and chooser.random() < 0.5):
                disk[low : low + unit] = cache[low : low + unit]
    return bytes(disk)


@pytest.mark.parametrize(("options", "unit"), [(KINDS[0], SECTOR), (KINDS[1], BLOCK), (KINDS[0], BLOCK)])
def test_no_crash_at_any_write_does_harm(tmp_path: Path, options: str, unit: int) -> None:
    """The power goes after each single write of the overlay, with any part of what was not synced on the disk."""
    path, content = make(tmp_path, 512 * KIB + SECTOR, options)
    before = path.read_bytes()
    overlay, file = recording(path)
    versions = Versions(content, unit)
    chooser = random.Random(unit)
    for _ in range(25):
        began = len(file.events)
        change(overlay, content, chooser)
        versions.changing(began, content)
        if chooser.random() < 0.35:
            overlay.flush()
            versions.flushed(len(file.events), content)
    overlay.flush()
    versions.flushed(len(file.events), content)
    overlay.close()
    assert sum(event.data is None for event in file.events) > 10
    after = path.with_name("crashed.qcow2")
    for events in range(len(file.events) + 1):
        # Most of them with parts missing: that is what power loss does.
        for luck in (None, chooser) if events % 4 == 0 else (chooser,):
            after.write_bytes(crashed(before, file.events[:events], luck, unit))
            assert check_status(after) in (0, LEAKS), f"crash after event {events}: {file.events[events - 1 : events]}"
            versions.check(events, expected(after, "qcow2"))
    # One that has leaks is written as any other.
    again = open_overlay(after, Opening()).layer
    assert isinstance(again, Overlay)
    for seed in range(50):
        change(again, content, random.Random(seed))
    again.flush()
    again.close()
    assert check_status(after) in (0, LEAKS)
    assert expected(after, "qcow2") == content


def check_crashes(before: bytes, file: RecordingFile, versions: Versions, chooser: random.Random, unit: int) -> None:
    """Has the power go after each event, with parts of what was not synced missing."""
    after = file.path.with_name("crashed.qcow2")
    for events in range(len(file.events) + 1):
        after.write_bytes(crashed(before, file.events[:events], chooser, unit))
        assert check_status(after) in (0, LEAKS), f"crash after event {events}: {file.events[events - 1 : events]}"
        versions.check(events, expected(after, "qcow2"))


@pytest.mark.parametrize("options", KINDS[:2])
def test_no_crash_does_harm_to_what_is_written_during_a_flush(tmp_path: Path, options: str) -> None:
    """Writes that nobody waits for go on while others wait for syncs, in old clusters and in new ones."""
    path, content = make(tmp_path, 512 * KIB, options)
    before = path.read_bytes()
    overlay, file = recording(path)
    versions = Versions(content, SECTOR)
    chooser = random.Random(options)
    made = refused = 0

    def write_some() -> None:
        nonlocal made, refused
        for _ in range(2):
            size = chooser.choice((SECTOR, BLOCK, BLOCK, 16 * BLOCK))
            offset = chooser.randrange(0, len(content) - size + 1, size)
            data, began = chooser.randbytes(size), len(file.events)
            if overlay.write_at_hand(offset, data):
                content[offset : offset + size] = data
                versions.changing(began, content)
                seen.append(bytes(content))
                made += 1
            else:
                assert len(file.events) == began
                refused += 1

    file.meanwhile = write_some
    for _ in range(15):
        began = len(file.events)
        change(overlay, content, chooser)
        versions.changing(began, content)
        seen = [bytes(content)]
        overlay.flush()
        versions.flushed(len(file.events), *seen)
    assert made > 10
    assert refused
    file.meanwhile = lambda: None
    overlay.flush()
    versions.flushed(len(file.events), content)
    assert not overlay.behind
    overlay.close()
    check_crashes(before, file, versions, chooser, SECTOR)
    assert expected(path, "qcow2") == content
    assert check_status(path) == 0


def test_what_is_written_at_once_takes_no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a table to be loaded or made, nor what the base has around the data, nor somebody else who writes."""
    path, content = make(tmp_path, 2 * MIB, KINDS[0])
    overlay, file = recording(path)
    assert not overlay.write_at_hand(0, b"a" * BLOCK)
    overlay.write(0, b"a" * BLOCK)
    assert overlay.write_at_hand(BLOCK, b"b" * BLOCK)
    assert overlay.write_at_hand(BLOCK + 100, b"c" * 100)
    assert overlay.write_at_hand(MIB, b"d" * 200 * KIB)
    assert not overlay.write_at_hand(2 * BLOCK, b"e" * 100)
    assert not overlay.write_at_hand(BLOCK, b"e" * (BLOCK + 100))
    with overlay._changing():
        assert not overlay.write_at_hand(0, b"e" * BLOCK)

    def no_room(self: WritableFile, offset: int, *data: bytes | memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(WritableFile, "write", no_room)
        assert not overlay.write_at_hand(0, b"e" * BLOCK)
    content[: 2 * BLOCK] = b"a" * BLOCK + b"b" * 100 + b"c" * 100 + b"b" * (BLOCK - 200)
    content[MIB : MIB + 200 * KIB] = b"d" * 200 * KIB
    assert read(overlay, 0, len(content)) == content
    overlay.flush()
    overlay.close()
    assert expected(path, "qcow2") == content
    assert check_status(path) == 0
    assert sum(event.data is None for event in file.events) == 2


def test_a_table_that_could_not_be_written_is_written_by_the_next_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = make(tmp_path, MIB, KINDS[0])
    overlay, _ = recording(path)
    for _ in range(2):
        data = random.Random(len(content)).randbytes(BLOCK)
        overlay.write(5 * BLOCK, data)
        overlay.zero(7 * BLOCK, BLOCK)

        def fail(self: Overlay, offset: int, *data: bytes | memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Overlay, "_put", fail)
            with pytest.raises(OSError, match="No space"):
                overlay.flush()
        assert overlay.behind
        overlay.flush()
        assert not overlay.behind
        overlay.write(5 * BLOCK + SECTOR, data)
    content[5 * BLOCK : 6 * BLOCK] = data[:SECTOR] + data[: BLOCK - SECTOR]
    content[6 * BLOCK : 6 * BLOCK + SECTOR] = data[BLOCK - SECTOR :]
    content[7 * BLOCK : 8 * BLOCK] = bytes(BLOCK)
    overlay.flush()
    overlay.close()
    assert expected(path, "qcow2") == content
    assert check_status(path) == 0


def test_the_check_notices_a_writer_that_does_not_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash test that never fails would show nothing: this writer's tables may reach the disk before the data."""
    path, content = make(tmp_path, MIB, KINDS[0])
    before = path.read_bytes()
    monkeypatch.setattr(RecordingFile, "sync", lambda self: None)
    overlay, file = recording(path)
    versions = Versions(content, SECTOR)
    chooser = random.Random(1)
    for _ in range(10):
        change(overlay, content, chooser)
        versions.changing(0, content)
        overlay.flush()
    overlay.close()
    after = path.with_name("crashed.qcow2")

    def crash() -> None:
        for _ in range(20):
            after.write_bytes(crashed(before, file.events, chooser, SECTOR))
            assert check_status(after) in (0, LEAKS)
            versions.check(0, expected(after, "qcow2"))

    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        crash()


def test_discarding_frees_room_and_clusters_are_used_again(tmp_path: Path) -> None:
    path, content = make(tmp_path, 16 * MIB, KINDS[0])
    overlay = open_overlay(path, Opening()).layer
    assert isinstance(overlay, Overlay)
    overlay.flush()
    empty = path.stat().st_blocks * 512
    for _ in range(3):
        overlay.write(0, random.Random(2).randbytes(8 * MIB))
        overlay.flush()
        full = path.stat()
        assert full.st_blocks * 512 >= 8 * MIB
        # In one piece, and in single blocks, which leave holes in clusters until these are empty.
        overlay.zero(0, 4 * MIB)
        for offset in range(4 * MIB, 8 * MIB, BLOCK):
            overlay.zero(offset, BLOCK)
            if offset == 6 * MIB:
                overlay.flush()
                assert path.stat().st_blocks * 512 <= empty + 4 * MIB
        overlay.flush()
        assert path.stat().st_blocks * 512 <= empty + 512 * KIB
        assert full.st_size <= 10 * MIB
    content[: 8 * MIB] = bytes(8 * MIB)
    overlay.close()
    assert check_status(path) == 0
    assert expected(path, "qcow2") == content


def test_a_cluster_that_is_being_read_is_not_used_for_something_else(tmp_path: Path) -> None:
    path, _ = make(tmp_path, MIB, KINDS[0])
    overlay = open_overlay(path, Opening()).layer
    assert isinstance(overlay, Overlay)
    overlay.write(0, b"a" * 128 * KIB)
    overlay.flush()
    extent = overlay.lookup(0, BLOCK, wait=True)
    with overlay.readers.one():
        overlay.zero(0, 128 * KIB)
        overlay.flush()
        overlay.write(512 * KIB, b"b" * 256 * KIB)
        view = memoryview(bytearray(BLOCK))
        extent.source.read_into(view, extent.offset)
        assert view == b"a" * BLOCK
    overlay.flush()
    size = path.stat().st_size
    overlay.write(0, b"c" * 128 * KIB)
    assert path.stat().st_size == size
    overlay.close()


def test_after_a_failed_sync_nothing_is_taken_for_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = make(tmp_path, MIB, KINDS[0])
    overlay, _ = recording(path)
    overlay.write(0, b"a" * BLOCK)

    def fail(self: WritableFile) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(WritableFile, "sync", fail)
        with pytest.raises(OSError, match="Input/output"):
            overlay.flush()
    for attempt in (overlay.flush, lambda: overlay.write(0, b"b"), lambda: overlay.zero(0, 1)):
        with pytest.raises(OSError, match="a sync failed before"):
            attempt()
    overlay.close()
    assert expected(path, "qcow2") == content


def snapshot(path: Path) -> None:
    qemu_img("snapshot", "-c", "then", path)


def compress(path: Path) -> None:
    qemu_io(path, "write -c -P 1 0 128k")


def bitmap(path: Path) -> None:
    qemu_img("bitmap", "--add", path, "changed")


def mark_dirty(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\x11")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (snapshot, "has internal snapshots"),
        (compress, "compressed clusters"),
        (bitmap, "has bitmaps"),
        (mark_dirty, "was not closed in order"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path, _ = make(tmp_path, MIB, KINDS[0])
    spoil(path)
    with pytest.raises(UdedupError, match=message):
        open_overlay(path, Opening())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("compat=0.10", "a version"),
        ("refcount_bits=1", "1 bits"),
        ("cluster_size=8k", "can't be counted"),
        ("extended_l2=on,cluster_size=64k", "parts of less than 4096"),
    ],
)
def test_other_kinds_of_qcow2_are_refused(tmp_path: Path, options: str, message: str) -> None:
    path, _ = make(tmp_path, 8 * MIB, options)
    if "8k" in options:
        # A disk larger than its counts can be: sparse, so it takes no room.
        qemu_img("resize", "-q", path, 64 << 30)
    with pytest.raises(UdedupError, match=message):
        open_overlay(path, Opening())


def test_only_one_can_have_an_overlay(tmp_path: Path) -> None:
    path, _ = make(tmp_path, MIB, KINDS[0])
    opened = open_overlay(path, Opening())
    with pytest.raises(UdedupError, match="in use by another engine or by QEMU"):
        open_overlay(path, Opening())
    for file, kind in ((path, "qcow2"), (path.with_name("base.raw"), "raw")):
        done = subprocess.run(["qemu-io", "-f", kind, "-c", "write 0 4k", file], capture_output=True, check=False)
        assert b'Failed to get "write" lock' in done.stderr
    opened.layer.close()
    qemu_io(path, "write 0 4k")
