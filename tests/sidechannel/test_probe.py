"""Across trust domains the time of a write says nothing about who has what, nor does it inside, with quiet breaks.

``tests/sidechannel/run`` prints the figures.
"""

from collections.abc import Iterator

import pytest
from bench.measuring import Bench, Engine, workplace
from sidechannel.scenes import ACROSS, INSIDE, OPTIONS, QUIET, Scene, Times, time_hints, time_writes

TRIALS = 10_000
QUIET_TRIALS = 4000
"""The probe sees tens of nanoseconds, by which two writes to private pages don't differ, but two faults may."""

HINTS = 120
CHANCE = 1e-6
"""What is less likely than this is no chance."""

pytestmark = pytest.mark.require("userfaultfd-move", "root", "gcc")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with workplace() as bench:
        yield bench


@pytest.fixture
def engine(bench: Bench) -> Iterator[Engine]:
    with bench.engine(*OPTIONS) as engine:
        yield engine


def shown(times: Times) -> str:
    """For people."""
    return f"{times.comparison} of {len(times.right)} right and {len(times.wrong)} wrong guesses"


def test_the_probe_sees_who_shares(bench: Bench, engine: Engine) -> None:
    """Or its silence elsewhere would say nothing."""
    times = time_writes(bench, engine, INSIDE, 2000)
    assert times.comparison.auc > 0.95, shown(times)
    assert times.comparison.p < CHANCE


@pytest.mark.parametrize("scene", ACROSS, ids=lambda scene: scene.name)
def test_writes_tell_nothing_across_domains(bench: Bench, engine: Engine, scene: Scene) -> None:
    times = time_writes(bench, engine, scene, TRIALS)
    assert len(times.right) + len(times.wrong) == TRIALS
    assert times.comparison.p > CHANCE, shown(times)


def test_hints_tell_nothing_across_domains(bench: Bench, engine: Engine) -> None:
    """How long it takes until hinted pages are merged, in one's own domain."""
    times = time_hints(bench, engine, ACROSS[0], HINTS)
    assert times.comparison.p > CHANCE, shown(times)


@pytest.mark.parametrize(("scene", "options", "odds"), [(QUIET, (), 16), (INSIDE, ("--quiet-breaks",), 2)])
def test_quiet_breaks_tell_nothing_inside(bench: Bench, scene: Scene, options: tuple[str, ...], odds: int) -> None:
    """Whether a program asks for them or the engine does; whether right guesses lie alone or are many."""
    with bench.engine(*OPTIONS, *options) as engine:
        times = time_writes(bench, engine, scene, QUIET_TRIALS, odds)
    assert times.comparison.p > CHANCE, shown(times)
