#!/usr/bin/env python3
"""What does a block cost in memory that several processes read, with read(2), as guests do?

A few processes read the same image through the mount, whole, into private memory of their own: first bare, then
wrapped; and once more it is looked when the engine has had the time to let go of what the store has. Counted by the
kernel: pages of the image in the page cache of the mount and of the file beneath it (cachestat), pages of the store,
and "own": by how much the processes' Pss without the store, and without the area that an agent shares with the engine
(tests/bench/memory.py has that), grew through reading. The total has every page once.
"copies" is the total by the image's size: 1 means that a block costs one page, however many read it. What is above
that are the agents' tables, which are in "own".
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
from mapped import cached, drop
from measuring import PAGE, Bench, Engine, Figure, Program, Report, main, smaps, status, wait_for_agents

PROCESSES: Final = 4
MEBIBYTES: Final = 64
MEBIBYTES_QUICK: Final = 16
IMAGE: Final = "one.img"
DROP_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 3.0
"""Older must a file's last change be before its blocks are served from the store."""


@attrs.frozen
class Memory:
    """What is held, in bytes."""

    mount: int
    """In the page cache, as pages of the image in the mount."""

    beneath: int
    """In the page cache, as pages of the image file."""

    store: int
    own: int
    """The processes' Pss without the store's, less what it was before they read."""

    @property
    def total(self) -> int:
        """Every page once."""
        return self.mount + self.beneath + self.store + self.own


@attrs.frozen
class Readers:
    """Processes that have read the image."""

    programs: list[Program]
    before: int
    """See :func:`own_pss`, before they read."""


def own_pss(programs: Sequence[Program]) -> int:
    """What processes have besides the store, the image and what they share with the engine, in bytes."""
    return sum(
        sizes["Pss"]
        for program in programs
        for header, sizes in smaps(program.pid)
        if "/memfd:udedup-" not in header and IMAGE not in header
    )


def look(engine: Engine, path: Path, readers: Readers) -> Memory:
    """What is held now."""
    assert engine.mount is not None
    return Memory(
        mount=cached(engine.mount / IMAGE),
        beneath=cached(path),
        store=status(engine)["pages_shared"] * PAGE,
        own=own_pss(readers.programs) - readers.before,
    )


def read_all(bench: Bench, engine: Engine, stack: ExitStack, blocks: int, *, wrapped: bool) -> Readers:
    """Starts the processes and has each read the image; they live as long as ``stack``."""
    assert engine.mount is not None
    program = bench.compile("reader")
    wrap = engine if wrapped else None
    readers = [stack.enter_context(bench.start(wrap, program, engine.mount / IMAGE, blocks)) for _ in range(PROCESSES)]
    if wrapped:
        wait_for_agents(engine, PROCESSES)
    before = own_pss(readers)
    for reader in readers:
        reader.ask(f"read 0 {blocks}")
    return Readers(readers, before)


def measure(bench: Bench, quick: bool) -> Report:
    """Once: memory is no matter of chance."""
    size = (MEBIBYTES_QUICK if quick else MEBIBYTES) << 20
    blocks = size // PAGE
    path = bench.folder / IMAGE
    path.write_bytes(os.urandom(size))
    # What is not on the disk yet could not be dropped.
    with path.open("rb") as file:
        os.fsync(file.fileno())
    drop(path)
    time.sleep(SETTLE_SECONDS)
    with bench.engine("--sleep-millisecs", "0", images={IMAGE: path}) as engine:
        assert engine.mount is not None
        with ExitStack() as stack:
            bare = look(engine, path, read_all(bench, engine, stack, blocks, wrapped=False))
        drop(engine.mount / IMAGE)
        with ExitStack() as stack:
            readers = read_all(bench, engine, stack, blocks, wrapped=True)
            for reader in readers.programs:
                reader.ask(f"wait {blocks}")
            merged = look(engine, path, readers)
            deadline = time.monotonic() + DROP_SECONDS
            while cached(engine.mount / IMAGE) and time.monotonic() < deadline:
                time.sleep(0.5)
            left = look(engine, path, readers)
            before = status(engine)["blocks"]["served"]
            newcomer = stack.enter_context(bench.start(engine, bench.compile("reader"), engine.mount / IMAGE, blocks))
            wait_for_agents(engine, PROCESSES + 1)
            newcomer.ask(f"read 0 {blocks}")
            served = status(engine)["blocks"]["served"] - before
    moments = {"bare": bare, "merged": merged, "merged, later": left}
    figures = [
        Figure.of(f"{what}: {part}", "MB", [getattr(memory, part) / 1e6])
        for what, memory in moments.items()
        for part in ("total", "mount", "beneath", "store", "own")
    ]
    figures.append(Figure.of("copies, bare", "", [bare.total / size]))
    figures.append(Figure.of("copies, merged, later", "", [left.total / size]))
    figures.append(Figure.of("part that the next reader gets from the store", "%", [100 * served / blocks]))
    return Report(
        "onecopy",
        f"{PROCESSES} processes read an image of {size >> 20} MiB",
        figures,
        {name: attrs.asdict(memory) for name, memory in moments.items()},
    )


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
