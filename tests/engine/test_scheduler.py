"""The scheduler's pacing, against a model of the engine and trio's mock clock: no real time passes."""

import itertools
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from udedup.engine.advisor import FixedPace, Pace, ScanTimePace, ScanTimeTarget
from udedup.engine.meanwhile import PROMPT_SECONDS
from udedup.engine.policies import POLICIES, Policy
from udedup.engine.scheduler import QUIET_SECONDS, TOGETHER_SECONDS, Scheduler, Step

PAGES = 100


@attrs.define
class Model:
    """Keeps a diary of (time, what, pages)."""

    hints: int = 0
    """Hinted pages that wait."""
    round_pages: int = 1000
    """Pages of a full round."""
    merges_per_round: int = 0
    scan_seconds: float = 0.0
    """Time one scan call takes."""
    cpu_per_page: float = 0.0
    """s."""
    hint_yield: float = 0.0
    """Part of the hinted pages that match."""
    scan_yield: float = 0.0
    """Likewise, of the linear scan's."""
    matched_hinted: int = 0
    matched_scanned: int = 0
    change_part: float = 0.0
    """Part of the linear scan's pages that are new or have changed."""
    changed: int = 0
    agents_joined: int = 1
    present: bool = True
    merged: int = 0
    visited: int = 0
    position: int = 0
    diary: list[tuple[float, str, int]] = attrs.field(factory=list)
    news: trio.Event = attrs.field(factory=trio.Event)

    def note(self, what: str, pages: int) -> None:
        self.visited += pages
        self.diary.append((trio.current_time(), what, pages))

    async def wait_for_agents(self) -> None:
        while not self.present:
            await self.news.wait()
        await trio.lowlevel.checkpoint()

    async def visit_hints(self, pages: int) -> int:
        await trio.lowlevel.checkpoint()
        taken = min(pages, self.hints)
        self.hints -= taken
        self.matched_hinted += round(taken * self.hint_yield)
        self.note("hints", taken)
        return taken

    async def scan(self, pages: int) -> Step:
        await trio.sleep(self.scan_seconds)
        taken = min(pages, self.round_pages - self.position)
        self.position += taken
        self.matched_scanned += round(taken * self.scan_yield)
        self.changed += round(taken * self.change_part)
        self.note("scan", taken)
        if self.position < self.round_pages:
            return Step(taken, 0)
        self.position = 0
        self.merged += self.merges_per_round
        return Step(taken, 1)

    async def wait_for_change(self, *, hints: bool, quiet_only: bool = False) -> None:
        if hints and self.hints and not quiet_only:
            await trio.lowlevel.checkpoint()
            return
        await self.news.wait()

    @property
    def cpu_seconds(self) -> float:
        return self.cpu_per_page * self.visited

    def pages(self, what: str) -> int:
        return sum(pages for _, kind, pages in self.diary if kind == what)

    def change(self) -> None:
        self.news.set()
        self.news = trio.Event()


async def run_for(seconds: float, model: Model, policy: Policy, sleep_millisecs: int, pace: Pace | None = None) -> None:
    with trio.move_on_after(seconds):
        await Scheduler(model, policy, pace or FixedPace(PAGES), sleep_millisecs=sleep_millisecs).run()


@pytest.mark.parametrize("policy", [Policy(0, 1), Policy(1, 1), Policy(3, 1), Policy(1, 0)])
@pytest.mark.parametrize("hints", [0, 250, 10**9])
async def test_load_is_the_same_whatever_the_policy(
    policy: Policy, hints: int, autojump_clock: trio.testing.MockClock
) -> None:
    """pages_to_scan per sleep_millisecs, hints and scan together (XLH); without hints, some spurts' pages come late."""
    model = Model(hints=hints, round_pages=10**9)
    await run_for(9.995, model, policy, 20)
    late = 500 * PAGES - model.visited
    assert 0 <= late <= QUIET_SECONDS / 0.02 * PAGES
    if hints == 10**9 and policy.hint_runs:
        assert late <= TOGETHER_SECONDS / 0.02 * PAGES


async def test_spurts_come_together_while_no_hints_do(autojump_clock: trio.testing.MockClock) -> None:
    """A wake-up costs more than the pages of a spurt."""
    model = Model(round_pages=10**9)
    await run_for(9.995, model, Policy(1, 1), 20)
    assert len([pages for _, what, pages in model.diary if what == "scan"]) <= 2 + 10 / QUIET_SECONDS


@pytest.mark.parametrize("policy", ["xlh", "eager"])
async def test_hints_are_served_within_a_spurt_or_two(
    policy: str, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model = Model(round_pages=10**9)
    nursery.start_soon(run_for, 100.0, model, POLICIES[policy](1, 1), 20)
    await trio.sleep(50.3)
    model.hints = 5
    hinted_at = trio.current_time()
    model.change()
    await trio.sleep(0.0401)
    assert model.hints == 0
    assert [pages for time, what, pages in model.diary if what == "hints" and time >= hinted_at][-1] == 5


async def test_the_end_of_a_round_is_the_end_of_a_spurt(autojump_clock: trio.testing.MockClock) -> None:
    """As in KSM, also where several spurts come together: 150 pages take two."""
    model = Model(round_pages=150)
    await run_for(9.995, model, POLICIES["linear"](1, 1), 20)
    assert model.visited == pytest.approx(500 / 2 * 150, rel=QUIET_SECONDS / 9)


@pytest.mark.parametrize(
    ("runs", "part"), [((1, 1), 1 / 2), ((3, 1), 3 / 4), ((1, 4), 1 / 5), ((0, 1), 0), ((1, 0), 1)]
)
async def test_ratio(runs: tuple[int, int], part: float, autojump_clock: trio.testing.MockClock) -> None:
    model = Model(hints=10**9, round_pages=10**9)
    await run_for(39.995, model, Policy(*runs), 10)
    assert model.pages("hints") == pytest.approx(part * model.visited, rel=0.02)


async def test_a_scan_that_finds_nothing_goes_on_at_a_quarter_of_the_rate(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model = Model(round_pages=25_000)
    nursery.start_soon(run_for, 10_000.0, model, POLICIES["xlh"](1, 1), 20)
    await trio.sleep(15)
    assert model.visited >= 14 / 0.02 * PAGES  # three rounds
    await trio.sleep(1000)
    visited = model.visited
    await trio.sleep(1000)
    assert model.visited - visited == pytest.approx(1000 / 0.02 * PAGES / 4, rel=0.02)


@pytest.mark.parametrize("sign", ["scan_yield", "change_part", "agents_joined"])
async def test_the_scan_is_quick_again_at_the_first_sign_of_something_new(
    sign: str, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model = Model(round_pages=25_000)
    nursery.start_soon(run_for, 10_000.0, model, POLICIES["xlh"](1, 1), 20)
    await trio.sleep(1000)
    if sign == "agents_joined":
        model.agents_joined += 1
        model.change()
        await trio.sleep(0.1)
    else:
        setattr(model, sign, 0.1)
        await trio.sleep(4.1)
    visited = model.visited
    await trio.sleep(12)
    assert model.visited - visited >= 11 / 0.02 * PAGES


async def test_hints_don_t_wait_for_a_scan_that_makes_long_pauses(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model = Model(round_pages=25_000)
    nursery.start_soon(run_for, 10_000.0, model, POLICIES["xlh"](1, 1), 20)
    await trio.sleep(1000.7)
    model.hints = 5
    model.change()
    await trio.sleep(0.0401)
    assert model.hints == 0


async def test_linear_is_never_slower_than_ksm(autojump_clock: trio.testing.MockClock) -> None:
    model = Model(round_pages=25_000)
    await run_for(1000, model, POLICIES["linear"](1, 1), 20)
    assert model.visited == pytest.approx(1000 / 0.02 * PAGES, rel=QUIET_SECONDS / 999)


@pytest.mark.parametrize(
    ("hint_yield", "scan_yield", "part"), [(0.4, 0.1, 15 / 16), (0.1, 0.4, 1 / 2), (0.0, 0.0, 1 / 2)]
)
async def test_hints_get_most_of_the_scan_s_spurts_while_they_match_more_often(
    hint_yield: float, scan_yield: float, part: float, autojump_clock: trio.testing.MockClock
) -> None:
    model = Model(hints=10**9, round_pages=10**9, hint_yield=hint_yield, scan_yield=scan_yield)
    await run_for(39.995, model, POLICIES["xlh"](1, 1), 20)
    assert model.pages("hints") == pytest.approx(part * model.visited, rel=0.02)
    assert model.visited == pytest.approx(2000 * PAGES, rel=TOGETHER_SECONDS / 39)


async def test_the_scan_has_its_spurts_back_when_it_finds_more(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model = Model(hints=10**9, round_pages=10**9, hint_yield=0.4, scan_yield=0.0)
    nursery.start_soon(run_for, 1000.0, model, POLICIES["xlh"](1, 1), 20)
    await trio.sleep(100)
    model.hint_yield, model.scan_yield = 0.1, 0.9
    await trio.sleep(200)
    model.diary.clear()
    await trio.sleep(50)
    assert model.pages("scan") == pytest.approx(50 / 0.02 * PAGES / 2, rel=0.02)


async def test_nothing_is_lent_to_hints_that_don_t_come(autojump_clock: trio.testing.MockClock) -> None:
    model = Model(hints=1000, round_pages=10**9, hint_yield=1.0)
    await run_for(39.995, model, POLICIES["xlh"](1, 1), 20)
    assert model.pages("hints") == 1000
    assert model.visited == pytest.approx(2000 * PAGES, rel=QUIET_SECONDS / 39)


async def test_leftovers_of_a_dry_hint_spurt_are_scanned(autojump_clock: trio.testing.MockClock) -> None:
    model = Model(hints=30, round_pages=10**9)
    await run_for(0.001, model, Policy(1, 0), 20)
    assert [(what, pages) for _, what, pages in model.diary] == [("hints", 30), ("scan", 70)]


async def test_linear_takes_no_hints(autojump_clock: trio.testing.MockClock) -> None:
    model = Model(hints=1000, scan_seconds=0.01)
    await run_for(1, model, POLICIES["linear"](1, 1), 20)
    assert model.hints == 1000
    assert not model.pages("hints")


async def test_nobody_there(autojump_clock: trio.testing.MockClock) -> None:
    model = Model(present=False)
    await run_for(100, model, Policy(1, 1), 0)
    assert model.diary == []


async def test_fruitless_rounds_rest_longer_and_longer(autojump_clock: trio.testing.MockClock) -> None:
    model = Model(scan_seconds=0.001)
    await run_for(60, model, Policy(0, 1), 0)
    starts = [time for time, _, _ in model.diary]
    rests = [later - earlier for earlier, later in itertools.pairwise(starts) if later - earlier > 0.01]
    assert rests[0] == pytest.approx(0.02, abs=0.002)
    assert all(later == pytest.approx(2 * earlier, rel=0.1) for earlier, later in itertools.pairwise(rests[:6]))
    assert rests[-1] == pytest.approx(1, abs=0.01)


async def test_slow_fruitless_rounds_take_a_quarter_of_the_time_at_most(
    autojump_clock: trio.testing.MockClock,
) -> None:
    model = Model(scan_seconds=0.4)  # 4 s a round
    await run_for(1000, model, Policy(0, 1), 0)
    late = [pages for time, _, pages in model.diary if time > 500]
    assert sum(late) / PAGES * 0.4 <= 0.27 * 500


async def test_fruitful_rounds_don_t_rest(autojump_clock: trio.testing.MockClock) -> None:
    model = Model(merges_per_round=1, scan_seconds=0.001)
    await run_for(1, model, Policy(0, 1), 0)
    assert model.pages("scan") >= 990 * PAGES


async def test_hints_are_served_at_once_while_the_scan_rests(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model = Model(scan_seconds=0.001)
    nursery.start_soon(run_for, 100.0, model, Policy(1, 1), 0)
    await trio.sleep(50.3)
    scanned = model.pages("scan")
    model.hints = 5
    hinted_at = trio.current_time()
    model.change()
    await trio.sleep(0.001)
    assert (hinted_at, "hints", 5) in model.diary
    assert model.pages("scan") == scanned


@pytest.mark.parametrize(
    ("policy", "sleep"), [(Policy(1, 1), 0), (POLICIES["xlh"](1, 1), 20), (POLICIES["eager"](1, 1), 20)]
)
async def test_hints_don_t_wait_for_who_keeps_the_scan_waiting(
    policy: Policy, sleep: int, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A step that takes long, because of a slow agent, is in the middle when they come."""
    model = Model(round_pages=10**9, scan_seconds=30.0)
    nursery.start_soon(run_for, 100.0, model, policy, sleep)
    await trio.sleep(10)
    for lap in range(1, 6):
        model.hints += 5
        model.change()
        await trio.sleep(PROMPT_SECONDS)
        assert model.pages("hints") == 5 * lap
    assert not model.pages("scan")


async def test_hints_served_beside_the_scan_take_no_more_than_their_share(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model = Model(round_pages=10**9, scan_seconds=0.5)
    nursery.start_soon(run_for, 0.4, model, Policy(1, 1), 20)
    await trio.sleep(0.1)
    model.hints = 10**9
    model.change()
    await trio.sleep(0.1)
    assert model.pages("hints") == PAGES


@pytest.mark.parametrize("policy", ["xlh", "eager"])
async def test_load_is_the_same_with_hints_beside_a_slow_scan(
    policy: str, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """What hints took ahead the scan is short of afterwards."""
    model = Model(round_pages=10**9, scan_seconds=0.01)
    nursery.start_soon(run_for, 10.005, model, POLICIES[policy](1, 1), 20)
    for _ in range(2000):
        model.hints += 5
        model.change()
        await trio.sleep(0.005)
    assert model.pages("hints") == pytest.approx(10_000, abs=500)
    assert model.visited <= 501 * PAGES


async def test_eager_serves_a_burst_of_hints_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Half a minute's allowance, and the spurt's own, is 1501 spurts' pages."""
    model = Model(hints=10**9, round_pages=10**9)
    await run_for(0.001, model, POLICIES["eager"](1, 1), 20)
    assert [(what, pages) for _, what, pages in model.diary] == [("hints", 1501 * PAGES)]


async def test_eager_serves_hints_that_keep_coming_without_delay(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Within two spurts: every second one is the scan's."""
    model = Model(round_pages=10**9)
    nursery.start_soon(run_for, 100.0, model, POLICIES["eager"](1, 1), 20)
    await trio.sleep(10)
    for lap in range(1, 100):
        model.hints = 1
        model.change()
        await trio.sleep(0.041)
        assert model.pages("hints") == lap


async def test_eager_gives_back_what_it_took_ahead(autojump_clock: trio.testing.MockClock) -> None:
    """Over time the load is the same as any policy's, to within what may be ahead."""
    model = Model(hints=30 * PAGES, round_pages=10**9)
    await run_for(9.995, model, POLICIES["eager"](1, 1), 20)
    assert model.pages("hints") == 30 * PAGES
    assert (500 - QUIET_SECONDS / 0.02) * PAGES <= model.visited <= 500 * PAGES


async def test_eager_never_stops_the_scan(autojump_clock: trio.testing.MockClock) -> None:
    """With more hints than it can serve, three quarters of the scan's spurts are left."""
    model = Model(hints=10**9, round_pages=10**9)
    await run_for(999.995, model, POLICIES["eager"](1, 1), 20)
    assert model.visited <= (50_000 + 1500) * PAGES
    assert model.pages("scan") == pytest.approx(model.visited / 2 * 3 / 4, rel=0.03)


def advised(**target: float) -> ScanTimePace:
    settings: dict[str, Any] = {"min_pages_to_scan": 1, "max_pages_to_scan": 10**9, **target}
    return ScanTimePace(ScanTimeTarget(**settings), pages_to_scan=PAGES, sleep_seconds=0.02)


@pytest.mark.parametrize("round_pages", [2_000, 100_000, 300_000])
async def test_advisor_reaches_the_scan_time(round_pages: int, autojump_clock: trio.testing.MockClock) -> None:
    """Whatever there is to scan: 10 s, to within the last spurt and the smoothing."""
    model, pace = Model(round_pages=round_pages), advised(seconds=10.0, max_cpu=100.0)
    await run_for(600, model, Policy(0, 1), 20, pace)
    assert pace.pages_to_scan * 10 / 0.02 == pytest.approx(round_pages, rel=0.2)


async def test_advisor_follows_memory_that_grows(autojump_clock: trio.testing.MockClock) -> None:
    model, pace = Model(round_pages=50_000), advised(seconds=10.0)
    await run_for(300, model, Policy(1, 1), 20, pace)
    before = pace.pages_to_scan
    model.round_pages *= 4
    await run_for(300, model, Policy(1, 1), 20, pace)
    assert pace.pages_to_scan == pytest.approx(4 * before, rel=0.1)


async def test_advisor_keeps_within_its_share_of_the_processor(autojump_clock: trio.testing.MockClock) -> None:
    """At 10 µs a page, 20% of a processor are 500 pages in 25 ms."""
    model, pace = Model(round_pages=10**5, cpu_per_page=1e-5), advised(seconds=1.0, max_cpu=20.0)
    await run_for(100, model, Policy(0, 1), 20, pace)
    assert pace.pages_to_scan == pytest.approx(500, rel=0.02)


async def test_advisor_counts_hinted_pages_as_work(autojump_clock: trio.testing.MockClock) -> None:
    model, pace = Model(hints=10**9, round_pages=10**5, cpu_per_page=1e-5), advised(seconds=1.0, max_cpu=20.0)
    await run_for(100, model, Policy(1, 1), 20, pace)
    assert pace.pages_to_scan == pytest.approx(500, rel=0.02)


async def test_advisor_stays_in_its_bounds(autojump_clock: trio.testing.MockClock) -> None:
    least, most = advised(seconds=10**6, min_pages_to_scan=70), advised(seconds=0.001, max_pages_to_scan=300)
    for pace, pages in ((least, 70), (most, 300)):
        await run_for(100, Model(round_pages=5000), Policy(0, 1), 20, pace)
        assert pace.pages_to_scan == pages


async def test_waiting_for_agents_is_not_scan_time(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    model, pace = Model(present=False, round_pages=PAGES), advised(seconds=0.02)
    nursery.start_soon(run_for, 10_000.021, model, Policy(0, 1), 20, pace)
    await trio.sleep(10_000)
    model.present = True
    model.change()
    await trio.sleep(1)
    assert pace.pages_to_scan == PAGES


async def test_another_pace_counts_at_once(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """Also in the middle of a long sleep, and from no limit to one."""
    model = Model(round_pages=10**9)
    scheduler = Scheduler(model, Policy(1, 1), FixedPace(PAGES), sleep_millisecs=3_600_000)
    nursery.start_soon(scheduler.run)
    await trio.sleep(10)
    assert model.visited == PAGES
    scheduler.change(FixedPace(7), sleep_millisecs=1000)
    await trio.sleep(10.5)
    assert PAGES + 9 * 7 <= model.visited <= PAGES + 11 * 7
    nursery.cancel_scope.cancel()


async def test_a_rest_ends_with_another_pace(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    model = Model(round_pages=PAGES)
    scheduler = Scheduler(model, Policy(0, 1, rests=False), FixedPace(PAGES), sleep_millisecs=0)
    nursery.start_soon(scheduler.run)
    await trio.sleep(30.1)
    before = model.visited
    scheduler.change(FixedPace(PAGES), sleep_millisecs=20)
    await trio.sleep(3.1)
    assert model.visited - before >= 50 * PAGES
    nursery.cancel_scope.cancel()
