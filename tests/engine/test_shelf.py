"""Shelves: a block comes from the store only after its own bytes were compared, and only while its file is the same."""

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.fake_agent import PAGE, page
from engine.test_store import Filled, digest_of
from hypothesis import given, settings
from hypothesis import strategies as st

from udedup._native import ffi, lib
from udedup.engine.wire import SEGMENT_SLOTS
from udedup.vdi.shelf import Shelf, ShelfCounters, Watch

ROOM = 1 << 20


class Image:
    """A file whose blocks have known digests, the pages 1, 2, … of a store among them, and its shelf in that store."""

    def __init__(self, path: Path, filled: Filled, contents: list[bytes], *, settle: float = 0) -> None:
        self.path = path
        path.write_bytes(b"".join(contents))
        self.descriptor = os.open(path, os.O_RDONLY)
        self.filled = filled
        self.watch = Watch([self.descriptor], settle)
        self.digests = mmap.mmap(-1, max(len(contents), 1) * 16)
        self.counters = ShelfCounters()
        for block, content in enumerate(contents):
            self.set_digest(block, content)
        self.shelf = Shelf(
            self.watch,
            len(contents),
            self.digests,
            store=filled.store.handle,
            index=filled.index.handle,
            counters=self.counters,
        )
        self.buffer = bytearray(ROOM)
        self.room = ffi.from_buffer(self.buffer)

    def set_digest(self, block: int, content: bytes) -> None:
        low, high = digest_of(content)
        self.digests[16 * block : 16 * block + 16] = low.to_bytes(8, "little") + high.to_bytes(8, "little")

    def put(self, first: int, count: int, *, epoch: int | None = None) -> int:
        """As the mount does: the epoch, then the bytes, then the shelf."""
        epoch = self.watch.epoch if epoch is None else epoch
        return self.shelf.put(first, count, os.pread(self.descriptor, count * PAGE, first * PAGE), 0, epoch)

    def take(self, offset: int, size: int) -> tuple[bytes, tuple[tuple[int, int], ...]] | None:
        """The bytes, those in gaps as zeros, and the gaps."""
        self.buffer[:size] = bytes(size)
        taken = self.shelf.take(offset, size, self.room)
        if taken is None:
            return None
        return (bytes(self.buffer[:size]) if taken.data is None else bytes(taken.data)), taken.gaps


Make = Callable[..., Image]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def image(contents: list[bytes], pages: int = 8, *, settle: float = 0, filled: Filled | None = None) -> Image:
        return Image(tmp_path / "disk", filled or Filled(pages), contents, settle=settle)

    return image


def pages(*numbers: int) -> list[bytes]:
    return [page(number) for number in numbers]


def test_only_what_was_compared_is_served(make: Make) -> None:
    image = make(pages(1, 2, 3, 99))
    assert image.take(0, 3 * PAGE) is None
    assert image.shelf.nominees(0, 4) == 0b0111
    assert image.shelf.there(0, 4) == 0
    assert image.put(0, 4) == 3
    assert image.shelf.there(0, 4) == 0b0111
    assert image.take(0, 3 * PAGE) == (b"".join(pages(1, 2, 3)), ())
    assert image.take(2 * PAGE, 2 * PAGE) == (page(3) + bytes(PAGE), ((PAGE, 2 * PAGE),))
    assert image.take(3 * PAGE, PAGE) is None
    assert (image.counters.entered, image.counters.differing, image.counters.served) == (3, 0, 4)


def test_a_made_up_page_with_the_digest_of_a_block_is_never_served(make: Make) -> None:
    """What somebody in the domain who can make collisions would do: 128 bits of a hash without a key are no proof."""
    image = make(pages(50, 51, 1))
    for victim, forged in ((50, 1), (51, 2)):
        segment, slot = image.filled.place(page(forged)) or (0, 0)
        assert lib.udd_index_publish(image.filled.index.handle, digest_of(page(victim)), segment, slot) == 0
    assert image.shelf.nominees(0, 3) == 0b111
    assert image.put(0, 3) == 1
    assert image.shelf.there(0, 3) == 0b100
    assert image.take(0, 2 * PAGE) is None
    assert image.take(0, 3 * PAGE) == (bytes(2 * PAGE) + page(1), ((0, 2 * PAGE),))
    assert image.counters.differing == 2


def test_a_wrong_digest_of_a_block_is_found_out_too(make: Make) -> None:
    """The table of digests may be stale: what it says is compared as well."""
    image = make(pages(60))
    image.set_digest(0, page(4))
    assert image.put(0, 1) == 0
    assert image.take(0, PAGE) is None


@pytest.mark.parametrize("change", ["write", "truncate", "grow", "replace times"])
def test_a_change_of_the_file_shows_at_once(make: Make, change: str) -> None:
    image = make(pages(1, 2, 3))
    assert image.put(0, 3) == 3
    before = image.path.stat()
    with image.path.open("r+b") as file:
        match change:
            case "write":
                file.write(page(7))
            case "truncate":
                file.truncate(2 * PAGE)
            case "grow":
                file.truncate(4 * PAGE)
            case "replace times":
                file.write(page(7))
                file.flush()
                os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image.take(0, PAGE) is None
    assert image.take(2 * PAGE, PAGE) is None


def test_what_was_read_before_a_change_is_not_entered_after_it(make: Make) -> None:
    image = make(pages(1, 2))
    epoch = image.watch.epoch
    data = image.path.read_bytes()
    with image.path.open("r+b") as file:
        file.write(page(8))
    assert image.shelf.put(0, 2, data, 0, epoch) == 0
    assert image.shelf.put(0, 2, data, 0, 0) == 0
    assert image.take(0, PAGE) is None
    # Read anew, all is well; what the shelf had before is forgotten.
    image.set_digest(0, page(8))
    assert image.put(0, 1) == 1
    assert image.take(0, 2 * PAGE) == (page(8) + bytes(PAGE), ((PAGE, 2 * PAGE),))


def test_a_file_that_has_just_changed_is_not_relied_on(make: Make) -> None:
    """A second change within the same tick of a coarse clock would not show."""
    image = make(pages(1), settle=1e6)
    assert image.watch.epoch == 0
    assert image.put(0, 1) == 0
    assert image.take(0, PAGE) is None


def test_a_file_that_cannot_be_watched_is_not_relied_on(make: Make) -> None:
    image = make(pages(1))
    other = os.open("/dev/null", os.O_RDONLY)
    assert Watch([image.descriptor, other], 0).epoch == 0
    assert image.put(0, 1) == 1
    os.close(image.descriptor)
    assert image.take(0, PAGE) is None


def test_a_change_of_one_file_counts_though_another_cannot_be_looked_at(tmp_path: Path) -> None:
    names = [tmp_path / "base", tmp_path / "top"]
    for name in names:
        name.write_bytes(page(1))
    descriptors = [os.open(name, os.O_RDONLY) for name in names]
    watch = Watch(descriptors, 0)
    before = watch.epoch
    assert before != 0
    assert watch.epoch == before
    lost = os.dup(descriptors[1])
    os.close(descriptors[1])
    names[0].write_bytes(page(2))
    assert watch.epoch == 0
    assert os.dup2(lost, descriptors[1]) == descriptors[1]
    assert watch.epoch not in (0, before)


def test_what_is_written_is_taken_off(make: Make) -> None:
    """By ourselves: that is no change of a file, and all else stays."""
    image = make(pages(1, 2, 3, 4, 5))
    assert image.put(0, 5) == 5
    image.watch.drop(1, 2)
    assert image.shelf.there(0, 5) == 0b11001
    assert image.take(0, 3 * PAGE) == (page(1) + bytes(2 * PAGE), ((PAGE, 3 * PAGE),))
    image.watch.drop(4, 1 << 40)
    image.watch.drop(5, 1)
    image.watch.drop(1 << 40, 1)
    assert image.shelf.there(0, 5) == 0b01001


@pytest.mark.parametrize(
    ("first", "count"), [(0, 1), (5, 1019), (5, 1020), (1023, 1), (1023, 2), (1000, 2000), (1024, 1024), (0, 5000)]
)
def test_any_stretch_is_taken_off_and_nothing_else(make: Make, first: int, count: int) -> None:
    """Also those that fill whole pages of the shelf (1024 blocks each), which are given back."""
    blocks = 3 * 1024 + 7
    image = make([page(1)] * blocks)
    for start in range(0, blocks, 64):
        image.put(start, min(64, blocks - start))
    image.watch.drop(first, count)
    there = [bool(image.shelf.there(block, 1)) for block in range(blocks)]
    assert there == [not first <= block < first + count for block in range(blocks)]


def test_a_segment_that_is_no_more_leads_nowhere(make: Make) -> None:
    """Its memory is gone: a page served from there would end the engine, or be somebody else's."""
    filled = Filled(SEGMENT_SLOTS + 4)
    image = make(pages(1, 2, SEGMENT_SLOTS + 1, 3), filled=filled)
    assert image.put(0, 4) == 4
    old = filled.store.segments[1]
    filled.store.begin_retirement(old, filled.index)
    # Its pages are still there, and still right.
    assert image.take(0, 4 * PAGE) == (b"".join(pages(1, 2, SEGMENT_SLOTS + 1, 3)), ())
    filled.store.continue_retirement(old, filled.index, apart=False)
    assert filled.store.finish_retirement() == [1]
    assert image.shelf.there(0, 4) == 0b0100
    assert image.take(0, 2 * PAGE) is None
    whole = image.take(0, 4 * PAGE)
    assert whole == (bytes(2 * PAGE) + page(SEGMENT_SLOTS + 1) + bytes(PAGE), ((0, 2 * PAGE), (3 * PAGE, 4 * PAGE)))
    # The same content comes into the store again, in a new place.
    filled.publish(pages(1, 2))
    assert image.put(0, 2) == 2
    assert image.take(0, 2 * PAGE) == (b"".join(pages(1, 2)), ())


def test_a_shelf_outlives_its_store(make: Make) -> None:
    image = make(pages(1, 2))
    assert image.put(0, 2) == 2
    image.filled.store.close()
    assert image.take(0, PAGE) is None
    assert image.put(0, 2) == 0
    del image.filled
    assert image.take(0, PAGE) is None


def test_places_beyond_the_image(make: Make) -> None:
    image = make(pages(1, 2))
    assert image.put(0, 2) == 2
    assert image.take(2 * PAGE, PAGE) is None
    assert image.shelf.nominees(0, 64) == image.shelf.there(0, 64) == 0b11
    assert image.shelf.put(1, 2, bytes(2 * PAGE), 0, image.watch.epoch) == 0
    assert image.shelf.take(0, 2 * ROOM, image.room) is None
    # The part of a last block that has no digest is a gap.
    with image.path.open("ab") as file:
        file.write(b"end")
    assert image.put(0, 2) == 2
    assert image.take(PAGE, PAGE + 3) == (page(2) + bytes(3), ((PAGE, PAGE + 3),))


def test_too_many_gaps_are_not_worth_it(make: Make) -> None:
    image = make(pages(*(number if number % 2 else 900 + number for number in range(1, 64))), pages=64)
    image.put(0, 63)
    assert image.take(0, 32 * PAGE) is not None
    assert image.take(0, 34 * PAGE) is None


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 1 << 32))
def test_any_read_of_any_mixture_is_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int
) -> None:
    chooser = random.Random(seed)
    numbers = [chooser.choice([chooser.randrange(1, 40), *range(n + 1, min(n + 3, 40))]) for n in range(300)]
    image = Image(tmp_path_factory.mktemp("image") / "disk", Filled(30), pages(*numbers))
    for first in range(0, 300, 10):
        if chooser.random() < 0.7:
            image.put(first, 10)
    content = image.path.read_bytes()
    for _ in range(20):
        offset = data.draw(st.integers(0, len(content) - 1))
        size = data.draw(st.integers(1, min(ROOM, len(content) - offset)))
        taken = image.take(offset, size)
        if taken is None:
            continue
        expected = bytearray(content[offset : offset + size])
        for start, end in taken[1]:
            expected[start:end] = bytes(end - start)
        assert taken[0] == bytes(expected)
        holes = {(offset + byte) // PAGE for start, end in taken[1] for byte in (start, end - 1)}
        assert not any(image.shelf.there(block, 1) for block in holes)
    os.close(image.descriptor)


def test_a_shelf_costs_4_bytes_a_block(make: Make) -> None:
    count = 64 << 8
    image = make(pages(*range(1, count + 1)), pages=count)
    before = resident()
    for first in range(0, count, 256):
        image.put(first, 256)
    assert image.shelf.there(0, 64) == 2**64 - 1
    assert resident() - before < 1.5 * 4 * count + (1 << 18)


def resident() -> int:
    """Private memory of this process, bytes."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Anonymous:"))
