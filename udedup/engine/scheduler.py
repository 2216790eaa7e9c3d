"""When to look at which pages: KSM's pacing, with XLH's alternation of hints and linear scan.

The engine works in *spurts* of ``pages_to_scan`` pages with a pause of ``sleep_millisecs`` between two of them, as ksmd
does. A policy says which spurts go to hints: with the ratio h:s, h spurts take hinted pages first, then s spurts belong
to the linear scan. What a hint spurt leaves over when hints run out goes to the linear scan, so the load is the same
whatever the policy (XLH, USENIX ATC 2013).

A linear scan that finds nothing any more, in memory that keeps still, makes longer pauses (calm.py), unless an advisor
sets the rate.

A step of the linear scan may have to wait for an agent. Hints are served meanwhile, as far as the policy gives them
pages now: nobody waits because somebody else is slow.

Without a rate limit spurts follow each other at once, until the linear scan has gone through all memory without merging
anything: it then rests, longer each time, while hints are still served the moment they come in.
"""

from itertools import islice
from typing import Protocol

import attrs
import trio

from udedup.engine.advisor import Pace
from udedup.engine.calm import Calm
from udedup.engine.lending import Lending
from udedup.engine.meanwhile import Meanwhile
from udedup.engine.policies import Policy

REST_FIRST = 0.02
"""First rest of a fruitless linear scan, s; doubled each time."""

REST_MAX = 1.0
"""Longest rest, s, of a scan that is quick …"""

REST_PER_ROUND = 3.0
"""… and otherwise this many times what the round took: a fruitless scan then takes at most a quarter of a CPU."""


REPAY_SHARE = (1, 4)
"""Part of what a spurt has left that goes to pages used ahead of time. A burst of reads is paid back within minutes,
and the linear scan, which alone finds what was not read, goes on behind it."""


TOGETHER_SECONDS = 0.2
"""The spurts of so many seconds are done together, those for hints first: each time costs a wake-up of the engine and
of agents, which at KSM's default rate is most of the work …"""

QUIET_SECONDS = 1.0
"""… and while no hints come, so many seconds'; a hint then ends the pause. One of somebody who gave none of late always
does, and any where hints need not wait for their share of the rate."""

TOGETHER_PAGES = 8000
"""The spurts of about so many pages are done without a look at whether hints have come."""

ROUNDING = 0.01
"""Part of a spurt that a clock may be short of."""


@attrs.frozen
class Step:
    """What one part of the linear scan did."""

    visited: int
    """Pages."""

    rounds: int
    """Times the end of all memory was reached (0 or 1)."""


class Workload(Protocol):
    """What a scheduler schedules; the engine, or a model of it in tests."""

    @property
    def merged(self) -> int:
        """Pages merged so far."""

    @property
    def matched_hinted(self) -> int:
        """Hinted pages so far that were found to be elsewhere, too."""

    @property
    def matched_scanned(self) -> int:
        """Likewise, of the linear scan."""

    @property
    def changed(self) -> int:
        """Pages of the linear scan so far that were new, or had changed."""

    @property
    def agents_joined(self) -> int:
        """So far."""

    @property
    def cpu_seconds(self) -> float:
        """CPU that the engine and all agents have used so far, s."""

    async def wait_for_agents(self) -> None:
        """Returns once there is somebody to work with."""

    async def visit_hints(self, pages: int) -> int:
        """Works on up to ``pages`` hinted pages; returns how many there were."""

    async def scan(self, pages: int) -> Step:
        """Works on up to ``pages`` further pages of the linear scan; ends early at the end of a round."""

    async def wait_for_change(self, *, hints: bool, quiet_only: bool = False) -> None:
        """Returns once an agent joined or, if ``hints``, there is a hint; ``quiet_only``: of who gave none of late."""


class Scheduler:
    """Runs spurts for ever."""

    def __init__(self, workload: Workload, policy: Policy, pace: Pace, *, sleep_millisecs: int) -> None:
        self._workload = workload
        self._policy = policy
        self._pace = pace
        self._sleep = sleep_millisecs / 1000
        self._rest = 0.0
        self._rests_until = 0.0
        self._round_began = 0.0
        self._round_merged = 0
        self._round_seconds = 0.0
        """Time since the round began that there was somebody to work with."""
        self._round_visited = 0
        self._round_cpu = 0.0
        self._quiet = False
        """No hints came of late."""
        self._debt = 0
        """Pages that hints have used ahead of time."""
        self._unused = 0
        """Of the pages that hints had in this spurt, and left to the scan: they are theirs again if hints come."""
        self._lending = Lending()
        self._calm = Calm()
        self._meanwhile = Meanwhile(self._serve_meanwhile)
        self._between = trio.CancelScope()
        """Around what is waited for between spurts."""

    def change(self, pace: Pace, *, sleep_millisecs: int) -> None:
        """Goes by another pace from now on."""
        self._pace, self._sleep = pace, sleep_millisecs / 1000
        # How long the linear scan rests was decided for the pace before.
        self._rest, self._rests_until = 0.0, 0.0
        self._begin_round(trio.current_time())
        self._between.cancel()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._policy.hint_runs:
                nursery.start_soon(self._meanwhile.run)
            await self._go_on()

    async def _go_on(self) -> None:
        self._begin_round(trio.current_time())
        self._round_cpu = self._workload.cpu_seconds
        due = 1
        spurts = self._policy.spurts()
        while True:
            await self._workload.wait_for_agents()
            started = trio.current_time()
            rounds = await self._work_on(list(islice(spurts, due)))
            due = 1
            with trio.CancelScope() as self._between:
                if self._sleep:
                    due = await self._sleep_on()
                else:
                    await self._pause()
            self._round_seconds += trio.current_time() - started
            if rounds:
                self._advise()

    async def _work_on(self, spurts: list[bool]) -> int:
        """Does these spurts, each with hints first or not; returns how many rounds of the linear scan ended."""
        rounds = 0
        together = max(1, TOGETHER_PAGES // self._pace.pages_to_scan)
        self._quiet = self._quiet or any(spurts)
        for start in range(0, len(spurts), together):
            part = spurts[start : start + together]
            rounds += await self._spurts(part.count(True), part.count(False))
        return rounds

    async def _spurts(self, with_hints: int, without: int) -> int:
        """So many, at once."""
        hint_pages = with_hints * self._pace.pages_to_scan
        scan_pages = without * self._pace.pages_to_scan
        if self._policy.hint_runs and self._policy.lends:
            lent = self._lending.lent(scan_pages)
            hint_pages, scan_pages = hint_pages + lent, scan_pages - lent
        left = self._unused = 0
        if hint_pages:
            hinted = await self._visit_hints(hint_pages + self._room_ahead())
            self._unused = max(0, hint_pages - hinted)
            left = self._settle(hint_pages - hinted)
        left += self._settle(scan_pages)
        if left <= 0 or trio.current_time() < self._rests_until:
            return 0
        return await self._scan(left)

    async def _visit_hints(self, pages: int) -> int:
        hinted = await self._workload.visit_hints(pages)
        self._quiet = self._quiet and hinted == 0
        self._round_visited += hinted
        self._lending.hints.note(hinted, self._workload.matched_hinted)
        return hinted

    async def _scan(self, left: int) -> int:
        """Takes the linear scan on by so many pages; returns how many rounds ended."""
        rounds = 0
        while left > 0:
            with self._meanwhile.step():
                step = await self._workload.scan(left)
            self._round_visited += step.visited
            matched = self._workload.matched_scanned
            self._lending.scan.note(step.visited, matched)
            self._calm.look(
                step.visited,
                changed=self._workload.changed,
                matched=matched,
                joined=self._workload.agents_joined,
            )
            left -= step.visited
            if step.rounds:
                rounds += step.rounds
                self._calm.end_round()
                # As in KSM, the end of a round is the end of a spurt.
                left -= left % self._pace.pages_to_scan or self._pace.pages_to_scan
            elif step.visited == 0:
                break
        if rounds and not self._sleep:
            self._end_round()
        return rounds

    async def _serve_meanwhile(self) -> None:
        """Serves hints beside a step of the scan that waits for somebody. The scan has their pages back later."""
        while pages := self._room_meanwhile():
            await self._workload.wait_for_change(hints=True)
            # Once taken, they have to be charged.
            with trio.CancelScope(shield=True):
                hinted = await self._visit_hints(pages)
            if self._sleep:
                self._unused = max(0, self._unused - hinted)
                self._debt += hinted

    def _room_meanwhile(self) -> int:
        """Pages that hints may take now beside a step of the scan."""
        return self._unused + self._room_ahead() if self._sleep else self._pace.pages_to_scan

    async def _sleep_on(self) -> int:
        """Sleeps between spurts; returns how many spurts are due then: several, while there are no hints."""
        takes_hints = self._policy.hint_runs > 0
        quiet = self._quiet or not takes_hints
        most = max(1, int((QUIET_SECONDS if quiet else TOGETHER_SECONDS) / self._sleep + ROUNDING))
        any_hint = quiet or self._policy.ahead_seconds > 0
        pauses = self._calm.factor if quiet and self._policy.rests and self._pace.may_rest else 1
        started = trio.current_time()
        with trio.move_on_after(pauses * most * self._sleep):
            await self._workload.wait_for_change(hints=takes_hints, quiet_only=not any_hint)
        slept = trio.current_time() - started
        await trio.sleep(max(0.0, self._sleep - slept))
        return min(most, max(1, int(slept / self._sleep + ROUNDING)))

    def _room_ahead(self) -> int:
        """Pages that hints may take ahead of time now."""
        if not self._sleep:
            return 0
        return max(0, int(self._policy.ahead_seconds / self._sleep * self._pace.pages_to_scan) - self._debt)

    def _settle(self, left: int) -> int:
        """Takes the pages that a spurt has left, or is short of; returns those for the linear scan."""
        if left < 0:
            self._debt -= left
            return 0
        paid = min(self._debt, left * REPAY_SHARE[0] // REPAY_SHARE[1])
        self._debt -= paid
        return left - paid

    def _advise(self) -> None:
        """At the end of a round, the sleep after it included."""
        cpu = self._workload.cpu_seconds
        self._pace.end_round(
            seconds=self._round_seconds, visited=self._round_visited, cpu_seconds=cpu - self._round_cpu
        )
        self._round_seconds, self._round_visited, self._round_cpu = 0.0, 0, cpu

    def _begin_round(self, at: float) -> None:
        self._round_began = at
        self._round_merged = self._workload.merged

    def _end_round(self) -> None:
        """Without a rate limit: decides how long the linear scan rests."""
        now = trio.current_time()
        if self._workload.merged > self._round_merged:
            self._rest = 0.0
        else:
            longest = max(REST_MAX, REST_PER_ROUND * (now - self._round_began))
            self._rest = min(longest, max(REST_FIRST, 2 * self._rest))
        self._rests_until = now + self._rest
        self._begin_round(self._rests_until)

    async def _pause(self) -> None:
        """Without a rate limit: waits while there is nothing to do."""
        if trio.current_time() >= self._rests_until:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_at(self._rests_until):
            await self._workload.wait_for_change(hints=self._policy.hint_runs > 0)
