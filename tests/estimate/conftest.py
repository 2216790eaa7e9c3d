"""Processes that do what a test says, and an oracle that reads them byte by byte."""

import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import trio
from support.ledger import Ledger

from udedup.estimate.figures import Estimate
from udedup.estimate.survey import Survey

PAGE = 4096
PROGRAM = """
import json, mmap, os, random, sys, threading, time
PAGE = 4096
def anonymous(pages):
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
for line in sys.stdin:
    answer = None
    exec(json.loads(line))
    os.write(1, json.dumps(answer).encode() + b"\\n")
"""


class Subject:
    """A process with pages that nobody else looks at."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def do(self, code: str) -> object:
        """Has it run some Python; returns what that left in ``answer``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.stdin.close()
        # Children may have it, too, so that its end is not waited for.
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def start(ledger: Ledger) -> Iterator[Callable[[], Subject]]:
    """Makes a process."""
    with ExitStack() as stack:

        def make() -> Subject:
            subject = Subject()
            ledger.add_process(subject.pid)
            stack.callback(subject.end)
            return subject

        yield make


def survey(
    pids: Sequence[int],
    part: float = 1.0,
    seed: int | None = None,
    threads: int = 1,
    on_looked: Callable[[int], None] = lambda pages: None,
) -> Estimate:
    """Looks, without images."""
    found = Survey(pids, part, seed)
    trio.run(found.look, threads, on_looked)
    return found.judge()


@attrs.define
class Counts:
    """What the oracle found, pages."""

    pages: int = 0
    already: int = 0
    already_file: int = 0
    file: int = 0
    zero: int = 0
    zero_file: int = 0
    within: int = 0
    between: int = 0
    anonymous: int = 0
    of_files: int = 0
    mixed: int = 0
    known: int = 0
    by_process: dict[int, int] = attrs.Factory(lambda: defaultdict(int))
    """Saved within and between, in thousandths."""


def look_closely(pids: Sequence[int], known: frozenset[bytes] = frozenset()) -> Counts:
    """Counts it all anew, page by page and by another hash. As root; the processes must be still."""
    counts = Counts()
    seen: set[int] = set()
    contents: dict[bytes, list[tuple[int, bool]]] = defaultdict(list)
    for pid in pids:
        for page, entry in _present(pid):
            of_file = bool(entry >> 61 & 1)
            counts.pages += 1
            frame = entry & (1 << 55) - 1
            if frame in seen:
                counts.already += 1
                counts.already_file += of_file
                continue
            seen.add(frame)
            counts.file += of_file
            if not any(page):
                counts.zero += 1
                counts.zero_file += of_file
            else:
                digest = hashlib.blake2b(page).digest()
                counts.known += digest in known
                contents[digest].append((pid, of_file))
    for places in contents.values():
        owners = {pid for pid, _ in places}
        files = sum(of_file for _, of_file in places)
        counts.within += len(places) - len(owners)
        counts.between += len(owners) - 1
        counts.anonymous += max(len(places) - files - 1, 0)
        counts.of_files += max(files - 1, 0)
        counts.mixed += 0 < files < len(places)
        for owner in owners:
            own = sum(pid == owner for pid, _ in places)
            counts.by_process[owner] += 1000 * (own - 1) + 1000 * (len(owners) - 1) // len(owners)
    return counts


def _present(pid: int) -> Iterator[tuple[bytes, int]]:
    """Content and pagemap entry of each page that is in memory and not the kernel's zero page."""
    zero_pages = _zero_page(pid)
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "[v" in line:
                continue
            start, end = (int(text, 16) for text in re.split("[- ]", line)[:2])
            pagemap.seek(start // PAGE * 8)
            raw = pagemap.read((end - start) // PAGE * 8)
            for number, entry in enumerate(memoryview(raw).cast("Q")):
                if entry >> 63 and entry & (1 << 55) - 1 not in zero_pages:
                    memory.seek(start + number * PAGE)
                    yield memory.read(PAGE), entry


def _zero_page(_pid: int) -> set[int]:
    """The frame that is shown for memory that was read and never written, by a mapping of our own."""
    import mmap

    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        assert memory[0] == 0
        address = _address(memory)
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(address // PAGE * 8)
            return {int.from_bytes(pagemap.read(8), "little") & (1 << 55) - 1}


def _address(memory: object) -> int:
    import ctypes

    # Not writable for the kernel's sake: it must stay unwritten.
    view = memoryview(memory)  # type: ignore[arg-type]
    with view:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
