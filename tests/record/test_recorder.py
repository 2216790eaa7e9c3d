"""The recorder writes what it saw, however its block ends."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from record.conftest import Holder
from support.engine import Engine

from udedup.record.kernel import process_memory
from udedup.record.recorder import Engine as RecordedEngine
from udedup.record.recorder import recording
from udedup.record.recording import Recording

PAGES = 1000
PATIENCE = 20.0

pytestmark = pytest.mark.require("root")


async def test_lost_by_nobody(hold: Callable[[], Holder], tmp_path: Path) -> None:
    """Marks and rows are kept when the block fails."""
    holder = hold()
    file = tmp_path / "run.parquet"

    async def fail() -> None:
        async with recording(file, lambda: [holder.pid], settings={"a": "b"}, interval=0.05) as recorder:
            while len(recorder.rows) < 3:
                await trio.sleep(0.01)
            recorder.mark("here")
            recorder.mark("here")
            raise RuntimeError("as tests do")

    with trio.fail_after(PATIENCE), pytest.RaisesGroup(RuntimeError):
        await fail()
    kept = Recording.read(file)
    assert len(kept.rows) >= 3
    assert kept.about.settings == {"a": "b"}
    assert 0 < kept.about.marks["here"] <= kept.rows[-1].seconds + 1
    beats = [round(row.seconds / 0.05) for row in kept.rows]
    assert len(set(beats)) == len(beats)
    assert 0 < kept.rows[0].pss < 2 * process_memory(holder.pid).pss


@pytest.mark.require("userfaultfd-move")
async def test_an_engine_at_work(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    """Counters of the engine, and the sampler's own view of what it merged."""
    engine = engine_factory("--sleep-millisecs", "1")
    program = (
        f"import random, sys; held = random.Random(1).randbytes({PAGES} << 12); print(1, flush=True); sys.stdin.read()"
    )
    processes = [engine.wrap("/usr/bin/python3", "-c", program, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    file = tmp_path / "run.parquet"
    recorded = RecordedEngine(engine.socket, engine.pid)
    async with recording(file, lambda: [each.pid for each in processes], engine=recorded, interval=0.1) as recorder:
        with trio.fail_after(PATIENCE):
            while not recorder.rows or recorder.rows[-1].sharing < PAGES * 0.9:
                await trio.sleep(0.05)
    for each in processes:
        each.communicate()
    totals = Recording.read(file).totals()
    assert totals.merges >= 2 * totals.sharing * 0.9
    assert totals.visits > PAGES
    assert totals.cpu_agents > 0
    assert totals.cpu_engine > 0
    assert totals.cpu_ksmd == 0
