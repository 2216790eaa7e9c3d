"""Takes a sample every second and writes them all to a file at the end."""

import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import msgspec
import trio

from udedup.engine.control import request
from udedup.record.kernel import ksm_counter, ksmd_cpu, process_cpu, process_memory
from udedup.record.recording import About, Recording, Row
from udedup.record.sampler import Sampler

PSS_EVERY = 5
"""Samples; smaps_rollup walks all pages of a process."""


@attrs.frozen
class Engine:
    """The engine that merges."""

    socket: Path
    """Where it listens."""

    pid: int
    """Its process."""


class Recorder:
    """Made by :func:`recording`."""

    def __init__(
        self, pids: Callable[[], Sequence[int]], engine: Engine | None, *, ksm: bool, images: Sequence[Path]
    ) -> None:
        self.rows: list[Row] = []
        """One a sample so far."""
        self.marks: dict[str, float] = {}
        """Events, s since the beginning."""
        self._pids = pids
        self._engine = engine
        self._ksm = ksm
        self._sampler = Sampler()
        for image in images:
            self._sampler.know(image)
        self._pss = 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the recording began."""
        return time.monotonic() - self._began

    def mark(self, text: str) -> None:
        """Notes that something happened now; the first time counts."""
        self.marks.setdefault(text, self.seconds)

    def recording(self, settings: Mapping[str, str], interval: float) -> Recording:
        """All of it so far."""
        about = About(settings=dict(settings), marks=self.marks, interval=interval)
        return Recording(self.rows, about, self._sampler.latencies())

    async def run(self, interval: float) -> None:
        """Takes samples until cancelled."""
        for number in itertools.count():
            # On the beat, however long a sample takes; one that takes longer than a beat costs that beat.
            beat = math.floor(self.seconds / interval) + 1
            await trio.sleep(beat * interval - self.seconds)
            await trio.to_thread.run_sync(self.take, number % PSS_EVERY == 0)

    def take(self, with_pss: bool) -> None:
        """Takes one sample."""
        pids = list(self._pids())
        # Before the sample: a page merged meanwhile is then one that was merged a little late, not too early.
        seconds = self.seconds
        sample = self._sampler.take(pids, seconds)
        if with_pss:
            everyone = [*pids, self._engine.pid] if self._engine else pids
            self._pss = sum(map(_pss, everyone))
        counters = self._engine_counters(self._engine) if self._engine else {}
        if self._ksm:
            counters = _ksm_counters()
        self.rows.append(
            Row(
                **msgspec.structs.asdict(sample),
                **counters,
                seconds=seconds,
                cpu_recorder=time.process_time(),
                pss=self._pss,
            )
        )

    def _engine_counters(self, engine: Engine) -> dict[str, Any]:
        status = request(engine.socket, {"op": "status", "kernel": False})
        hints = {
            f"hints_{name}": status["hints"][name] for name in ("place", "content", "dropped", "visited", "merged")
        }
        return hints | {
            "visits": status["pages_scanned"],
            "full_scans": status["full_scans"],
            "breaks": status["breaks"]["pages"],
            "cpu_engine": process_cpu(engine.pid),
            "cpu_agents": status["cpu_seconds"]["agents"],
        }


def _pss(pid: int) -> int:
    try:
        return process_memory(pid).pss
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has ended meanwhile


def _ksm_counters() -> dict[str, Any]:
    return {
        "visits": ksm_counter("pages_scanned"),
        "full_scans": ksm_counter("full_scans"),
        "cpu_ksmd": ksmd_cpu(),
    }


@asynccontextmanager
async def recording(
    file: Path,
    pids: Callable[[], Sequence[int]],
    *,
    engine: Engine | None = None,
    ksm: bool = False,
    images: Sequence[Path] = (),
    settings: Mapping[str, str] | None = None,
    interval: float = 1.0,
) -> AsyncIterator[Recorder]:
    """Records the processes that ``pids`` names, from now to the end of the block, into ``file``.

    ``engine``, ``ksm``: who merges. ``images``: raw disk images whose blocks are to be counted apart. ``settings``:
    kept in the file. ``interval``: from sample to sample, s. Raises UdedupError without root.
    """
    recorder = await trio.to_thread.run_sync(lambda: Recorder(pids, engine, ksm=ksm, images=images))
    try:
        # Counters count from here, whatever the block does first.
        await trio.to_thread.run_sync(recorder.take, True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recorder.run, interval)
            yield recorder
            nursery.cancel_scope.cancel()
    finally:
        recorder.recording(settings or {}, interval).write(file)
