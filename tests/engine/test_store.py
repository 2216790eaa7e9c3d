"""Store and reference counts: slots have the right content, counts follow, liars are found out."""

import fcntl
import mmap
import os
import random
import resource
from pathlib import Path

import pytest
import xxhash
from engine.fake_agent import page
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from udedup._native import ffi, lib
from udedup.engine.index import Index
from udedup.engine.store import SEALS, SegmentNumbers, Store, segment_prefix
from udedup.engine.wire import SEGMENT_SLOTS, AgentError, check

PAGE = 4096
EPROTO = 71


def digest_of(content: bytes) -> tuple[int, int]:
    value = xxhash.xxh3_128_intdigest(content)
    return value & (2**64 - 1), value >> 64


class Filled:
    """A store with pages 1 … ``pages`` in it, in order from slot 0 on."""

    def __init__(self, pages: int = 0) -> None:
        self.store = Store(SegmentNumbers(), segment_prefix("1000", "a-b/c"))
        self.index = Index()
        for start in range(1, pages + 1, lib.UDD_COPY_MAX):
            self.publish([page(n) for n in range(start, min(start + lib.UDD_COPY_MAX, pages + 1))])

    def publish(
        self,
        contents: list[bytes],
        *,
        valid: int = 2**512 - 1,
        promised: list[bytes] | None = None,
        places: list[int] | None = None,
    ) -> tuple[int, int, int]:
        """Written, invalid, mismatch. ``places``: where in the copy area each page is, instead of in order."""
        places = places or list(range(len(contents)))
        area = bytearray((max(places) + 1) * PAGE)
        for place, content in zip(places, contents, strict=True):
            area[place * PAGE : (place + 1) * PAGE] = content
        fresh = ffi.new("struct udd_fresh[]", len(contents))
        for i, content in enumerate(promised or contents):
            fresh[i].digest = digest_of(content)
        lib.udd_plan_copied(
            fresh, len(contents), [valid >> 64 * word & (2**64 - 1) for word in range(lib.UDD_COPY_WORDS)]
        )
        for i, place in enumerate(places):
            fresh[i].copy = place + 1 if fresh[i].copy else 0
        position, counts = ffi.new("size_t *"), ffi.new("struct udd_publish_counts *")
        targets = ffi.new("struct udd_target[]", len(contents))
        while position[0] < len(contents):
            check(
                lib.udd_store_publish(
                    self.store.handle,
                    self.index.handle,
                    self.store.writable().number,
                    ffi.from_buffer(area),
                    fresh,
                    len(contents),
                    position,
                    targets,
                    counts,
                ),
                "publishing",
            )
        return counts.written, counts.invalid, counts.mismatch

    def place(self, content: bytes) -> tuple[int, int] | None:
        """(segment, slot) by the index."""
        segment, slot = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        found = lib.udd_index_find_shared(self.index.handle, digest_of(content), segment, slot)
        return (segment[0], slot[0]) if found else None

    def content(self, place: tuple[int, int]) -> bytes:
        """What an agent finds there."""
        segment, slot = place
        with mmap.mmap(self.store.segments[segment].descriptor, lib.UDD_SEGMENT_BYTES, prot=mmap.PROT_READ) as memory:
            return memory[slot * PAGE : (slot + 1) * PAGE]

    def holder(self) -> object:
        return ffi.gc(lib.udd_holder_create(self.store.handle), lib.udd_holder_destroy)


def run(slot: int, pages: int, segment: int = 1) -> object:
    runs = ffi.new("struct udd_run[1]")
    runs[0].pages, runs[0].segment, runs[0].slot = pages, segment, slot
    return runs


def result(**masks: int) -> object:
    results = ffi.new("struct udd_merge_result[1]")
    for name, mask in masks.items():
        setattr(results[0], name, mask)
    return results


def take(holder: object, runs: object, results: object) -> int:
    return int(lib.udd_holder_take(holder, runs, results, 1, ffi.new("struct udd_merge_counts *")))


def test_seals_and_descriptor() -> None:
    filled = Filled(1)
    descriptor = filled.store.segments[1].descriptor
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(descriptor, PAGE)
    assert str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("/memfd:udedup-store-1000-a-b%2Fc-1 ")


def test_slots_follow_each_other_across_batches_and_segments() -> None:
    filled = Filled(5000)
    places = [filled.place(page(n)) for n in range(1, 5001)]
    assert places == [(1 + n // 4096, n % 4096) for n in range(5000)]
    assert filled.content((1, 4095)) == page(4096)
    assert filled.content((2, 903)) == page(5000)


def test_what_is_not_as_promised_is_not_published() -> None:
    filled = Filled()
    contents = [page(1), page(2), page(3), page(4)]
    promised = [page(1), page(9), page(3), page(4)]
    assert filled.publish(contents, promised=promised, valid=0b0111) == (2, 1, 1)
    assert [filled.place(content) for content in contents] == [(1, 0), None, (1, 1), None]
    assert filled.place(page(9)) is None
    assert filled.content((1, 1)) == page(3)


def test_the_same_content_twice_has_one_slot() -> None:
    filled = Filled(3)
    assert filled.publish([page(2), page(4)]) == (1, 0, 0)
    assert filled.place(page(2)) == (1, 1)


def test_without_memory_nothing_is_written() -> None:
    """The store says so before it writes: a write to memory that can't be had would end the engine."""
    filled = Filled(3)
    descriptor = os.memfd_create("barren")
    os.ftruncate(descriptor, lib.UDD_SEGMENT_BYTES)
    with mmap.mmap(descriptor, lib.UDD_SEGMENT_BYTES) as barren, ffi.from_buffer(barren) as base:
        os.truncate(descriptor, 0)
        os.close(descriptor)
        assert lib.udd_store_add_segment(filled.store.handle, 7, base) == 0
        fresh = ffi.new("struct udd_fresh[1]")
        fresh[0].digest, fresh[0].copy = digest_of(page(9)), 1
        arguments = (page(9), fresh, 1, ffi.new("size_t *"), ffi.new("struct udd_target[1]"))
        counts = ffi.new("struct udd_publish_counts *")
        handles = (filled.store.handle, filled.index.handle)
        assert lib.udd_store_publish(*handles, 7, *arguments, counts) == -12
        assert filled.place(page(9)) is None
        assert filled.store.state(7)[0] == counts.written == 0
        moves = ffi.new("struct udd_move[]", lib.UDD_SEGMENT_SLOTS)
        holder = filled.holder()
        assert lib.udd_holder_adopt(holder, run(0, 3), 1) == 0
        filled.index.forget_segment(1)
        assert lib.udd_store_move(*handles, 1, 7, ffi.new("uint32_t *"), moves) == -12
        assert [moves[slot].segment for slot in range(3)] == [0, 0, 0]


class CountsMachine(RuleBasedStateMachine):
    """Three holders of 16 slots against lists of references."""

    def __init__(self) -> None:
        super().__init__()
        self.filled = Filled(16)
        self.holders = [self.filled.holder() for _ in range(3)]
        self.rings = [ffi.new("struct udd_drop_ring *") for _ in range(3)]
        self.model: list[list[int]] = [[], [], []]

    @rule(who=st.integers(0, 2), slot=st.integers(0, 15), pages=st.integers(1, 16), mask=st.integers(0, 2**16 - 1))
    def take(self, who: int, slot: int, pages: int, mask: int) -> None:
        pages = min(pages, 16 - slot)
        merged = mask & (1 << pages) - 1
        rest = (1 << pages) - 1 & ~merged
        assert take(self.holders[who], run(slot, pages), result(merged=merged, busy=rest)) == 0
        self.model[who] += [slot + i for i in range(pages) if merged >> i & 1]

    @rule(who=st.integers(0, 2), slot=st.integers(0, 15), pages=st.integers(1, 16))
    def adopt(self, who: int, slot: int, pages: int) -> None:
        pages = min(pages, 16 - slot)
        assert lib.udd_holder_adopt(self.holders[who], run(slot, pages), 1) == 0
        self.model[who] += range(slot, slot + pages)

    @precondition(lambda self: any(self.model))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from([who for who in range(3) if self.model[who]]))
        slot = data.draw(st.sampled_from(self.model[who]))
        assert self.drain(who, [(1, slot, 1)]) == 0
        self.model[who].remove(slot)

    @rule(who=st.integers(0, 2), slot=st.integers(0, 15))
    def lie(self, who: int, slot: int) -> None:
        if slot not in self.model[who]:
            assert self.drain(who, [(1, slot, 1)]) == -EPROTO
            self.rings[who].tail = self.rings[who].head

    @rule(who=st.integers(0, 2))
    def leave(self, who: int) -> None:
        lib.udd_holder_clear(self.holders[who])
        self.model[who] = []

    def drain(self, who: int, drops: list[tuple[int, int, int]]) -> int:
        ring = self.rings[who]
        for segment, slot, pages in drops:
            record = ring.slots[ring.head % lib.UDD_DROP_SLOTS]
            record.segment, record.slot, record.pages = segment, slot, pages
            ring.head += 1
        counts = ffi.new("struct udd_drop_counts *")
        return int(lib.udd_holder_drain(self.holders[who], ring, 1, counts))

    @invariant()
    def counts_agree(self) -> None:
        everything = [slot for references in self.model for slot in references]
        assert self.filled.store.state(1) == (16, len(set(everything)), len(everything))
        for holder, references in zip(self.holders, self.model, strict=True):
            assert lib.udd_holder_pages(holder) == lib.udd_holder_segment_pages(holder, 1) == len(references)


TestCounts = CountsMachine.TestCase
TestCounts.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    "masks",
    [
        {},  # pages in no mask
        {"merged": 0b1111, "busy": 0b0001},  # a page in two
        {"merged": 0b11111},  # a page beyond the run
        {"merged": 0b0111},  # one page missing
    ],
)
def test_results_that_can_t_be(masks: dict[str, int]) -> None:
    filled = Filled(8)
    holder = filled.holder()
    assert take(holder, run(0, 4), result(**masks)) == -EPROTO
    assert lib.udd_holder_pages(holder) == 0


def test_a_full_run() -> None:
    filled = Filled(64)
    holder = filled.holder()
    assert take(holder, run(0, 64), result(merged=2**64 - 1)) == 0
    assert lib.udd_holder_pages(holder) == 64


@pytest.mark.parametrize(("slot", "pages"), [(8, 1), (0, 9), (4000, 200), (2**32 - 1, 2), (5, 2**32 - 1)])
def test_runs_that_can_t_be(slot: int, pages: int) -> None:
    filled = Filled(8)
    assert lib.udd_holder_adopt(filled.holder(), run(slot, pages), 1) == -EPROTO


def test_runs_of_a_segment_that_is_no_more_count_nothing() -> None:
    filled = Filled(8)
    holder = filled.holder()
    assert lib.udd_holder_adopt(holder, run(0, 8, segment=77), 1) == 0
    assert lib.udd_holder_pages(holder) == 0


@pytest.mark.parametrize(
    ("segment", "slot", "pages"),
    [(0, 0, 1), (2, 0, 1), (1, 4096, 1), (1, 4095, 2), (1, 2**32 - 1, 2), (1, 0, 2**32 - 1)],
)
def test_drops_that_can_t_be(segment: int, slot: int, pages: int) -> None:
    filled = Filled(8)
    ring = ffi.new("struct udd_drop_ring *")
    ring.slots[0].segment, ring.slots[0].slot, ring.slots[0].pages = segment, slot, pages
    ring.head = 1
    assert lib.udd_holder_drain(filled.holder(), ring, 1, ffi.new("struct udd_drop_counts *")) == -EPROTO


@pytest.mark.parametrize(("head", "tail"), [(5000, 0), (0, 1), (2**64 - 1, 0), (0, 2**63)])
def test_drop_ring_indices_that_lie(head: int, tail: int) -> None:
    filled = Filled(8)
    ring = ffi.new("struct udd_drop_ring *")
    ring.head, ring.tail = head, tail
    assert lib.udd_holder_drain(filled.holder(), ring, 1, ffi.new("struct udd_drop_counts *")) == -EPROTO


def test_a_count_that_got_stuck_is_never_negative() -> None:
    """One process may map a slot more often than 16 bits count."""
    filled = Filled(1)
    holder = filled.holder()
    for _ in range(70_000):
        assert lib.udd_holder_adopt(holder, run(0, 1), 1) == 0
    ring = ffi.new("struct udd_drop_ring *")
    ring.slots[0].segment, ring.slots[0].pages = 1, 1
    for _ in range(70_000):
        ring.head += 1
        ring.slots[ring.head % lib.UDD_DROP_SLOTS] = ring.slots[0]
        assert lib.udd_holder_drain(holder, ring, 1, ffi.new("struct udd_drop_counts *")) == 0
    assert lib.udd_holder_pages(holder) == 0
    assert filled.store.state(1)[1:] == (0, 0)


@pytest.mark.parametrize("live", [0, 1, 900])
def test_retirement(live: int) -> None:
    """Live slots move with their digests; a segment closes when its last reference is gone."""
    filled = Filled(4096 + 10)
    store = filled.store
    holder = filled.holder()
    slots = sorted(random.Random(live).sample(range(4096), live))
    for slot in slots:
        lib.udd_holder_adopt(holder, run(slot, 1), 1)
    assert [fill.number for fill in store.fills(0) if fill.sparse] == [1]
    segment = store.segments[1]
    store.begin_retirement(segment, filled.index)
    store.continue_retirement(segment, filled.index, apart=False)
    assert [fill.number for fill in store.fills(0)] == [2]
    for slot in range(4096):
        place = filled.place(page(slot + 1))
        if slot in slots:
            assert place == (2, 10 + slots.index(slot))
            assert filled.content(place) == page(slot + 1)
        else:
            assert place is None

    if live:
        assert store.finish_retirement() == []
    segment.pins = 1
    lib.udd_holder_clear(holder)
    assert store.finish_retirement() == []
    segment.pins = 0
    assert store.finish_retirement() == [1]
    assert list(store.segments) == [2]


def test_a_well_used_segment_is_not_retired() -> None:
    filled = Filled(4097)
    holder = filled.holder()
    lib.udd_holder_adopt(holder, run(0, 2048), 1)
    assert not any(fill.sparse for fill in filled.store.fills(0))


def test_check_tells_lies_from_failures() -> None:
    with pytest.raises(AgentError, match="a thing can't be true"):
        check(-EPROTO, "a thing")
    with pytest.raises(OSError, match="a thing"):
        check(-12, "a thing")


@settings(deadline=None)
@given(
    places=st.permutations(range(24)),
    wrong=st.sets(st.integers(0, 23)),
    missing=st.sets(st.integers(0, 23)),
    known=st.sets(st.integers(0, 23)),
    before=st.sampled_from([0, 1, 7, SEGMENT_SLOTS - 9]),
)
def test_slots_hold_what_was_promised(
    places: list[int], wrong: set[int], missing: set[int], known: set[int], before: int
) -> None:
    """Wherever copies lie, and whichever of them are wrong, missing or known already: what is published is right."""
    filled = Filled()
    for start in range(0, before, lib.UDD_COPY_MAX):
        filled.publish([page(10_000 + n) for n in range(start, min(before, start + lib.UDD_COPY_MAX))])
    if known:
        filled.publish([page(n) for n in sorted(known)])
    contents = [page(5_000 + n if n in wrong else n) for n in range(24)]
    promised = [page(n) for n in range(24)]
    valid = sum(1 << n for n in range(24) if n not in missing)
    written, invalid, mismatch = filled.publish(contents, valid=valid, promised=promised, places=places)
    good = set(range(24)) - wrong - missing
    assert written == len(good - known)
    assert invalid == len(missing)
    assert mismatch == len(wrong - missing - known)
    for n in range(24):
        place = filled.place(page(n))
        assert (place is not None) == (n in good | known)
        assert place is None or filled.content(place) == page(n)
        assert filled.place(page(5_000 + n)) is None
    filled.store.close()


@pytest.mark.parametrize("userfaultfd", [True, False])
def test_with_and_without_userfaultfd(userfaultfd: bool) -> None:
    """Where there are no descriptors left for it, slots are filled all the same."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not userfaultfd:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        store = Store(SegmentNumbers(), segment_prefix("0", ""))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    filled = Filled()
    filled.store = store
    filled.publish([page(n) for n in range(300)])
    assert all(filled.content((1, n)) == page(n) for n in range(300))
