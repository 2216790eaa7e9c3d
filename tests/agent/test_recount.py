"""The engine counts an agent's references anew, in several messages, while the process moves its memory about."""

import functools
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent.conftest import LIBRARY, Wrapper
from agent.fake_engine import PAGE, FakeEngine
from agent.puppet import Puppet
from agent.test_wire import SALT, page
from support.ledger import Ledger

from udedup._native import ffi, lib

PROGRAM = Path(__file__).parent / "programs" / "puppet.c"
RUNS = lib.UDD_ITEMS_MAX + 8
"""More than one answer has room for: every other page is merged."""
PAGES = 2 * RUNS
LOW, HIGH = 1, PAGES - 1
"""Pages that are not merged, before the first answer's end and behind it."""
COUNTED, UNCOUNTED = 2, PAGES - 2
"""Pages that are, likewise."""

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")
Run = tuple[int, int, int]
"""Address, segment, slot of one page."""


@functools.cache
def content() -> bytes:
    """Of the segment: every other page is equal to the puppet's."""
    return b"".join(bytes(PAGE) if number % 2 else page(number) for number in range(PAGES))


class Counting:
    """A puppet whose references are being counted, and the engine that does it."""

    def __init__(self, fake: FakeEngine, puppet: Puppet) -> None:
        self.fake = fake
        self.puppet = puppet
        self.stats = ffi.cast("struct udd_stats *", ffi.from_buffer(fake.area))
        self.drops = ffi.cast("struct udd_drop_ring *", ffi.from_buffer(fake.area) + lib.UDD_SHARED_DROPS)

    def merge(self) -> None:
        assert self.fake.segment(1, content(), slots=PAGES, size=PAGES * PAGE) == 0
        for first in range(0, PAGES, 64):
            pages = min(64, PAGES - first)
            wanted = sum(1 << i for i in range(0, pages, 2))
            assert self.fake.merge(self.puppet.address + first * PAGE, pages, 1, first)[0] == wanted

    def ask(self, cursor: int = 0) -> list[Run]:
        """The next part of the count."""
        self.fake.send(self.fake.header(lib.UDD_RUNS, value=1) + struct.pack("<Q", cursor))
        status, count, head, body = self.fake.answer()
        assert status == 0
        if cursor == 0:
            self.tail = head
        runs = [struct.unpack_from("<QIII", body, 24 * i) for i in range(count)]
        return [(address + i * PAGE, segment, slot + i) for address, pages, segment, slot in runs for i in range(pages)]

    def count(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[list[Run], bool]:
        """All of them, and whether the count holds; ``meanwhile`` happens after its first part."""
        lost = self.stats.drops_lost
        runs = part = self.ask()
        meanwhile()
        while part:
            part = self.ask(runs[-1][0] + PAGE)
            runs += part
        return runs, bool(self.stats.drops_lost == lost)

    def dropped(self) -> list[tuple[int, int]]:
        """(segment, slot) of references given back since the count began."""
        records = [self.drops.slots[i % lib.UDD_DROP_SLOTS] for i in range(self.tail, self.drops.head)]
        return [(record.segment, record.slot + i) for record in records for i in range(record.pages)]


@pytest.fixture
def counting(compile_c: Callable[..., Path], ledger: Ledger) -> Iterator[Counting]:
    with tempfile.TemporaryDirectory(prefix="udedup-test-", dir="/tmp") as folder:
        fake = FakeEngine(Path(folder) / "socket")
        environment = {"LD_PRELOAD": str(LIBRARY), "UDEDUP_SOCKET": str(fake.path), "SALT": str(SALT)}
        environment["PAGES"] = str(PAGES)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        program = compile_c(PROGRAM, "-Inative")
        puppet = Puppet(Wrapper(None, ledger).start(program, extra=environment, **pipes))
        fake.accept()
        fake.scan()
        counting = Counting(fake, puppet)
        counting.merge()
        yield counting
        assert puppet.is_right()
        puppet.end()
        fake.close()


def test_count_in_several_parts(counting: Counting) -> None:
    runs, holds = counting.count(lambda: counting.puppet.swap(COUNTED, COUNTED + 1))
    assert holds
    assert len(set(runs)) == len(runs) == RUNS
    counting.puppet.write(COUNTED + 1)
    counting.puppet.write(UNCOUNTED)
    assert counting.dropped() == [(1, COUNTED), (1, UNCOUNTED)]


@pytest.mark.parametrize(
    ("first", "second"),
    [(LOW, UNCOUNTED), (COUNTED, HIGH), (COUNTED, UNCOUNTED)],
    ids=["to what was counted", "to what was not", "both"],
)
def test_memory_moves_across_the_border_of_a_count(counting: Counting, first: int, second: int) -> None:
    """Nothing that was not counted is given back, nothing is counted twice, and another count gets it right."""

    def meanwhile() -> None:
        counting.puppet.swap(first, second)
        for place in (first, second):
            counting.puppet.write(place)
        counting.puppet.swap(4, UNCOUNTED - 2)

    runs, holds = counting.count(meanwhile)
    assert set(counting.dropped()) <= {(segment, slot) for _, segment, slot in runs}
    assert len(set(runs)) == len(runs)
    assert not holds
    again, holds = counting.count()
    assert holds
    # Each merged page that was written to is a page less.
    assert len(set(again)) == len(again) == RUNS - sum(place % 2 == 0 for place in (first, second))
    assert counting.dropped() == []
    counting.puppet.write(6)
    assert counting.dropped() == [(1, 6)]


def test_memory_moves_behind_what_was_counted(counting: Counting) -> None:
    """To where the engine has not asked yet, but what it was told of already reaches that far."""
    last = 2 * (lib.UDD_ITEMS_MAX - 1)
    runs, holds = counting.count(lambda: counting.puppet.swap(COUNTED, last + 1))
    assert holds
    assert len({slot for _, _, slot in runs}) == len(runs) == RUNS
    counting.puppet.write(last + 1)
    assert counting.dropped() == [(1, COUNTED)]
