"""Plays a scenario for each side and sets udedup's figures against KSM's."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import trio
from attrs import asdict, fields, frozen
from rich.console import Console

from demo import services
from demo.scenarios.scenario import Scenario
from demo.scenarios.settings import Settings, Side
from demo.scenarios.stage import Stage
from udedup.record.kernel import ksm
from udedup.record.recorder import Engine, recording
from udedup.record.recording import Recording, Totals

SHOW_SECONDS = 5.0
MOST = 0.9
"""``time_to_90``: when so much of KSM's final sharing is reached."""

READ_BYTES = 1 << 24


@frozen
class Played:
    """What one side did."""

    run_seconds: float
    """Of the work itself."""

    recording: Recording

    @property
    def totals(self) -> Totals:
        """Of the recording."""
        return self.recording.totals()


@frozen
class Ratios:
    """udedup against KSM; None where a side is missing, or never got there."""

    merged: float | None
    """Pages merged over the run, ours / KSM's."""

    time_to_90: float | None
    """Time from the last start to 90% of KSM's final sharing, ours / KSM's."""

    lead_fraction: float | None
    """1 − our median merge latency / KSM's, from the content being in place."""

    visits_per_merge: float | None
    """Ours, absolute."""

    scanner_cpu: float | None
    """CPU of engine and agents / ksmd's, each per second of its run."""

    run_time: float | None
    """Time of the work with udedup / with neither."""


@frozen
class Comparison:
    """One run of all sides."""

    played: Mapping[Side, Played]
    ratios: Ratios


def divided(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient, if there is one."""
    return numerator / denominator if numerator is not None and denominator else None


def ratios(scenario: Scenario, played: Mapping[Side, Played]) -> Ratios:
    """See :class:`Ratios`."""
    ours, ksm_side, bare = (played.get(side) for side in (Side.OURS, Side.KSM, Side.BARE))
    ours_sum = ours.totals if ours else None
    ksm_sum = ksm_side.totals if ksm_side else None
    return Ratios(
        merged=divided(ours_sum.merges, ksm_sum.merges) if ours_sum and ksm_sum else None,
        time_to_90=divided(_time_to_most(scenario, ours, ksm_sum), _time_to_most(scenario, ksm_side, ksm_sum)),
        lead_fraction=_lead_fraction(ours_sum, ksm_sum),
        visits_per_merge=ours_sum.visits_per_merge if ours_sum else None,
        scanner_cpu=divided(_scanner_cpu(ours_sum), _scanner_cpu(ksm_sum)),
        run_time=divided(ours.run_seconds, bare.run_seconds) if ours and bare else None,
    )


def _scanner_cpu(totals: Totals | None) -> float | None:
    """Part of a CPU."""
    return None if totals is None else (totals.cpu_engine + totals.cpu_agents + totals.cpu_ksmd) / totals.seconds


def _time_to_most(scenario: Scenario, side: Played | None, ksm_totals: Totals | None) -> float | None:
    if side is None or ksm_totals is None:
        return None
    since = side.recording.about.marks.get(scenario.last_start, 0.0)
    return side.recording.time_to(MOST * ksm_totals.sharing, since)


def _lead_fraction(ours: Totals | None, ksm_totals: Totals | None) -> float | None:
    if ours is None or ksm_totals is None:
        return None
    ratio = divided(ours.latency_p50, ksm_totals.latency_p50)
    return None if ratio is None else 1 - ratio


def medians(all_ratios: Sequence[Ratios]) -> tuple[Ratios, dict[str, tuple[float, float] | None]]:
    """The median of each ratio, and its lowest and highest value."""
    middle: dict[str, float | None] = {}
    ranges: dict[str, tuple[float, float] | None] = {}
    for each in fields(Ratios):
        values = [value for value in (asdict(one)[each.name] for one in all_ratios) if value is not None]
        middle[each.name] = statistics.median(values) if values else None
        ranges[each.name] = (min(values), max(values)) if values else None
    return Ratios(**middle), ranges


class Theatre:
    """Plays one scenario with one set of settings."""

    def __init__(self, name: str, scenario: Scenario, settings: Settings, cache: Path, console: Console) -> None:
        """Makes the scenario's images, which takes minutes the first time."""
        self._name = name
        self._scenario = scenario
        self._settings = settings
        self._console = console
        console.print(f"{name}: {scenario.summary}; images …")
        self._images = scenario.prepare(cache)

    def compare(self, sides: Sequence[Side], folder: Path) -> Comparison:
        """Plays each side once; ``folder`` gets their recordings."""
        played = {side: self.play(side, folder) for side in sides}
        return Comparison(played, ratios(self._scenario, played))

    def play(self, side: Side, folder: Path) -> Played:
        """Plays one side."""
        for image in self._images.values():
            _warm(image)
        own = folder / side.value
        own.mkdir()
        file = folder / f"{side.value}.parquet"
        self._console.print(f"{self._name}, {side.value} …")
        with ExitStack() as stack:
            engine = None
            if side is Side.OURS:
                engine = stack.enter_context(services.engine(own, self._images, self._engine_options()))
            elif side is Side.KSM:
                stack.enter_context(ksm(asdict(self._settings.ksm_rate or self._settings.rate)))
            stage = Stage(side=side, settings=self._settings, folder=own, engine=engine)
            seconds = trio.run(self._play, stage, file)
        self._console.print(f"  work done in {seconds:.1f} s")
        return Played(seconds, Recording.read(file))

    async def _play(self, stage: Stage, file: Path) -> float:
        engine = stage.engine
        async with (
            recording(
                file,
                pids=lambda: list(stage.pids),
                engine=Engine(engine.socket, engine.pid) if engine else None,
                ksm=stage.side is Side.KSM,
                images=tuple(self._images.values()),
                settings={"scenario": self._name, "side": stage.side.value} | self._about(),
                interval=self._settings.sample_seconds,
            ) as stage.recorder,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._show, stage)
            seconds = await self._scenario.play(stage)
            nursery.cancel_scope.cancel()
        return seconds

    async def _show(self, stage: Stage) -> None:
        """A line now and then, so that nobody thinks it hangs."""
        while True:
            await trio.sleep(SHOW_SECONDS)
            for row in stage.recorder.rows[-1:] if stage.recorder else ():
                self._console.print(
                    f"  {row.seconds:5.0f} s  sharing {row.sharing}  of {row.opportunity} pages that could"
                    f"  merges {row.merges}  visits {row.visits}",
                    highlight=False,
                )

    def _about(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self._settings, recurse=False).items()}

    def _engine_options(self) -> list[str]:
        settings = self._settings
        # At KSM's rate also where others on the machine wait for memory.
        options = ["--policy", settings.policy, "--hint-ratio", settings.hint_ratio, "--pressure", "off"]
        rate = settings.rate
        options += ["--pages-to-scan", str(rate.pages_to_scan), "--sleep-millisecs", str(rate.sleep_millisecs)]
        if settings.hint_slots:
            options += ["--hint-slots", str(settings.hint_slots)]
        return options


def _warm(image: Path) -> None:
    """Has the kernel cache the file, so that the side that plays first has no slower disk."""
    with image.open("rb") as file:
        while file.read(READ_BYTES):
            pass
