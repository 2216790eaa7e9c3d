"""Memory pressure: more eager while tasks wait for memory, and out of the way when they wait for long.

- ``some`` (now and then a task waits): the scan goes faster, as far as the CPU allows, and sparse segments are given
  back without waiting. What is merged is memory for everybody.
- ``full`` (the machine is busy waiting): besides, the engine gives back what it can make anew: candidates, hints,
  digests of images that nobody has open. Until it is over, candidates stay below a small number, and no block is put
  into the store for a reader who may come. Pages that two processes have are still shared: that costs one page and
  frees two.

Who waits while there is plenty of memory (``udedup.engine.headroom``) is not counted.

A level is left only after a while well below it, one level at a time, so that it doesn't flutter.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import trio

from udedup.engine.psi import TRIGGER_PART, Pressure, Totals


class Level(enum.IntEnum):
    """How bad it is."""

    NONE = 0
    SOME = 1
    FULL = 2

    @property
    def word(self) -> str:
        """As ``udedup status`` has it."""
        return self.name.lower()


@attrs.frozen
class Stall:
    """Parts of the time, between 0 and 1."""

    some: float
    """In which at least one task waited for memory."""

    full: float
    """In which all that could have run waited for it."""


SOME_PART = 0.05
"""``Stall.some`` from which the level is SOME …"""

CRITICAL_SOME_PART = 0.4
"""… and from which it is FULL, as it is …"""

FULL_PART = 0.05
"""… from this ``Stall.full`` on."""

PLENTY_PART = 0.125
"""From this part of memory on that can be had there is plenty."""

CALM = 0.5
"""A level is left below this part of what leads to it …"""

CALM_SECONDS = 10.0
"""… after so long, s."""

LOOK_SECONDS = 1.0
"""Between looks under pressure, s; without triggers twice as long while there is none."""

PERIOD = 2 * LOOK_SECONDS


def level_of(stall: Stall) -> Level:
    """The level that such a stall by itself leads to."""
    if stall.full >= FULL_PART or stall.some >= CRITICAL_SOME_PART:
        return Level.FULL
    return Level.SOME if stall.some >= SOME_PART else Level.NONE


class Levels:
    """The level, with hysteresis. Knows no clock but what it is told."""

    def __init__(self) -> None:
        self.level = Level.NONE
        self._calm_since: float | None = None

    def judge(self, stall: Stall, now: float) -> Level:
        """Takes in what was seen at ``now``, s."""
        reached = level_of(stall)
        if reached > self.level:
            self.level = reached
        # As if twice of it had been seen.
        if level_of(Stall(stall.some / CALM, stall.full / CALM)) >= self.level:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= CALM_SECONDS:
            self.level = Level(self.level - 1)
            self._calm_since = now
        return self.level


class Relief(Protocol):
    """What is done about it."""

    def ease(self, level: Level, before: Level) -> None:
        """Called after each look; ``before``: the level until now."""


@attrs.define
class PressureState:
    """What is known of it."""

    level: Level = Level.NONE
    stall: Stall = Stall(0.0, 0.0)
    """As of the last look, of whatever is worst."""
    times: dict[Level, int] = attrs.field(factory=lambda: dict.fromkeys(Level, 0))
    """How often each level was reached from below."""


class PressureWatch:
    """Looks, judges, and has done what is to be done."""

    def __init__(
        self, pressure: Pressure, relief: Relief, state: PressureState, *, part_left: Callable[[], float]
    ) -> None:
        """``part_left``: the part of memory that can be had."""
        self._pressure = pressure
        self._part_left = part_left
        self._relief = relief
        self._state = state
        self._levels = Levels()
        self._before: tuple[float, Sequence[Totals]] = (0.0, [])

    async def run(self) -> None:
        """Until cancelled."""
        self._before = (trio.current_time(), self._pressure.read())
        while True:
            told = False
            if self._state.level == Level.NONE:
                told = await self._pressure.wait()
            else:
                await trio.sleep(LOOK_SECONDS)
            self._look(told)

    def _look(self, told: bool) -> None:
        now = trio.current_time()
        then, before = self._before
        totals = self._pressure.read()
        self._before = (now, totals)
        # Told by the kernel, it is a matter of the last two seconds, whenever the last look was.
        stall = Stall(TRIGGER_PART, 0.0) if told else _stall(before, totals, now - then)
        if level_of(stall) != Level.NONE and self._part_left() >= PLENTY_PART:
            stall = Stall(0.0, 0.0)
        level = self._levels.judge(stall, now)
        last, self._state.level, self._state.stall = self._state.level, level, stall
        for reached in range(last + 1, level + 1):
            self._state.times[Level(reached)] += 1
        self._relief.ease(level, last)


def _stall(before: Sequence[Totals], after: Sequence[Totals], seconds: float) -> Stall:
    """The worst of all that is watched. What is gone meanwhile makes all of it unknown for once."""
    if len(before) != len(after) or not after or seconds <= 0:
        return Stall(0.0, 0.0)
    pairs = list(zip(before, after, strict=True))
    return Stall(
        some=max(new.some - old.some for old, new in pairs) / seconds,
        full=max(new.full - old.full for old, new in pairs) / seconds,
    )
