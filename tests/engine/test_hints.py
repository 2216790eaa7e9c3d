"""The hint stack against an ordered dictionary, and hint rings written by liars."""

import mmap
import struct
import time
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from udedup._native import ffi, lib
from udedup.engine.hints import Drained, HintRing, HintStack
from udedup.engine.wire import AgentError

PAGE = 4096
SLOTS = 24
AGENTS = (1, 2, 5)


def push(stack: HintStack, agent: int, address: int, length: int, at: int = 1) -> int:
    """Straight onto the stack."""
    return int(lib.udd_hints_push(stack._handle, agent, address, length, 0, 0, at))


def whole_pages(address: int, length: int) -> range:
    """Page numbers entirely inside."""
    return range(-(-address // PAGE), max(-(-address // PAGE), (address + length) // PAGE))


class StackMachine(RuleBasedStateMachine):
    """Pushes, pops, holds and departures in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = HintStack(SLOTS)
        self.model: dict[int, OrderedDict[int, int]] = {agent: OrderedDict() for agent in AGENTS}
        """Agent → page → time; the newest last."""
        self.held: set[int] = set()
        self.overwritten = 0
        self.now = 0

    @rule(
        agent=st.sampled_from(AGENTS),
        address=st.integers(0, 60 * PAGE),
        length=st.one_of(st.integers(0, 3 * PAGE), st.integers(0, 40 * PAGE)),
    )
    def push(self, agent: int, address: int, length: int) -> None:
        self.now += 1
        pages = whole_pages(address, length)
        self.overwritten += max(0, len(pages) - SLOTS)
        pages = pages[-SLOTS:]
        assert push(self.stack, agent, address, length, self.now) == len(pages)
        lane = self.model[agent]
        for page in pages:
            if page not in lane and sum(map(len, self.model.values())) == SLOTS:
                sharers = sum(bool(other) for other in self.model.values())
                deepest = max(self.model.values(), key=lambda other: (len(other), other is lane))
                loser = lane if lane and len(lane) >= SLOTS // sharers else deepest
                loser.popitem(last=False)
                self.overwritten += 1
            lane[page] = self.now
            lane.move_to_end(page)

    @rule(pages=st.integers(1, SLOTS + 5))
    def pop(self, pages: int) -> None:
        open_lanes = {agent: lane for agent, lane in self.model.items() if agent not in self.held}
        popped: dict[int, dict[int, int]] = {}
        for group in self.stack.pop(pages):
            assert group.agent > max(popped, default=0)
            entries = [group.array[i] for i in range(group.count)]
            assert {entry.agent for entry in entries} == {group.agent}
            assert [entry.address for entry in entries] == sorted(entry.address for entry in entries)
            popped[group.agent] = {entry.address // PAGE: entry.nanoseconds for entry in entries}
        assert self.held.isdisjoint(popped)
        assert sum(map(len, popped.values())) == min(pages, sum(map(len, open_lanes.values())))
        # Nobody gets less than somebody else, but for one page, unless that is all there is of it.
        most = max(map(len, popped.values()), default=0)
        for agent, lane in open_lanes.items():
            assert len(popped.get(agent, {})) >= min(len(lane), most - 1)
            assert popped.get(agent, {}) == dict(lane.popitem() for _ in range(len(popped.get(agent, {}))))

    @rule(agent=st.sampled_from(AGENTS))
    def forget_agent(self, agent: int) -> None:
        self.stack.forget_agent(agent)
        self.model[agent].clear()
        self.held.discard(agent)

    @rule(agent=st.sampled_from(AGENTS), hold=st.booleans())
    def hold(self, agent: int, hold: bool) -> None:
        self.stack.hold(agent, hold)
        (self.held.add if hold else self.held.discard)(agent)

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.stack) == sum(len(lane) for agent, lane in self.model.items() if agent not in self.held)
        assert self.stack.overwritten == self.overwritten


TestStack = StackMachine.TestCase
TestStack.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_a_flood_costs_nobody_else() -> None:
    """Whoever has less than its share loses no hint and gets its part of every pop, however much others push."""
    stack = HintStack(3000)
    push(stack, 7, 0, 900 * PAGE)
    for lap in range(50):
        for agent in (3, 9):
            push(stack, agent, (1 + lap) << 32, 3000 * PAGE)
    (_, mine, _) = stack.pop(300)
    assert (mine.agent, mine.count) == (7, 100)
    assert [mine.array[i].address // PAGE for i in range(100)] == list(range(800, 900))
    assert sum(group.count for group in stack.pop(3000) if group.agent == 7) == 800


def test_less_than_one_for_each_goes_round() -> None:
    stack = HintStack(100)
    for agent in range(1, 6):
        push(stack, agent, 0, 10 * PAGE)
    assert sorted(next(stack.pop(1)).agent for _ in range(10)) == sorted([1, 2, 3, 4, 5] * 2)


def test_forgotten_agents_leave_nothing() -> None:
    stack = HintStack(100)
    for agent in range(1, 1000):
        push(stack, agent, 0, PAGE)
        stack.hold(agent, True)
        stack.forget_agent(agent)
    push(stack, 5, 0, PAGE)
    assert popped_pages(stack, 5) == [0]


@pytest.mark.parametrize(
    ("address", "length"), [(1 << 47, 1), ((1 << 47) - PAGE, 2 * PAGE), (0, 1 << 63), (2**64 - 1, 1)]
)
def test_impossible_places_are_refused(address: int, length: int) -> None:
    stack = HintStack(SLOTS)
    assert push(stack, 1, address, length) < 0
    assert len(stack) == 0


class Ring:
    """A ring and its writer."""

    def __init__(self) -> None:
        self.memory = ffi.new("struct udd_hint_ring *")
        self.ring = HintRing(self.memory)

    def write(self, address: int, length: int = PAGE, **fields: int) -> None:
        """A complete hint."""
        ticket = self.memory.head
        self.memory.head = ticket + 1
        slot = self.memory.slots[ticket % lib.UDD_HINT_SLOTS]
        slot.address, slot.length, slot.nanoseconds = address, length, time.monotonic_ns()
        for name, value in fields.items():
            setattr(slot, name, value)
        slot.sequence = ticket + 1


def drain(stack: HintStack, ring: Ring, *, pages: int = 1 << 30, arm: bool = False) -> Drained:
    """Takes in what agent 1 has written."""
    return stack.drain(1, ring.ring, pages=pages, arm=arm)


def popped_pages(stack: HintStack, agent: int = 1) -> list[int]:
    """Everything on the stack, as page numbers."""
    return [
        group.array[i].address // PAGE
        for group in stack.pop(1 << 16)
        for i in range(group.count)
        if group.agent == agent
    ]


def test_ring_in_order() -> None:
    stack, ring = HintStack(100), Ring()
    for page in range(10):
        ring.write(page * PAGE)
    drained = drain(stack, ring, arm=True)
    assert (drained.hints, drained.dropped, drained.armed, drained.more) == (10, 0, True, False)
    assert ring.memory.waiting == 1
    assert popped_pages(stack) == list(range(10))
    assert not drain(stack, ring, arm=True).armed


@given(st.lists(st.integers(1, 3 * 4096), min_size=1, max_size=5))
@settings(deadline=None, max_examples=20)
def test_ring_laps(bursts: list[int]) -> None:
    """Whatever was overwritten is counted; what is left is the newest."""
    stack, ring = HintStack(1 << 15), Ring()
    written = 0
    for burst in bursts:
        for _ in range(burst):
            ring.write(written * PAGE)
            written += 1
        drained = drain(stack, ring)
        assert drained.hints == min(burst, lib.UDD_HINT_SLOTS)
        assert drained.dropped == burst - drained.hints
        assert popped_pages(stack) == list(range(written - drained.hints, written))


def test_half_written_slot_waits_then_is_passed_over() -> None:
    stack, ring = HintStack(100), Ring()
    ring.write(1 * PAGE)
    ring.write(2 * PAGE, sequence=0)
    ring.memory.slots[1].sequence = 0
    ring.write(3 * PAGE)
    first = drain(stack, ring)
    assert (first.hints, first.dropped, first.more) == (1, 0, True)
    time.sleep(0.02)
    second = drain(stack, ring)
    assert (second.hints, second.dropped, second.more) == (1, 1, False)
    assert popped_pages(stack) == [1, 3]


@pytest.mark.parametrize("head", [2**64 - 1, 2**63, 2**41])
def test_head_that_lies(head: int) -> None:
    stack, ring = HintStack(100), Ring()
    ring.memory.head = head
    with pytest.raises(AgentError, match="head"):
        drain(stack, ring)


def test_head_that_goes_back() -> None:
    stack, ring = HintStack(100), Ring()
    for page in range(10):
        ring.write(page * PAGE)
    drain(stack, ring)
    ring.memory.head = 5
    with pytest.raises(AgentError, match="head"):
        drain(stack, ring)


def test_one_drain_is_bounded() -> None:
    """4096 hints of 4 GiB each would be 4 billion pages: a drain takes what it is told to, and goes on where it was."""
    stack, ring = HintStack(1000), Ring()
    for i in range(lib.UDD_HINT_SLOTS):
        ring.write(i << 32, length=2**32 - 1)
    began = time.monotonic()
    drained = [drain(stack, ring, pages=700) for _ in range(3)]
    assert time.monotonic() - began < 1
    assert [(one.hints, one.dropped, one.more) for one in drained] == [(1, 0, True)] * 3
    # The last pages of each, since no more would stay anyway.
    assert len(stack) == 1000


def test_a_drain_takes_up_where_it_was() -> None:
    """Also in the middle of a read of an image: pages and blocks go on together."""
    stack, ring = HintStack(1000), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    ring.write(1000 * PAGE, 20 * PAGE, inode=7, offset=10 * PAGE, nanoseconds=1 | ON_MOUNT)
    ring.write(2000 * PAGE, PAGE)
    found = {}
    for pages in (6, 6, 6, 6):
        drain(stack, ring, pages=pages)
        reports, ranges = known(stack)
        found |= reports
    assert found == {1000 + i: 11 + i for i in range(20)}
    assert ranges == [(2000, 1)]
    assert not ring.ring.waiting


@given(st.binary(min_size=64 * 56, max_size=64 * 56), st.integers(0, 64))
@settings(deadline=None)
def test_random_slots(raw: bytes, head: int) -> None:
    """Garbage in the ring gives hints or drops, never more than there were tickets."""
    stack, ring = HintStack(100), Ring()
    ffi.buffer(ring.memory.slots)[0 : len(raw)] = raw
    ring.memory.head = head
    drained = drain(stack, ring)
    assert drained.hints + drained.dropped <= head


def image(blocks: int) -> mmap.mmap:
    """A digest table: block n has digest (n + 1, 9)."""
    table = mmap.mmap(-1, max(PAGE, 16 * blocks))
    for block in range(blocks):
        table[16 * block : 16 * block + 16] = struct.pack("<QQ", block + 1, 9)
    return table


ON_MOUNT = 1 << 63


def known(stack: HintStack) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """Pages with their digest's low half, and the ranges to visit."""
    reports: dict[int, int] = {}
    ranges = []
    for group in stack.pop(1000):
        report_array, report_count, range_array, range_count = group.split()
        reports |= {report_array[i].address // PAGE: report_array[i].digest[0] for i in range(report_count)}
        ranges += [(range_array[i].address // PAGE, range_array[i].pages) for i in range(range_count)]
    return reports, ranges


def test_image_hints_meet_digests() -> None:
    stack, ring = HintStack(100), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    now = time.monotonic_ns() | ON_MOUNT
    ring.write(1000 * PAGE, 5 * PAGE, inode=7, offset=10 * PAGE, nanoseconds=now)
    drain(stack, ring)
    assert known(stack) == ({1000 + i: 11 + i for i in range(5)}, [])


@pytest.mark.parametrize(
    ("address", "fields"),
    [
        (100 * PAGE, {"inode": 8, "offset": 0}),  # another file
        (100 * PAGE, {"inode": 7, "offset": 100}),  # blocks and pages don't coincide
        (100 * PAGE, {"inode": 7, "offset": 2**64 - 1}),  # offset not known
        (100 * PAGE, {"inode": 7, "offset": 50 * PAGE}),  # beyond the end
        (100 * PAGE, {"inode": 7, "offset": 2**64 - PAGE}),  # far beyond the end
    ],
)
def test_hints_without_a_digest_are_visited(address: int, fields: dict[str, int]) -> None:
    stack, ring = HintStack(100), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    ring.write(address, 3 * PAGE, nanoseconds=1 | ON_MOUNT, **fields)
    drain(stack, ring)
    assert known(stack) == ({}, [(100, 3)])


def test_inode_counts_on_the_mount_only() -> None:
    stack, ring = HintStack(100), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    ring.write(100 * PAGE, PAGE, inode=7, offset=0, nanoseconds=1)
    drain(stack, ring)
    assert known(stack) == ({}, [(100, 1)])


def test_unaligned_read_of_an_image() -> None:
    """A read into the middle of a page from the same place in a block: whole pages meet whole blocks."""
    stack, ring = HintStack(100), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    ring.write(100 * PAGE + 512, 3 * PAGE, inode=7, offset=20 * PAGE + 512, nanoseconds=1 | ON_MOUNT)
    drain(stack, ring)
    assert known(stack) == ({101: 22, 102: 23}, [])


def test_block_without_digest_and_zero_block_are_visited() -> None:
    stack, ring = HintStack(100), Ring()
    table = image(3)
    table[0:16] = bytes(16)
    zero = ffi.new("uint64_t[2]")
    lib.udd_digest_pages(bytes(PAGE), 1, zero)
    table[16:32] = struct.pack("<QQ", zero[0], zero[1])
    stack.add_image(7, table, 3 * PAGE)
    ring.write(100 * PAGE, 3 * PAGE, inode=7, offset=0, nanoseconds=1 | ON_MOUNT)
    drain(stack, ring)
    assert known(stack) == ({102: 3}, [(100, 2)])


def test_removed_image_takes_its_digests_along() -> None:
    """Hints on it, given before or after, are visited; the next image in its place does not lend them its digests."""
    stack, ring = HintStack(100), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    stack.add_image(8, image(50), 50 * PAGE)
    ring.write(100 * PAGE, 3 * PAGE, inode=7, offset=0, nanoseconds=1 | ON_MOUNT)
    ring.write(200 * PAGE, 3 * PAGE, inode=8, offset=0, nanoseconds=1 | ON_MOUNT)
    stack.drain(1, ring.ring, pages=100, arm=False)
    stack.remove_image(7)
    stack.remove_image(99)
    stack.add_image(9, image(2), 2 * PAGE)
    ring.write(300 * PAGE, 3 * PAGE, inode=7, offset=0, nanoseconds=1 | ON_MOUNT)
    ring.write(400 * PAGE, 2 * PAGE, inode=9, offset=0, nanoseconds=1 | ON_MOUNT)
    stack.drain(1, ring.ring, pages=100, arm=False)
    assert known(stack) == ({200: 1, 201: 2, 202: 3, 400: 1, 401: 2}, [(100, 3), (300, 3)])


def test_reads_of_a_mapped_image_are_hints_on_its_pages() -> None:
    stack, ring = HintStack(100), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    mapped = {"inode": 7, "nanoseconds": 1 | ON_MOUNT, "flags": lib.UDD_HINT_MAPPED}
    ring.write(1000 * PAGE, 10 * PAGE, offset=20 * PAGE, **mapped)
    ring.write(2000 * PAGE, 3 * PAGE, offset=27 * PAGE, **mapped)
    assert drain(stack, ring).dropped == 0
    assert known(stack) == ({}, [])
    # From before the first to behind its beginning; what both have; what neither has; another image; another agent.
    assert stack.read(1, 7, 18, 4) == 2
    assert stack.read(1, 7, 28, 3) == 4
    assert [stack.read(1, 7, 30, 9), stack.read(1, 8, 20, 9), stack.read(2, 7, 20, 9)] == [0, 0, 0]
    assert known(stack) == ({1000: 21, 1001: 22, 1008: 29, 1009: 30, 2001: 29, 2002: 30}, [])
    stack.forget_agent(1)
    assert stack.read(1, 7, 18, 4) == 0


@pytest.mark.parametrize(
    ("address", "fields"),
    [
        (1000 * PAGE + 1, {"offset": 0}),
        (1 << 47, {"offset": 0}),
        (1000 * PAGE, {"offset": 100}),
        (1000 * PAGE, {"offset": 1 << 63}),
        (1000 * PAGE, {"offset": 0, "nanoseconds": 1}),  # not on the mount
    ],
)
def test_impossible_mappings_are_dropped(address: int, fields: dict[str, int]) -> None:
    stack, ring = HintStack(100), Ring()
    ring.write(address, PAGE, **({"inode": 7, "nanoseconds": 1 | ON_MOUNT, "flags": lib.UDD_HINT_MAPPED} | fields))
    assert drain(stack, ring).dropped == 1
    assert stack.read(1, 7, 0, 1 << 40) == 0


def test_a_mapping_replaces_what_was_at_its_address() -> None:
    stack, ring = HintStack(1000), Ring()
    stack.add_image(7, image(50), 50 * PAGE)
    for offset in range(3):
        fields = {"inode": 7, "nanoseconds": 1 | ON_MOUNT, "flags": lib.UDD_HINT_MAPPED}
        ring.write(1000 * PAGE, 2 * PAGE, offset=offset * PAGE, **fields)
    drain(stack, ring)
    assert stack.read(1, 7, 0, 50) == 2
    assert known(stack) == ({1000: 3, 1001: 4}, [])


def test_the_oldest_mappings_are_forgotten() -> None:
    stack, ring = HintStack(1000), Ring()
    for i in range(lib.UDD_MAPPINGS_MAX + 1):
        ring.write((1000 + i) * PAGE, PAGE, inode=7, offset=i * PAGE, nanoseconds=ON_MOUNT, flags=lib.UDD_HINT_MAPPED)
    drain(stack, ring)
    assert stack.read(1, 7, 0, 1 << 20) == lib.UDD_MAPPINGS_MAX
    assert min(popped_pages(stack)) == 1001


def test_empty_image() -> None:
    stack = HintStack(10)
    stack.add_image(7, mmap.mmap(-1, PAGE), 100)
    assert len(stack) == 0


@given(
    hinted=st.sets(st.integers(0, 30), min_size=1),
    merged=st.sets(st.integers(0, 30)),
)
def test_leads_count_hinted_pages_that_were_merged(hinted: set[int], merged: set[int]) -> None:
    stack = HintStack(100)
    for page in hinted:
        push(stack, 1, page * PAGE, PAGE, at=1000)
    (group,) = stack.pop(100)
    run = ffi.new("struct udd_run[1]")
    run[0].address, run[0].pages = 0, 31
    result = ffi.new("struct udd_merge_result[1]")
    result[0].merged = sum(1 << page for page in merged)
    histogram = ffi.new("uint64_t[]", lib.UDD_LEAD_BUCKETS)
    count = lib.udd_hinted_leads(group.array, group.count, run, result, 1, 1500, histogram)
    assert count == sum(histogram) == len(hinted & merged)
    assert all(index == 4 * 8 + 3 for index, value in enumerate(histogram) if value)  # 500 is in [448, 512)
