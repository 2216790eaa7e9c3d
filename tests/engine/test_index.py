"""The index against two dictionaries."""

import struct
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from udedup._native import ffi, lib
from udedup.engine.index import Index
from udedup.engine.wire import AgentError

PAGE = 4096
ROUNDS_KEPT = 2
AGENTS = st.integers(1, 5)
DIGESTS = st.tuples(st.integers(0, 30), st.integers(0, 2))
PAGES = st.integers(0, 40)


def reports_of(pages: list[tuple[int, tuple[int, int]]], flags: int = 0) -> tuple[Any, int]:
    """struct udd_report[] of (page number, digest)."""
    raw = b"".join(struct.pack("<QQQQ", page * PAGE, *digest, flags) for page, digest in pages)
    return ffi.from_buffer("struct udd_report[]", bytearray(raw or bytes(32))), len(pages)


class IndexMachine(RuleBasedStateMachine):
    """Look-ups, publications, ageing and departures in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.candidates: dict[tuple[int, int], tuple[int, int, int]] = {}
        """digest → (agent, page, round of the agent)"""
        self.parked: dict[tuple[int, int], tuple[int, int]] = {}
        self.shared: dict[tuple[int, int], tuple[int, int]] = {}
        self.rounds = dict.fromkeys(range(1, 6), 0)
        for agent in self.rounds:
            self.index.set_limit(agent, 1000)

    def candidate(self, digest: tuple[int, int]) -> tuple[int, int] | None:
        """The agent and the page that have it, parked or not."""
        return self.parked.get(digest) or (self.candidates[digest][:2] if digest in self.candidates else None)

    @rule(agent=AGENTS, pages=st.lists(st.tuples(PAGES, DIGESTS), max_size=40))
    def look_up(self, agent: int, pages: list[tuple[int, tuple[int, int]]]) -> None:
        expected = []
        for page, digest in pages:
            if digest in self.shared:
                expected.append((page, digest, 0, 0))
            elif self.candidate(digest) in (None, (agent, page)):
                self.parked.pop(digest, None)
                self.candidates[digest] = (agent, page, self.rounds[agent])
            else:
                expected.append((page, digest, *(self.candidate(digest) or ())))
        matches = self.index.look_up(agent, *reports_of(pages))
        found = [matches.array[i] for i in range(matches.count)]
        assert [match.address for match in found] == sorted(match.address for match in found)
        assert sorted(
            (match.address // PAGE, tuple(match.digest), match.other, match.other_address // PAGE) for match in found
        ) == sorted(expected)

    @rule(digest=DIGESTS, segment=st.integers(1, 3), slot=st.integers(0, 4095))
    def publish(self, digest: tuple[int, int], segment: int, slot: int) -> None:
        assert lib.udd_index_publish(self.index.handle, digest, segment, slot) == 0
        self.shared[digest] = (segment, slot)

    @rule(digest=DIGESTS)
    def take_candidate(self, digest: tuple[int, int]) -> None:
        agent, address = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        taken = lib.udd_index_take_candidate(self.index.handle, digest, agent, address)
        expected = self.candidate(digest)
        self.candidates.pop(digest, None)
        self.parked.pop(digest, None)
        assert taken == (expected is not None)
        if expected:
            assert (agent[0], address[0] // PAGE) == expected

    @rule(agent=AGENTS, page=PAGES, digest=DIGESTS)
    def park(self, agent: int, page: int, digest: tuple[int, int]) -> None:
        if self.candidate(digest) in (None, (agent, page)):
            self.candidates.pop(digest, None)
            self.parked[digest] = (agent, page)
        assert lib.udd_index_park(self.index.handle, digest, agent, page * PAGE) == 0

    @rule(agent=AGENTS, page=PAGES, digest=DIGESTS)
    def unpark(self, agent: int, page: int, digest: tuple[int, int]) -> None:
        if self.parked.get(digest) == (agent, page):
            del self.parked[digest]
        lib.udd_index_unpark(self.index.handle, digest, agent, page * PAGE)

    @rule()
    def forget_candidates(self) -> None:
        """Parked ones stay: nobody would look at them again."""
        assert self.index.forget_candidates() == len(self.candidates)
        self.candidates.clear()

    @rule(digest=DIGESTS)
    def find_shared(self, digest: tuple[int, int]) -> None:
        segment, slot = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        assert lib.udd_index_find_shared(self.index.handle, digest, segment, slot) == (digest in self.shared)
        if digest in self.shared:
            assert (segment[0], slot[0]) == self.shared[digest]

    @rule(agent=AGENTS)
    def next_round(self, agent: int) -> None:
        self.index.next_round(agent)
        self.rounds[agent] += 1

    @rule()
    def age(self) -> None:
        stale = [
            digest for digest, (agent, _, seen) in self.candidates.items() if self.rounds[agent] - seen > ROUNDS_KEPT
        ]
        for digest in stale:
            del self.candidates[digest]
        assert self.index.age() == len(stale)

    @rule(agent=AGENTS)
    def forget_agent(self, agent: int) -> None:
        before = len(self.candidates) + len(self.parked)
        self.candidates = {digest: seen for digest, seen in self.candidates.items() if seen[0] != agent}
        self.parked = {digest: place for digest, place in self.parked.items() if place[0] != agent}
        self.rounds[agent] = 0
        assert self.index.forget_agent(agent) == before - len(self.candidates) - len(self.parked)
        self.index.set_limit(agent, 1000)

    @rule(segment=st.integers(1, 3))
    def forget_segment(self, segment: int) -> None:
        gone = [digest for digest, place in self.shared.items() if place[0] == segment]
        for digest in gone:
            del self.shared[digest]
        assert self.index.forget_segment(segment) == len(gone)

    @invariant()
    def counts_agree(self) -> None:
        assert self.index.candidates == len(self.candidates) + len(self.parked)
        assert lib.udd_index_shared(self.index.handle) == len(self.shared)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def digests(count: int) -> list[tuple[int, tuple[int, int]]]:
    return [(page, (page * 0x9E3779B97F4A7C15 % 2**64, page + 1)) for page in range(count)]


def test_memory_per_candidate() -> None:
    """Between two growths the table takes 30 to 42 bytes per candidate; on average over sizes not more than 37."""
    index = Index()
    index.set_limit(1, 1 << 20)
    everything = digests(400_000)
    per_candidate = []
    for start in range(0, len(everything), 1000):
        index.look_up(1, *reports_of(everything[start : start + 1000]))
        if index.candidates >= 50_000:
            per_candidate.append(index.size / index.candidates)
    assert index.candidates == 400_000
    assert sum(per_candidate) / len(per_candidate) <= 37


def test_memory_comes_back() -> None:
    index = Index()
    index.set_limit(1, 1 << 20)
    empty = index.size
    index.look_up(1, *reports_of(digests(100_000)))
    assert index.size > 30 * empty
    assert index.forget_agent(1) == 100_000
    assert index.size <= 2 * empty


def test_one_half_of_the_digest_equal() -> None:
    """Digests that an agent chose to collide in their first half are told apart."""
    index = Index()
    index.set_limit(1, 10_000)
    pages = [(page, (7, page)) for page in range(5000)]
    assert index.look_up(1, *reports_of(pages)).count == 0
    assert index.candidates == 5000


def test_limit() -> None:
    index = Index()
    index.set_limit(1, 10)
    assert index.look_up(1, *reports_of(digests(50))).count == 0
    assert index.candidates == 10
    index.set_limit(2, 10)
    assert index.look_up(2, *reports_of(digests(50))).count == 10


def test_pages_that_are_alone_match_themselves_on_request() -> None:
    """Neither a candidate before nor one afterwards; others' candidates and shared pages are found as ever."""
    index = Index()
    for agent in (1, 2):
        index.set_limit(agent, 10)

    def matched(agent: int, *pages: tuple[int, tuple[int, int]]) -> list[tuple[int, int, int]]:
        found = index.look_up(agent, *reports_of(list(pages)), alone=lib.UDD_ALONE_SHARE)
        array = found.array[0 : found.count]
        return [(match.address // PAGE, match.other, match.other_address // PAGE) for match in array]

    index.look_up(1, *reports_of([(1, (1, 1)), (2, (2, 2))]))
    assert lib.udd_index_publish(index.handle, (3, 3), 1, 7) == 0
    assert matched(1, (1, (1, 1)), (3, (3, 3)), (4, (4, 4))) == [(1, 1, 1), (3, 0, 0), (4, 1, 4)]
    assert index.candidates == 1
    assert matched(2, (9, (2, 2)), (10, (4, 4))) == [(9, 1, 2), (10, 2, 10)]


def test_merged_and_zero_pages_are_passed_over() -> None:
    index = Index()
    index.set_limit(1, 10)
    zero = ffi.new("uint64_t[2]")
    lib.udd_digest_pages(bytes(PAGE), 1, zero)
    index.look_up(1, *reports_of([(1, (5, 5))], lib.UDD_REPORT_MERGED))
    index.look_up(1, *reports_of([(1, (zero[0], zero[1]))]))
    assert index.candidates == 0


@pytest.mark.parametrize("address", [1, 4095, 1 << 47, 1 << 63])
def test_impossible_address(address: int) -> None:
    index = Index()
    index.set_limit(1, 10)
    report = ffi.new("struct udd_report[1]")
    report[0].address = address
    report[0].digest[0] = 1
    with pytest.raises(AgentError, match="address"):
        index.look_up(1, report, 1)


@given(st.lists(st.binary(min_size=16, max_size=16).map(lambda part: part * (PAGE // 16)), min_size=1, max_size=4))
def test_digest_is_the_one_of_python_xxhash(pages: list[bytes]) -> None:
    words = ffi.new("uint64_t[]", 2 * len(pages))
    lib.udd_digest_pages(b"".join(pages), len(pages), words)
    for i, content in enumerate(pages):
        assert words[2 * i] | words[2 * i + 1] << 64 == xxhash.xxh3_128_intdigest(content)
