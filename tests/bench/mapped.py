#!/usr/bin/env python3
"""What does memory hold twice when several processes map the same data from two images?

Two images with the same random content, mapped privately to be read, whole, by half of the processes each. First bare,
then wrapped, once all of it is merged. Counted by the kernel: pages of the images in the page cache of the mount and of
the files beneath it (cachestat), those of the store, and the processes' Pss of images and store. Pages in the page
cache that nobody maps go when memory is short; "dropped" is after they were told to go (posix_fadvise).
"""

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
from measuring import PAGE, Bench, Engine, Figure, Program, Report, main, smaps, status, wait_for_agents

PROCESSES: Final = 4
MEBIBYTES: Final = 64
MEBIBYTES_QUICK: Final = 16
IMAGES: Final = ("one.img", "two.img")
MERGE_SECONDS: Final = 120.0
SYS_CACHESTAT: Final = 451


@attrs.frozen
class Memory:
    """What is held, in bytes."""

    mount: int
    """In the page cache, as pages of the images in the mount."""

    beneath: int
    """In the page cache, as pages of the image files."""

    store: int
    pss: int
    """Of all processes, of images and store."""

    @property
    def total(self) -> int:
        """All of it once; Pss is in it already."""
        return self.mount + self.beneath + self.store


def cached(path: Path) -> int:
    """Bytes of a file in the page cache. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        counts = (ctypes.c_uint64 * 5)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(SYS_CACHESTAT, descriptor, (ctypes.c_uint64 * 2)(0, 0), counts, 0) != 0:
            raise OSError(ctypes.get_errno(), "cachestat")
    finally:
        os.close(descriptor)
    return counts[0] * PAGE


def drop(path: Path) -> None:
    """Has the kernel forget what it has cached of a file, as far as nobody maps it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def look(engine: Engine, files: dict[str, Path], programs: Sequence[Program]) -> Memory:
    """What is held now."""
    assert engine.mount is not None
    pss = sum(
        sizes["Pss"]
        for program in programs
        for header, sizes in smaps(program.pid)
        if ".img" in header or "/memfd:udedup-store" in header
    )
    return Memory(
        mount=sum(cached(engine.mount / name) for name in files),
        beneath=sum(cached(path) for path in files.values()),
        store=status(engine)["pages_shared"] * PAGE,
        pss=pss,
    )


def measure(bench: Bench, quick: bool) -> Report:
    """Once: memory is no matter of chance."""
    size = (MEBIBYTES_QUICK if quick else MEBIBYTES) << 20
    content = os.urandom(size)
    files = {name: bench.folder / name for name in IMAGES}
    for path in files.values():
        path.write_bytes(content)
        # What is not on the disk yet could not be dropped.
        with path.open("rb") as file:
            os.fsync(file.fileno())
    program = bench.compile("mapped")
    with bench.engine("--sleep-millisecs", "0", images=files) as engine, ExitStack() as stack:
        assert engine.mount is not None
        paths = [engine.mount / IMAGES[i % len(IMAGES)] for i in range(PROCESSES)]
        bare = [stack.enter_context(bench.start(None, program, path)) for path in paths]
        for each in bare:
            each.ask("touch")
        before = look(engine, files, bare)
        for path in (*paths, *files.values()):
            drop(path)
        before_dropped = look(engine, files, bare)
        stack.pop_all().close()
        for path in paths:
            drop(path)
        wrapped = [stack.enter_context(bench.start(engine, program, path)) for path in paths]
        wait_for_agents(engine, PROCESSES)
        started = time.monotonic()
        for each in wrapped:
            each.ask("touch")
        while sum(int(each.ask("count")[1]) for each in wrapped) < PROCESSES * size // PAGE:
            if time.monotonic() > started + MERGE_SECONDS:
                raise RuntimeError(f"not merged after {MERGE_SECONDS:.0f} s: {status(engine)['merges']}")
            time.sleep(0.1)
        seconds = time.monotonic() - started
        merged = look(engine, files, wrapped)
        for path in (*paths, *files.values()):
            drop(path)
        after = look(engine, files, wrapped)
    moments = {"bare": before, "bare, dropped": before_dropped, "merged": merged, "merged, dropped": after}
    figures = [
        Figure.of(f"{what}: {part}", "MB", [getattr(memory, part) / 1e6])
        for what, memory in moments.items()
        for part in ("total", "mount", "beneath", "store", "pss")
    ]
    figures.append(Figure.of("read and merged in", "s", [seconds]))
    return Report(
        "mapped",
        f"{PROCESSES} processes, two equal images of {size >> 20} MiB",
        figures,
        {name: attrs.asdict(memory) for name, memory in moments.items()},
    )


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
