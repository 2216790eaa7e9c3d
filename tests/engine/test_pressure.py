"""Memory pressure: when which level is reached and left, what is given back, and that the kernel's own word arrives."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from engine.conftest import Start
from engine.fake_agent import PAGE, FakeAgent, page
from support.cgroup import hogs, memory_group, no_pressure, thrash_file

from udedup.engine import pressure as pressure_module
from udedup.engine.advisor import FixedPace
from udedup.engine.headroom import of_groups, of_machine, own_group, own_memory_group
from udedup.engine.pressure import CALM_SECONDS, PLENTY_PART, Level, Levels, PressureState, PressureWatch, Stall
from udedup.engine.psi import PressureFiles, Totals, parse
from udedup.engine.relief import BOOST, EagerPace

TEXT = "some avg10=0.00 avg60=0.00 avg300=0.00 total={some}\n" + "full avg10=0.00 avg60=0.00 avg300=0.00 total={full}\n"
BASE = 1 << 32


def write(path: Path, *, some: float, full: float) -> None:
    path.write_text(TEXT.format(some=int(some * 1e6), full=int(full * 1e6)))


@pytest.mark.parametrize(
    ("stall", "level"),
    [
        (Stall(0.04, 0.0), Level.NONE),
        (Stall(0.05, 0.0), Level.SOME),
        (Stall(0.39, 0.04), Level.SOME),
        (Stall(0.4, 0.0), Level.FULL),
        (Stall(0.1, 0.05), Level.FULL),
    ],
)
def test_levels_are_reached_at_once(stall: Stall, level: Level) -> None:
    assert Levels().judge(stall, 0) == level


def test_levels_are_left_one_at_a_time_and_only_after_a_while_well_below() -> None:
    levels = Levels()
    levels.judge(Stall(0.5, 0.2), 0)
    assert levels.judge(Stall(0.21, 0.0), 60) == Level.FULL  # below, but not well
    assert levels.judge(Stall(0.0, 0.0), 61) == Level.FULL
    assert levels.judge(Stall(0.0, 0.0), 61 + CALM_SECONDS - 1) == Level.FULL
    assert levels.judge(Stall(0.0, 0.0), 61 + CALM_SECONDS) == Level.SOME
    assert levels.judge(Stall(0.03, 0.0), 62 + CALM_SECONDS) == Level.SOME  # starts anew
    assert levels.judge(Stall(0.0, 0.0), 63 + CALM_SECONDS) == Level.SOME
    assert levels.judge(Stall(0.0, 0.0), 63 + 2 * CALM_SECONDS) == Level.NONE


class Fake:
    """Pressure that a test makes up; nobody is told of it."""

    def __init__(self) -> None:
        self.totals = [Totals(0.0, 0.0)]

    def read(self) -> list[Totals]:
        return list(self.totals)

    async def wait(self) -> bool:
        await trio.sleep(2)
        return False


class Noted:
    """What it was asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[Level, Level]] = []

    def ease(self, level: Level, before: Level) -> None:
        self.calls.append((level, before))


async def test_it_is_told_of_each_change_and_comes_back_to_normal(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    fake, noted, state = Fake(), Noted(), PressureState()
    nursery.start_soon(PressureWatch(fake, noted, state, part_left=lambda: 0.0).run)
    await trio.sleep(3)
    fake.totals = [Totals(1.9, 0.0)]
    await trio.sleep(1.5)
    assert (state.level, state.times[Level.SOME], state.times[Level.FULL]) == (Level.FULL, 1, 1)
    await trio.sleep(3 * CALM_SECONDS)
    assert state.level == Level.NONE
    changes = [call for call in noted.calls if call[0] != call[1]]
    assert changes == [(Level.FULL, Level.NONE), (Level.SOME, Level.FULL), (Level.NONE, Level.SOME)]


async def test_what_is_gone_meanwhile_is_no_stall(autojump_clock: object, nursery: trio.Nursery) -> None:
    fake, state = Fake(), PressureState()
    fake.totals = [Totals(0.0, 0.0), Totals(500.0, 400.0)]
    nursery.start_soon(PressureWatch(fake, Noted(), state, part_left=lambda: 0.0).run)
    await trio.sleep(3)
    fake.totals = fake.totals[:1]
    await trio.sleep(3)
    assert state.level == Level.NONE


async def test_who_waits_where_there_is_plenty_is_not_short_of_memory(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    fake, state, left = Fake(), PressureState(), [PLENTY_PART]
    nursery.start_soon(PressureWatch(fake, Noted(), state, part_left=lambda: left[0]).run)
    await trio.sleep(3)
    fake.totals = [Totals(1.9, 1.0)]
    await trio.sleep(1.5)
    assert (state.level, state.stall) == (Level.NONE, Stall(0.0, 0.0))
    left[0] -= 0.01
    fake.totals = [Totals(3.8, 2.0)]
    await trio.sleep(2)
    assert state.level == Level.FULL


def test_the_scan_is_faster_within_what_the_cpu_allows() -> None:
    state = PressureState()
    pace = EagerPace(FixedPace(1000), state, sleep_seconds=0.02, max_cpu=70)
    assert pace.pages_to_scan == 1000
    state.level = Level.SOME
    assert pace.pages_to_scan == BOOST * 1000
    pace.end_round(seconds=1, visited=1000, cpu_seconds=1000 * 30e-6)
    assert 1500 < pace.pages_to_scan < 1600  # 0.7 * 20 ms / 0.3 / 30 µs
    pace.end_round(seconds=1, visited=1000, cpu_seconds=1)
    assert pace.pages_to_scan == 1000  # never fewer than asked for
    unlimited = EagerPace(FixedPace(1000), state, sleep_seconds=0.02, max_cpu=100)
    assert unlimited.pages_to_scan == BOOST * 1000


def test_the_kernels_file_is_read() -> None:
    assert parse(TEXT.format(some=2_500_000, full=1)) == Totals(2.5, 1e-6)


MOUNTS = """\
20 1 8:1 / / rw - ext4 /dev/x rw
30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw
31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
32 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
"""


@pytest.mark.parametrize(
    ("groups", "found", "found_1"),
    [
        ("0::/\n", None, None),
        ("0::/../other\n", None, None),
        ("3:cpu,memory:/a\n0::/\n", None, Path("/sys/fs/cgroup/memory/a")),
        ("3:memory:/\n0::/system/x\n", Path("/sys/fs/cgroup/system/x"), None),
    ],
)
def test_the_engines_own_group(groups: str, found: Path | None, found_1: Path | None) -> None:
    assert own_group(groups, MOUNTS) == found
    assert own_memory_group(groups, MOUNTS) == found_1


def make_group(directory: Path, **files: int | str) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"memory.{name}").write_text(f"{content}\n")


def test_the_part_of_memory_that_can_be_had(tmp_path: Path) -> None:
    """In the machine and in each group from the own one upwards, as far as they have limits."""
    assert of_machine("MemTotal: 2000 kB\nMemFree: 100 kB\nMemAvailable: 500 kB\n") == 0.25
    stat = "anon 500\nfile 300\nshmem 100\nslab_reclaimable 50"
    make_group(tmp_path / "top", max="max", high="max", current=900, stat=stat)
    make_group(tmp_path / "top/middle", max=2000, high=1000, current=900, stat=stat)
    make_group(
        tmp_path / "top/middle/own", max=1000, high="max", current=1100, stat="file 10\nshmem 10\nslab_reclaimable 0"
    )
    assert list(of_groups(tmp_path / "top/middle/own", 2)) == [0.0, 0.35, 1.0]


def test_the_part_of_memory_that_can_be_had_in_groups_of_version_1(tmp_path: Path) -> None:
    stat = "cache 1\ntotal_inactive_file 100\ntotal_active_file 50"
    make_group(tmp_path / "top", limit_in_bytes=2**63 - 4096, usage_in_bytes=2**31, stat=stat)
    make_group(tmp_path / "top/own", limit_in_bytes=1000, usage_in_bytes=900, stat=stat)
    assert list(of_groups(tmp_path / "top/own", 1)) == [0.25, pytest.approx(1.0)]


def test_a_plain_file_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    write(path, some=1, full=0)
    before = path.read_bytes()
    with PressureFiles([path], period=1) as pressure:
        assert pressure.read() == [Totals(1.0, 0.0)]
    assert path.read_bytes() == before


async def until_level(engine: object, level: str) -> None:
    async def reached() -> bool:
        return bool((await engine.status())["pressure"]["level"] == level)  # type: ignore[attr-defined]

    await engine.until(reached, level)  # type: ignore[attr-defined]


async def test_an_engine_drops_what_it_can_make_anew_and_goes_on_sharing(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    write(path, some=0, full=0)
    engine = await start(pressure_files=(path,), part_left=lambda: 0.0)
    alone = FakeAgent(engine.path, {BASE + i * PAGE: page(1000 + i) for i in range(400)})
    await engine.join(alone)

    async def candidates(least: int) -> bool:
        return bool((await engine.status())["index"]["candidates"] >= least)

    await engine.until(lambda: candidates(400), "candidates")
    bytes_before = (await engine.status())["index"]["bytes"]
    write(path, some=100, full=100)
    await until_level(engine, "full")
    status = await engine.status()
    assert status["pressure"]["times_full"] == 1
    assert status["index"]["bytes"] <= bytes_before
    # Two that have the same are merged all the same.
    twin = FakeAgent(engine.path, {2 * BASE + i * PAGE: page(1000 + i) for i in range(400)})
    await engine.join(twin)

    async def sharing() -> bool:
        return bool((await engine.status())["pages_sharing"] == 400)

    await engine.until(sharing, "shared")
    contents: Sequence[bytes] = [alone.read(BASE + i * PAGE) for i in range(400)]
    assert contents == [page(1000 + i) for i in range(400)]


async def test_it_can_be_off(start: Start) -> None:
    engine = await start(pressure_files=())
    assert (await engine.status())["pressure"]["level"] == "off"


THRASH_BYTES = 96 << 20
HOGS = 3
LEFT = 0.08
"""Part of the group's memory that the kernel has to make room in."""

ALWAYS_SECONDS = 6.0
"""If the kernel says that all have waited for memory in a good part of so many seconds, an engine must have noticed."""


async def test_under_real_pressure_it_is_eager_then_small_and_comes_back(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    """In a control group with a limit, processes read a file that it has no room for: the kernel makes them wait."""
    if (reason := no_pressure()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(pressure_module, "CALM_SECONDS", 0.5)
    file = await trio.to_thread.run_sync(thrash_file, tmp_path / "thrash", THRASH_BYTES)
    with memory_group(f"pressure-{os.getpid()}") as group:
        engine = await start(
            pressure_files=(group.pressure,),
            part_left=lambda: min(of_groups(group.memory, group.controller.version)),
            sleep_millisecs=20,
            pages_to_scan=100,
        )
        agent = FakeAgent(engine.path, {BASE + i * PAGE: page(1000 + i) for i in range(400)})
        await engine.join(agent)

        async def candidates() -> bool:
            return bool((await engine.status())["index"]["candidates"] == 400)

        await engine.until(candidates, "candidates")
        assert (await engine.status())["pages_to_scan"] == 100
        with hogs(group, file, HOGS, left=LEFT):
            before = parse(group.pressure.read_text())
            with trio.move_on_after(ALWAYS_SECONDS):
                await until_level(engine, "full")
            waited = parse(group.pressure.read_text()).full - before.full
            status = await engine.status()
            if status["pressure"]["level"] != "full" and waited < pressure_module.FULL_PART * ALWAYS_SECONDS * 2:
                pytest.skip(f"the kernel made nobody wait for memory: {waited:.2f} s in {ALWAYS_SECONDS:.0f}")
            assert status["pressure"]["level"] == "full", waited
            assert status["pressure"]["times_some"] >= status["pressure"]["times_full"] == 1
            # As many more as the processor allows, which others may be using, too.
            assert 100 < status["pages_to_scan"] <= BOOST * 100
            assert any("dropped 400 candidates" in line for line in warnings())
        await until_level(engine, "none")
        assert (await engine.status())["pages_to_scan"] == 100
        await engine.until(candidates, "candidates again")
