"""Segment numbers that get high: nothing grows with them, nothing ends at them but the protocol's own 32 bits."""

import errno
from pathlib import Path

import pytest
from engine.fake_agent import PAGE, page
from engine.test_shelf import Image
from engine.test_store import Filled, run

from udedup._native import ffi, lib
from udedup.engine.store import NUMBERS_END

LIVES = 2000
"""Segments that come and go: with 8 KiB left of each, 16 MiB."""

ROOM = 4 << 20
"""More than what Python and malloc() keep for later, bytes."""


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def at(filled: Filled, newest: int) -> None:
    """Its next segment has the number after ``newest``."""
    filled.store._numbers.newest = newest
    filled.store._current.clear()


def retire_all(filled: Filled) -> list[int]:
    for segment in list(filled.store.segments.values()):
        filled.store.begin_retirement(segment, filled.index)
    return filled.store.finish_retirement()


def drop(holder: object, ring: object, segment: int, pages: int) -> int:
    """The agent says that it has let go of slots 0 to ``pages``."""
    record = ring.slots[ring.head % lib.UDD_DROP_SLOTS]  # type: ignore[attr-defined]
    record.segment, record.slot, record.pages = segment, 0, pages
    ring.head += 1  # type: ignore[attr-defined]
    return int(lib.udd_holder_drain(holder, ring, segment, ffi.new("struct udd_drop_counts *")))


def test_segments_that_come_and_go_leave_nothing_with_who_stays() -> None:
    filled = Filled()
    holder, ring = filled.holder(), ffi.new("struct udd_drop_ring *")

    def live(lives: int) -> None:
        for life in range(lives):
            filled.publish([page(life + 1)])
            (number,) = filled.store.segments
            assert lib.udd_holder_adopt(holder, run(0, 1, segment=number), 1) == 0
            assert lib.udd_holder_segment_pages(holder, number) == 1
            assert drop(holder, ring, number, 1) == 0
            assert lib.udd_holder_segment_pages(holder, number) == 0
            assert retire_all(filled) == [number]
            # Said once more, of a segment that is no more: nothing.
            assert drop(holder, ring, number, 1) == 0

    live(50)
    before = resident()
    live(LIVES)
    assert resident() - before < ROOM


def test_high_numbers_take_no_room() -> None:
    filled = Filled(8)
    holders = [filled.holder() for _ in range(50)]
    before = resident()
    highest = NUMBERS_END - 2
    at(filled, highest)
    filled.publish([page(1000)])
    number = highest + 1
    for holder in holders:
        assert lib.udd_holder_adopt(holder, run(0, 8, segment=1), 1) == 0
        assert lib.udd_holder_adopt(holder, run(0, 1, segment=number), 1) == 0
    assert filled.place(page(1000)) == (number, 0)
    assert filled.content((number, 0)) == page(1000)
    assert filled.store.state(number) == (1, 1, 50)
    assert resident() - before < ROOM
    at(filled, number)
    with pytest.raises(OSError, match="used up") as caught:
        filled.publish([page(1001)])
    assert caught.value.errno == errno.ENOSPC
    filled.store.close()


def test_what_is_gone_can_t_be_dropped_twice_while_its_segment_lives() -> None:
    filled = Filled(8)
    holder, other, ring = filled.holder(), filled.holder(), ffi.new("struct udd_drop_ring *")
    for each in (holder, other):
        assert lib.udd_holder_adopt(each, run(0, 8), 1) == 0
    assert drop(holder, ring, 1, 8) == 0
    assert filled.store.state(1) == (8, 8, 8)
    assert drop(holder, ring, 1, 1) == -errno.EPROTO
    assert filled.store.state(1) == (8, 8, 8)


def test_a_stuck_count_is_no_cover_for_others() -> None:
    """More of one slot is given back than was taken, at the cost of another slot of the same segment."""
    filled = Filled(2)
    holder, ring = filled.holder(), ffi.new("struct udd_drop_ring *")
    for _ in range(70_000):
        assert lib.udd_holder_adopt(holder, run(0, 1), 1) == 0
    assert lib.udd_holder_adopt(holder, run(1, 1), 1) == 0
    for _ in range(70_001):
        assert drop(holder, ring, 1, 1) == 0
    assert lib.udd_holder_pages(holder) == 0
    assert filled.store.state(1) == (2, 0, 0)
    assert drop(holder, ring, 1, 1) == -errno.EPROTO


def test_blocks_are_served_however_high_the_numbers_are(tmp_path: Path) -> None:
    filled = Filled(8)
    image = Image(tmp_path / "disk", filled, [page(n) for n in (1, 2, 1000, 1001, 1002)])
    assert image.put(0, 5) == 2
    for newest, content in ((1 << 19, 1000), (3 << 20, 1001), (NUMBERS_END - 2, 1002)):
        at(filled, newest)
        filled.publish([page(content)])
        image.put(0, 5)
        block = {1000: 2, 1001: 3, 1002: 4}[content]
        assert image.take(block * PAGE, PAGE) == (page(content), ())
        taken = image.take(0, 5 * PAGE)
        assert taken is not None
        # Whatever else is still served is right: places before the jump may be forgotten, but never lead astray.
        data, gaps = taken
        expected = bytearray(image.path.read_bytes())
        for start, end in gaps:
            expected[start:end] = bytes(end - start)
        assert data == expected
    filled.store.close()
