"""Figures per second out of two answers."""

from support.statuses import agent, image, status

from udedup.engine import accounting
from udedup.top.rates import AgentRates, between


def test_rates_are_over_the_engines_own_time() -> None:
    before = status(
        uptime_seconds=10.0,
        pages_scanned=1000,
        hints=accounting.HintStatus(place=5, content=5, dropped=1, visited=0, merged=0, waiting=9),
        cpu_seconds=accounting.CpuStatus(engine=1.0, agents=2.0),
        agents=[agent(1, break_pages=10, cpu_seconds=1.0)],
        images=[image("a", blocks_read=100)],
    )
    after = status(
        uptime_seconds=14.0,
        pages_scanned=5000,
        hints=accounting.HintStatus(place=25, content=25, dropped=5, visited=0, merged=0, waiting=0),
        cpu_seconds=accounting.CpuStatus(engine=1.2, agents=2.0),
        agents=[agent(1, break_pages=30, cpu_seconds=1.1)],
        images=[image("a", blocks_read=500)],
    )
    rates = between(before, after)
    assert rates is not None
    assert (rates.scanned, rates.hints, rates.dropped, rates.merged) == (1000, 10, 1, 0)
    assert (round(rates.engine_cpu, 9), rates.agents_cpu) == (5, 0)
    assert (rates.agents[1].breaks, round(rates.agents[1].cpu, 9)) == (5, 2.5)
    assert rates.images == {"a": 100}


def test_another_engine_and_no_time() -> None:
    assert between(status(pid=1), status(pid=2, uptime_seconds=200.0)) is None
    assert between(status(uptime_seconds=50.0), status(uptime_seconds=3.0)) is None
    assert between(status(), status()) is None


def test_who_comes_has_no_rates_yet() -> None:
    before = status(agents=[agent(1), agent(2, cpu_seconds=5.0)], images=[image("b", blocks_read=9)])
    after = status(
        uptime_seconds=102.0,
        # 2 is another process by now, or has joined anew.
        agents=[agent(1), agent(2, cpu_seconds=0.1), agent(3)],
        images=[image("a"), image("b", blocks_read=1)],
    )
    rates = between(before, after)
    assert rates is not None
    assert rates.agents == {1: AgentRates(0, 0)}
    assert rates.images == {}


def test_sums_over_those_who_are_there_never_run_backwards() -> None:
    before = status(breaks=accounting.BreakStatus(pages=100, events=1))
    rates = between(before, status(uptime_seconds=101.0))
    assert rates is not None
    assert rates.breaks == 0
