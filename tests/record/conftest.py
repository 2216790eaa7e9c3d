"""Processes that hold what a test says, and a recording."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from support.ledger import Ledger

from udedup.record.recording import About, Recording, Row

PROGRAM = """
import mmap, os, random, sys
PAGE = 4096
memory = mmap.mmap(-1, 4096 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for line in sys.stdin:
    word, first, count, seed = line.split()
    pages = range(int(first), int(first) + int(count))
    generator = random.Random(seed)
    if word == "fill":
        for page in pages:
            memory[page * PAGE : (page + 1) * PAGE] = generator.randbytes(PAGE)
    elif word == "zero":
        for page in pages:
            memory[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    elif word == "fork":
        os.fork()
    elif word == "mergeable":
        memory.madvise(mmap.MADV_MERGEABLE, pages.start * PAGE, len(pages) * PAGE)
    os.write(1, b"%d\\n" % os.getpid())  # in one piece, whoever else writes after a fork
"""


class Holder:
    """A process with 4096 pages that nobody else looks at."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def tell(self, word: str, first: int = 0, count: int = 0, seed: int = 0) -> int:
        """``fill`` pages with random bytes, ``zero`` them, make them ``mergeable``, ``fork``; returns who answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word} {first} {count} {seed}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def hold(ledger: Ledger) -> Iterator[Callable[[], Holder]]:
    """Makes a process."""
    with ExitStack() as stack:

        def make() -> Holder:
            holder = Holder()
            ledger.add_process(holder.pid)
            stack.callback(holder.end)
            return holder

        yield make


def row(seconds: float, sharing: int, merges: int, **more: float) -> Row:
    """A sample in which nothing else happens."""
    counts = dict.fromkeys(("zero_pages", "zero_shared", "shared", "opportunities", "merges_at_once"), 0)
    counts |= dict.fromkeys(("known_opportunities", "known_merges", "known_merges_at_once"), 0)
    fields = counts | {"present": 100, "opportunity": 50} | more
    return Row(seconds=seconds, sharing=sharing, merges=merges, **fields)  # type: ignore[arg-type]


@pytest.fixture
def recording() -> Recording:
    """Five samples; before the first the merger had looked at 1000 pages already."""
    rows = [
        row(0.0, 0, 0, visits=1000, cpu_engine=2.0),
        row(1.0, 10, 20, visits=1040, cpu_engine=2.5),
        row(2.0, 40, 60, visits=1100, cpu_engine=3.0),
        row(3.0, 30, 80, visits=1160, cpu_engine=3.5, pss=4096),
        row(4.0, 0, 80, visits=1200, cpu_engine=4.0, present=0, opportunity=0),
    ]
    about = About(settings={"policy": "xlh & <more>"}, marks={"last <starts>": 1.5}, interval=1.0)
    return Recording(rows, about, np.linspace(1, 9, 80, dtype=np.float32))
