"""A real agent and an engine that lies, talks nonsense or goes away: memory stays right whatever it says."""

import fcntl
import itertools
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
from agent.conftest import LIBRARY, Wrapper
from agent.fake_engine import HEADER, PAGE, SEALS, SLOTS, FakeEngine
from agent.puppet import PAGES, Puppet
from support.ledger import Ledger

from udedup._native import ffi, lib

PROGRAM = Path(__file__).parent / "programs" / "puppet.c"
SALT = 77
ALL = (1 << PAGES) - 1
MASK = 2**64 - 1

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


def page(number: int, tag: int = 1) -> bytes:
    """What page ``number`` of a puppet holds (word_of() in programs/merged.h)."""
    base = (SALT * 31 + tag) * 0x9E3779B97F4A7C15 + number * 512
    words = []
    for word in range(PAGE // 8):
        z = (base + word) & MASK
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        words.append(z ^ z >> 31)
    return struct.pack("<512Q", *words)


CONTENT = b"".join(page(number) for number in range(PAGES))


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with tempfile.TemporaryDirectory(prefix="udedup-test-", dir="/tmp") as folder:
        fake = FakeEngine(Path(folder) / "socket")
        yield fake
        fake.close()


@pytest.fixture
def joins(compile_c: Callable[..., Path], ledger: Ledger, fake: FakeEngine) -> Iterator[Callable[[int], Puppet]]:
    """Starts a puppet that joins the fake engine, which answers with those flags of its configuration."""
    program = compile_c(PROGRAM, "-Inative")
    environment = {"LD_PRELOAD": str(LIBRARY), "UDEDUP_SOCKET": str(fake.path), "SALT": str(SALT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    puppets = []

    def join(flags: int) -> Puppet:
        puppets.append(Puppet(Wrapper(None, ledger).start(program, extra=environment, **pipes)))
        fake.accept(flags=flags)
        return puppets[-1]

    yield join
    for puppet in puppets:
        assert puppet.is_right()
        puppet.end()


@pytest.fixture
def puppet(joins: Callable[[int], Puppet], fake: FakeEngine) -> Puppet:
    """A puppet that has joined the fake engine, which has learnt of its memory."""
    puppet = joins(0)
    fake.scan()
    return puppet


def mappings_known(fake: FakeEngine) -> int:
    """How many mappings the agent has seen at its last look at all of its memory."""
    offset: int = lib.UDD_SHARED_STATS + ffi.offsetof("struct udd_stats", "vmas")
    return int(struct.unpack_from("<Q", fake.area, offset)[0])


def test_merges_what_is_equal(fake: FakeEngine, puppet: Puppet) -> None:
    assert fake.segment(1, CONTENT) == 0
    assert fake.merge(puppet.address, PAGES) == (ALL, 0, 0, 0, 0)
    assert puppet.merged() == PAGES
    status, count, _, body = fake.request(lib.UDD_RUNS, struct.pack("<Q", 0))
    assert (status, count) == (0, 1)
    assert struct.unpack("<QIIII", body)[:4] == (puppet.address, PAGES, 1, 0)
    puppet.write(7)
    assert puppet.is_right()
    assert fake.request(lib.UDD_UNMERGE)[2] == PAGES - 1
    assert puppet.merged() == 0


def test_new_content_of_merged_memory_can_be_hinted_at_once(fake: FakeEngine, puppet: Puppet) -> None:
    """Guests and caches use the same memory for one thing after the other."""
    assert fake.segment(1, CONTENT) == 0
    mappings = mappings_known(fake)
    assert fake.merge(puppet.address, PAGES)[0] == ALL
    puppet.ask("map")
    deadline = time.monotonic() + 20
    while mappings_known(fake) == mappings:  # until it has looked anew what memory it has
        assert time.monotonic() < deadline
        fake.scan()
    for number in range(PAGES):
        puppet.write(number)
    status, count, _, body = fake.request(lib.UDD_VISIT, struct.pack("<QQ", puppet.address, PAGES), 1)
    assert (status, count) == (0, PAGES)
    assert struct.unpack_from("<Q", body, 16)[0] == puppet.address
    assert fake.segment(2, b"".join(page(number, 2) for number in range(PAGES))) == 0
    merged, mismatch, busy, gone, no_vma = fake.merge(puppet.address, PAGES, 2)
    # On a busy machine the first may have broken where they are, for want of the lock, and stay private for good.
    assert (merged | gone, mismatch, busy, no_vma) == (ALL, 0, 0, 0)
    assert merged
    assert puppet.is_right()
    assert puppet.merged() == merged.bit_count()


def test_lone_writes_leave_memory_that_can_be_merged_again(
    compile_c: Callable[..., Path], ledger: Ledger, fake: FakeEngine
) -> None:
    """Hundreds a second, as in a guest that reads one file after the other."""
    pages, run = 320, 64
    program = compile_c(PROGRAM, "-Inative")
    environment = {
        "LD_PRELOAD": str(LIBRARY),
        "UDEDUP_SOCKET": str(fake.path),
        "SALT": str(SALT),
        "PAGES": str(pages),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    puppet = Puppet(Wrapper(None, ledger).start(program, extra=environment, **pipes))
    fake.accept()
    fake.scan()
    content = b"".join(page(number) for number in range(pages))
    assert fake.segment(1, content, slots=pages, size=pages * PAGE) == 0
    for first in range(0, pages, run):
        assert fake.merge(puppet.address + first * PAGE, run, slot=first)[0] == ALL
    for number in range(pages):
        puppet.write(number * 37 % pages)
        time.sleep(0.001)
    maps = Path(f"/proc/{puppet.process.pid}/maps").read_text(encoding="utf-8").splitlines()
    # The agent's own mapping of the store can't be written to.
    assert not [line for line in maps if "udedup-store" in line and " rw-p " in line]
    assert puppet.is_right()
    puppet.end()


def test_other_content_is_a_mismatch(fake: FakeEngine, puppet: Puppet) -> None:
    wrong = bytearray(CONTENT)
    for number in (0, 20, 63):
        wrong[number * PAGE + 4095] ^= 1
    assert fake.segment(1, bytes(wrong)) == 0
    mismatch = 1 | 1 << 20 | 1 << 63
    assert fake.merge(puppet.address, PAGES) == (ALL & ~mismatch, mismatch, 0, 0, 0)
    assert puppet.is_right()
    assert puppet.merged() == PAGES - 3
    # One page off: nothing matches, though all of it is in the store.
    assert fake.segment(2, CONTENT) == 0
    assert fake.merge(puppet.address, 8, 2, 1)[1] == 0xFF
    assert puppet.is_right()


@pytest.mark.parametrize(
    ("address", "pages"),
    [(0, 1), (4096, 4), (0x7FFFFFFFF000, 2), (2**47, 64), (2**64 - 4096, 1), (2**64 - 8 * 4096, 16)],
)
def test_address_that_is_not_its_own(fake: FakeEngine, puppet: Puppet, address: int, pages: int) -> None:
    assert fake.segment(1, CONTENT) == 0
    merged, mismatch, busy, gone, no_vma = fake.merge(address, pages)
    assert (merged, mismatch, no_vma) == (0, 0, 0)
    assert busy | gone == (1 << pages) - 1


def test_run_that_reaches_beyond_its_memory(fake: FakeEngine, puppet: Puppet) -> None:
    assert fake.segment(1, CONTENT) == 0
    merged, _, _, gone, _ = fake.merge(puppet.address + 60 * PAGE, 8, 1, 60)
    assert merged == 0xF
    assert gone == 0xF0
    assert fake.merge(puppet.address + 1, 1)[0] == 0  # not a page's address
    assert fake.merge(puppet.address, 0)[0] == 0
    assert fake.merge(puppet.address, 65)[0] == 0  # more than a mask can tell


def test_slots_out_of_range(fake: FakeEngine, puppet: Puppet) -> None:
    assert fake.segment(1, CONTENT) == 0
    for slot, pages in ((SLOTS, 1), (SLOTS - 1, 2), (2**32 - 1, 1), (2**32 - 8, 16)):
        assert fake.merge(puppet.address, pages, 1, slot) == (0, 0, 0, (1 << pages) - 1, 0)
    assert fake.merge(puppet.address, 1, 99)[3] == 1  # no such segment
    assert puppet.merged() == 0


def reported(fake: FakeEngine, puppet: Puppet) -> dict[int, int]:
    """A round of the linear scan: the digests of those pages of the puppet that it reports, by number."""
    digests = {}
    wrapped = 0
    while not wrapped:
        body = fake.scan()
        visited, changed, zero, wrapped = struct.unpack_from("<IIII", body)
        reports = list(struct.iter_unpack("<QQQQ", body[16:]))
        assert len(reports) + changed + zero <= visited
        for address, low, high, _ in reports:
            if 0 <= address - puppet.address < PAGES * PAGE:
                digests[(address - puppet.address) // PAGE] = low | high << 64
    return digests


def test_pages_are_reported_while_they_keep_still(fake: FakeEngine, puppet: Puppet) -> None:
    """Whichever bit of a page has changed since it was reported, and even if the next look is at a part of it only."""
    expected = {number: xxhash.xxh3_128_intdigest(page(number)) for number in range(PAGES)}
    reported(fake, puppet)
    assert reported(fake, puppet) == expected
    flipped = bytearray(page(9))
    for part in range(0, PAGE, 256):
        puppet.flip(9, part + 7)
        flipped[part + 7] ^= 1
        assert reported(fake, puppet).keys() == expected.keys() - {9}
        assert reported(fake, puppet) == expected | {9: xxhash.xxh3_128_intdigest(bytes(flipped))}
    for part in range(0, PAGE, 256):
        puppet.flip(9, part + 7)


def test_pages_are_reported_at_first_sight(fake: FakeEngine, joins: Callable[[int], Puppet]) -> None:
    """If the engine wants them so; one that changes afterwards has to keep still first, as ever."""
    puppet = joins(lib.UDD_CONFIG_FIRST_SIGHT)
    expected = {number: xxhash.xxh3_128_intdigest(page(number)) for number in range(PAGES)}
    assert reported(fake, puppet) == expected
    for _ in range(2):
        puppet.flip(9, 100)
        assert reported(fake, puppet).keys() == expected.keys() - {9}
        assert reported(fake, puppet).keys() == expected.keys()


def test_pages_that_change_all_the_time_are_passed_over(fake: FakeEngine, joins: Callable[[int], Puppet]) -> None:
    """For longer and longer; once they keep still, they are reported."""
    puppet = joins(lib.UDD_CONFIG_SMART_SCAN)
    busy = range(PAGES // 2, PAGES)
    still: set[int] = set()
    looked = []

    def change(offset: int) -> None:
        for at in busy:
            for part in range(0, PAGE, 512):
                puppet.flip(at, part + offset)

    for number in range(23):
        change(number)
        body = fake.scan()
        _, changed, _, wrapped = struct.unpack_from("<IIII", body)
        assert wrapped
        if changed >= len(busy):
            looked.append(number)
    assert looked == [0, 1, 2, 3, 5, 8, 13, 22]
    for number in range(23):
        change(number)
    # The next look finds them changed once more.
    for _ in range(8 + 1 + 8 + 1):
        still |= reported(fake, puppet).keys()
    assert still >= set(busy)


@pytest.mark.parametrize("missing", [0x2, 0x4, 0x10, SEALS])
def test_segment_that_could_change_is_refused(fake: FakeEngine, puppet: Puppet, missing: int) -> None:
    assert fake.segment(1, CONTENT, seals=SEALS & ~missing) < 0
    assert fake.merge(puppet.address, 4)[0] == 0


def test_segment_that_is_odd_is_refused(fake: FakeEngine, puppet: Puppet) -> None:
    assert fake.segment(1, CONTENT, seals=SEALS & ~0x10, writable=True) < 0
    assert fake.segment(1, CONTENT, slots=0) < 0
    assert fake.segment(1, CONTENT, slots=SLOTS + 1) < 0  # longer than the file
    assert fake.segment(1, CONTENT, slots=2**32 - 1) < 0
    assert fake.request(lib.UDD_SEGMENT, struct.pack("<II", 1, SLOTS))[0] < 0  # no descriptor
    assert fake.request(lib.UDD_SEGMENT_DROP, struct.pack("<II", 1, 0))[0] < 0
    assert fake.merge(puppet.address, 4)[0] == 0
    # None of which keeps a good one out.
    assert fake.segment(1, CONTENT) == 0
    assert fake.request(lib.UDD_SEGMENT_DROP, struct.pack("<II", 1, 0))[0] == 0


def test_second_segment_of_the_same_name(fake: FakeEngine, puppet: Puppet) -> None:
    """Offered twice under one number, with other content: what is compared must be what is mapped."""
    assert fake.segment(1, CONTENT) == 0
    fake.segment(1, bytes(SLOTS * PAGE))
    fake.merge(puppet.address, PAGES)
    assert puppet.is_right()


def test_segment_in_use_is_not_dropped(fake: FakeEngine, puppet: Puppet) -> None:
    assert fake.segment(1, CONTENT) == 0
    assert fake.merge(puppet.address, 4)[0] == 0xF
    assert fake.request(lib.UDD_SEGMENT_DROP, struct.pack("<II", 1, 0))[0] == -16
    assert puppet.is_right()


def test_moved_to_other_slots(fake: FakeEngine, puppet: Puppet) -> None:
    assert fake.segment(1, CONTENT) == 0
    assert fake.merge(puppet.address, PAGES)[0] == ALL
    assert fake.segment(2, bytes(PAGE) + CONTENT) == 0
    assert fake.merge(puppet.address, PAGES, 2, 0)[1] == ALL  # off by one
    assert fake.merge(puppet.address, PAGES, 2, 1)[0] == ALL
    assert fake.request(lib.UDD_SEGMENT_DROP, struct.pack("<II", 1, 0))[0] == 0
    assert puppet.merged() == PAGES


def test_locked_memory_stays_where_it_is(fake: FakeEngine, puppet: Puppet) -> None:
    """In other slots it would not be locked any more."""
    assert fake.segment(1, CONTENT) == 0
    assert fake.merge(puppet.address, PAGES)[0] == ALL
    assert fake.segment(2, CONTENT) == 0
    assert puppet.ask("lock") == "ok"
    assert fake.merge(puppet.address, PAGES, 2)[:3] == (0, 0, ALL)
    assert int(puppet.ask("locked")) == PAGES * PAGE // 1024


def test_ranges_that_are_nobodys(fake: FakeEngine, puppet: Puppet) -> None:
    for address in (0, 1, 2**47, 2**64 - 4096, puppet.address - PAGE):
        for pages in (1, 1024, 2**32, 2**64 - 1):
            item = struct.pack("<QQ", address, pages)
            for kind in (lib.UDD_VISIT, lib.UDD_COPY, lib.UDD_UNMERGE):
                assert fake.request(kind, item, 1)[0] in (0, -16)
    body = fake.request(lib.UDD_COPY, struct.pack("<QQ", puppet.address, 2), 1)[3]
    assert struct.unpack_from("<QQ", body) == (3, 0)
    assert fake.area[lib.UDD_SHARED_COPY : lib.UDD_SHARED_COPY + 2 * PAGE] == CONTENT[: 2 * PAGE]


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        bytes(24),
        HEADER.pack(0x44445555, 99, 0, 1, 0, 0),
        HEADER.pack(0x44445555, lib.UDD_MERGE, 512, 1, 0, 0) + bytes(24),
        HEADER.pack(0x44445555, lib.UDD_MERGE, 65535, 1, 0, 0) + bytes(60000),
        HEADER.pack(0x44445555, lib.UDD_VISIT, 3, 1, 0, 0) + bytes(32),
        HEADER.pack(0x44445555, lib.UDD_SCAN, 0, 1, 0, 0),
        HEADER.pack(0x44445555, lib.UDD_SEGMENT, 0, 1, 0, 0) + bytes(4),
        HEADER.pack(0x44445555, lib.UDD_RUNS, 0, 1, 0, 0)[:20],
        HEADER.pack(0x44445554, lib.UDD_SCAN, 0, 1, 0, 0) + bytes(8),
    ],
    ids=["byte", "zeros", "type", "short-merge", "many", "short-visit", "short-scan", "short-segment", "cut", "magic"],
)
def test_nonsense_ends_the_connection(fake: FakeEngine, puppet: Puppet, packet: bytes) -> None:
    assert fake.segment(1, CONTENT) == 0
    assert fake.merge(puppet.address, PAGES)[0] == ALL
    fake.send(packet)
    assert fake.link.recv(65536) == b""
    assert puppet.is_right()
    puppet.write(3)
    assert puppet.is_right()
    # It comes back, and says that it was here before.
    hello = fake.accept()
    assert struct.unpack_from("<II", hello, HEADER.size)[1] & lib.UDD_HELLO_REJOIN
    assert fake.scan()


# ---- segments of an earlier engine ----


def runs_of(fake: FakeEngine) -> list[tuple[int, ...]]:
    """Address, pages, segment, slot of the runs that the agent counts for this engine, neighbours joined."""
    _, count, _, body = fake.request(lib.UDD_RUNS, struct.pack("<Q", 0))
    runs: list[tuple[int, ...]] = []
    for i in range(count):
        address, pages, segment, slot = struct.unpack_from("<QIII", body, 24 * i)
        if runs and (address, segment, slot) == (
            runs[-1][0] + runs[-1][1] * PAGE,
            runs[-1][2],
            runs[-1][3] + runs[-1][1],
        ):
            address, pages, slot = runs[-1][0], runs[-1][1] + pages, runs.pop()[3]
        runs.append((address, pages, segment, slot))
    return runs


@pytest.fixture
def heir(fake: FakeEngine, puppet: Puppet) -> FakeEngine:
    """The next engine; half of the puppet's pages are merged with a segment of the one before."""
    assert fake.segment(1, CONTENT) == 0
    assert fake.merge(puppet.address, PAGES // 2)[0] == ALL >> PAGES // 2
    fake.hang_up()
    fake.accept(engine_id=(33, 44))
    fake.scan()
    return fake


def test_segment_is_handed_over(heir: FakeEngine, puppet: Puppet) -> None:
    assert runs_of(heir) == []
    cursor, inode, (descriptor,) = heir.handover()
    assert os.fstat(descriptor).st_ino == inode
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert os.pread(descriptor, len(CONTENT), 0) == CONTENT
    assert heir.handover(cursor)[0] == 0
    assert heir.offer(5, descriptor) == (0, 1)
    assert runs_of(heir) == [(puppet.address, PAGES // 2, 5, 0)]
    assert heir.handover()[0] == 0
    assert heir.merge(puppet.address + PAGES // 2 * PAGE, PAGES // 2, 5, PAGES // 2)[0] == ALL >> PAGES // 2
    assert runs_of(heir) == [(puppet.address, PAGES, 5, 0)]
    assert heir.offer(5, descriptor) == (0, 0)  # once more changes nothing
    assert heir.request(lib.UDD_SEGMENT_DROP, struct.pack("<II", 5, 0))[0] == -16
    assert puppet.is_right()
    assert heir.request(lib.UDD_UNMERGE)[2] == PAGES
    assert heir.request(lib.UDD_SEGMENT_DROP, struct.pack("<II", 5, 0))[0] == 0
    os.close(descriptor)


def test_drops_are_told_of_what_was_counted(heir: FakeEngine, puppet: Puppet) -> None:
    """Of runs in a segment that was taken over not before they were reported."""
    drops = ffi.cast("struct udd_drop_ring *", ffi.cast("char *", ffi.from_buffer(heir.area)) + lib.UDD_SHARED_DROPS)
    puppet.write(1)
    _, _, (descriptor,) = heir.handover()
    assert heir.offer(5, descriptor) == (0, 1)
    os.close(descriptor)
    puppet.write(2)
    heir.send(heir.header(lib.UDD_RUNS, value=1) + struct.pack("<Q", 0))
    _, count, head, body = heir.answer()
    assert (count, head) == (2, drops.head) == (2, 0)
    last = struct.unpack_from("<QI", body, 24 * (count - 1))
    heir.send(heir.header(lib.UDD_RUNS, value=1) + struct.pack("<Q", last[0] + last[1] * PAGE))
    assert heir.answer()[1] == 0
    puppet.write(20)
    heir.scan()
    assert drops.head == 1
    record = drops.slots[0]
    assert (record.segment, record.slot, record.pages) == (5, 20, 1)


def test_other_memory_in_the_place_of_a_segment(heir: FakeEngine, puppet: Puppet) -> None:
    """An engine that gives the number of an old segment to something else, or another length, changes no page."""
    cursor, _, (descriptor,) = heir.handover()
    assert cursor
    for slots in (1, SLOTS - 1):
        assert heir.offer(5, descriptor, slots)[0] < 0
    assert heir.segment(5, bytes(SLOTS * PAGE)) == 0
    assert heir.offer(5, descriptor)[0] < 0
    assert runs_of(heir) == []
    rest = puppet.address + PAGES // 2 * PAGE
    assert heir.merge(rest, PAGES // 2, 5, PAGES // 2)[1] == ALL >> PAGES // 2
    assert puppet.is_right()
    assert heir.offer(6, descriptor) == (0, 1)
    assert heir.merge(rest, PAGES // 2, 6, PAGES // 2)[0] == ALL >> PAGES // 2
    os.close(descriptor)
    puppet.write(2)
    assert puppet.is_right()


@pytest.mark.parametrize("cursor", [1, 4095, 4096, 2**32, 2**32 + 1, 2**63, 2**64 - 1])
def test_cursor_beyond_its_segments(heir: FakeEngine, cursor: int) -> None:
    assert heir.handover(cursor)[0] == 0
    assert heir.handover()[0] == 1


def test_segment_that_nobody_takes_over(heir: FakeEngine, puppet: Puppet) -> None:
    """Its pages stay merged; the last that is given back takes the descriptor and the mapping along."""
    (descriptor,) = heir.handover()[2]
    os.close(descriptor)
    maps = Path(f"/proc/{puppet.process.pid}/maps")
    assert puppet.merged() == PAGES // 2
    for number in range(PAGES // 2):
        assert "udedup-store" in maps.read_text()
        puppet.write(number)
    assert puppet.is_right()
    assert heir.request(lib.UDD_UNMERGE)[0] == 0
    assert heir.handover()[0] == 0
    assert "r--s" not in [line.split()[1] for line in maps.read_text().splitlines() if "udedup-store" in line]


def test_engine_that_is_gone_before_the_answer(fake: FakeEngine, puppet: Puppet) -> None:
    assert fake.segment(1, CONTENT) == 0
    run = struct.pack("<QIIII", puppet.address, PAGES, 1, 0, 0)
    fake.send(fake.header(lib.UDD_MERGE, 1) + run)
    fake.hang_up()
    fake.accept()
    assert puppet.is_right()
    assert fake.scan()


def test_engine_that_turns_it_away_is_asked_less_and_less_often(fake: FakeEngine, puppet: Puppet) -> None:
    """A tenth of a second to the second try, and twice as long to each further one; joining begins anew."""
    for _ in range(2):
        fake.hang_up()
        times = []
        for _ in range(3):
            fake.take_hello()
            times.append(time.monotonic())
            fake.hang_up()
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert all(gap > 0.9 * wanted for gap, wanted in zip(gaps, (0.2, 0.4), strict=True)), gaps
        fake.accept()
    assert puppet.is_right()


def test_descriptors_nobody_asked_for_are_not_kept(fake: FakeEngine, puppet: Puppet) -> None:
    (worker,) = [
        task
        for task in Path(f"/proc/{puppet.process.pid}/task").iterdir()
        if (task / "comm").read_text().startswith("udedup")
    ][:1]
    fake.request(lib.UDD_RUNS, struct.pack("<Q", 0))  # answered: it has opened all that it needs
    before = len(list((worker / "fd").iterdir()))
    with open("/dev/null", "rb") as null:  # noqa: PTH123
        for _ in range(10):
            fake.request(lib.UDD_RUNS, struct.pack("<Q", 0), descriptors=[null.fileno()])
            fake.request(lib.UDD_RUNS, struct.pack("<Q", 0), descriptors=[null.fileno()] * 5)
    fake.request(lib.UDD_RUNS, struct.pack("<Q", 0))  # an answer comes before the request's descriptors are closed
    assert len(list((worker / "fd").iterdir())) <= before
