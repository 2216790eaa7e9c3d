"""Work with many agents: rounds of the linear scan, and hints handed to whom they concern.

Like ksmd, the linear scan goes through one agent's memory to its end before it turns to the next; without a rate limit
several agents are worked with at a time. An agent that does not answer promptly is passed over until it does.
"""

import math
import time
from collections import Counter
from functools import partial

import trio

from udedup.engine.accounting import Counters
from udedup.engine.agent import Agent, Scanned, agents_cpu_seconds
from udedup.engine.hints import Hinted, HintStack
from udedup.engine.planner import Targets
from udedup.engine.scheduler import Step
from udedup.engine.wire import REPORTS_MAX, SCAN_MAX, AgentError

PATIENCE = 0.02
"""How long others wait for an agent's answer, s. It may answer later (see EngineConfig.answer_seconds), but alone."""

DRAIN_PAGES = 1 << 15
"""Hinted pages taken in at a time, from all agents together: the rest stays in the rings, which forget the oldest …"""

DRAIN_PAGES_FAST = 1 << 11
"""… and without a rate limit, where it is done some thousand times in a second and holds everything up meanwhile."""

BUSY_SECONDS = 0.05
"""How long the linear scan waits when all agents are busy, s."""

QUIET_SECONDS = 0.2
"""Who gave no hints in that time is served at once when it does."""

VISITS_MAX = 3
"""Batches of hinted pages that may be under way with one agent."""

HALF_WRITTEN = 0.001
"""Pause while an application thread finishes a hint, s."""


class Rounds:
    """The agents, and whose turn it is."""

    def __init__(self, counters: Counters, hints: HintStack, *, width: int) -> None:
        self.width = width
        """Agents scanned at a time."""
        self.agents: dict[int, Agent] = {}
        """By number; kept by the server."""
        self._numbers: dict[int, set[int]] = {}
        """Of agents, by process."""
        self._counters = counters
        self._hints = hints
        self._due: list[Agent] = []
        """Agents whose memory this round has not been through yet, in turn."""
        self._scanning: set[int] = set()
        """Numbers of agents with a step of the scan under way."""
        self._late: set[int] = set()
        """Numbers of agents whose last step took long, or takes long."""
        self._stepped = trio.Event()
        self._visiting: Counter[int] = Counter()
        """Batches of hinted pages under way, by agent number."""
        self._heard: dict[int, float] = {}
        """When agents gave hints last, by agent number, s of trio's clock."""
        self._changed = trio.Event()

    # ---- membership ----

    def joined(self, agent: Agent) -> None:
        """Takes part from the current round on."""
        self.agents[agent.number] = agent
        self._numbers.setdefault(agent.peer.pid, set()).add(agent.number)
        self._due.append(agent)
        self.change()

    def left(self, agent: Agent) -> None:
        """Forgets it."""
        del self.agents[agent.number]
        numbers = self._numbers[agent.peer.pid]
        numbers.discard(agent.number)
        if not numbers:
            del self._numbers[agent.peer.pid]
        self._scanning.discard(agent.number)
        if agent in self._due:
            self._due.remove(agent)
        self._late.discard(agent.number)
        del self._visiting[agent.number]
        self._heard.pop(agent.number, None)
        self._hints.forget_agent(agent.number)

    def change(self) -> None:
        """Wakes whoever waits for something to do."""
        self._changed.set()
        self._changed = trio.Event()

    def image_read(self, pid: int, inode: int, block: int, blocks: int) -> None:
        """A content hint: process ``pid`` reads blocks of an image, which it may have mapped."""
        for number in self._numbers.get(pid, ()) if pid else ():
            agent = self.agents[number]
            # What it has mapped may not be known yet.
            if agent.area.hints.waiting:
                self._take_in([agent], arm=False)
            if self._hints.read(number, inode, block, blocks):
                self.change()

    def offer_merge(self, targets: Targets) -> None:
        """See agent.Others."""
        agent = self.agents.get(targets.agent)
        if agent is None or not agent.offer(targets):
            self._counters.merge_dropped += targets.count

    def count_huge(self, targets: Targets) -> None:
        """See agent.Others."""
        agent = self.agents.get(targets.agent)
        if agent is not None:
            agent.count_huge(targets)

    # ---- scheduler.Workload ----

    @property
    def merged(self) -> int:
        """Pages merged so far."""
        return self._counters.merged_pages

    @property
    def matched_hinted(self) -> int:
        """Hinted pages so far that were found to be elsewhere, too."""
        return self._counters.hints_matched

    @property
    def matched_scanned(self) -> int:
        """Likewise, of the linear scan."""
        return self._counters.scan_matched

    @property
    def changed(self) -> int:
        """Pages of the linear scan so far that were new, or had changed."""
        return self._counters.scan_changed

    @property
    def agents_joined(self) -> int:
        """So far."""
        return self._counters.agents_joined

    @property
    def cpu_seconds(self) -> float:
        """CPU that the engine and all agents have used so far, s."""
        return time.process_time() + agents_cpu_seconds(self.agents.values(), self._counters)

    async def wait_for_agents(self) -> None:
        """Returns once there is an agent."""
        while not self.agents:
            await self._changed.wait()

    async def wait_for_change(self, *, hints: bool, quiet_only: bool = False) -> None:
        """Returns once an agent joined or, if ``hints``, a ring has something.

        With ``quiet_only`` only those of agents that gave no hints of late are looked at.
        """
        changed = self._changed
        if hints and quiet_only:
            if self._listen_to_the_quiet():
                return
        elif hints and self._drain(arm=True):
            # A ring whose next hint is not finished yet has nothing on the stack: don't spin on it.
            await trio.sleep(0 if len(self._hints) else HALF_WRITTEN)
            return
        await changed.wait()

    def _drain(self, *, arm: bool) -> bool:
        """Takes in the rings of all who can be given hints; whether there are hints now."""
        return self._take_in(list(self.agents.values()), arm=arm) or len(self._hints) > 0

    def _take_in(self, agents: list[Agent], *, arm: bool) -> bool:
        """Takes in these agents' rings; whether something is left in them."""
        more = False
        agents = [agent for agent in agents if self._visiting[agent.number] < VISITS_MAX]
        waiting = sum(agent.area.hints.waiting for agent in agents)
        pages = (DRAIN_PAGES if self.width == 1 else DRAIN_PAGES_FAST) // max(1, waiting)
        for agent in agents:
            try:
                drained = self._hints.drain(agent.number, agent.area.hints, pages=pages, arm=arm)
                agent.tend()
            except AgentError as error:
                agent.fail(error)
                continue
            self._counters.hints_place += drained.hints
            self._counters.hints_dropped += drained.dropped
            if drained.armed:
                agent.armed()
            more = more or drained.more
        return more

    def _listen_to_the_quiet(self) -> bool:
        """Whether an agent that gave no hints of late has some now; if not, such agents ring for the next."""
        since = trio.current_time() - QUIET_SECONDS
        quiet = [agent for agent in self.agents.values() if self._heard.get(agent.number, -math.inf) < since]
        return any(agent.area.hints.waiting for agent in quiet) or self._take_in(quiet, arm=True)

    async def visit_hints(self, pages: int) -> int:
        """Hands up to ``pages`` hinted pages to their agents, newest first; some may still be under way at the end."""
        self._drain(arm=False)
        visited = 0
        while visited < pages and len(self._hints):
            for hinted in self._hints.pop(min(pages - visited, REPORTS_MAX)):
                visited += hinted.count
                agent = self.agents[hinted.agent]
                self._heard[agent.number] = trio.current_time()
                if agent.submit(partial(self._visit, agent, hinted)) is None:
                    self._counters.hints_dropped += hinted.count
                else:
                    self._visiting[agent.number] += 1
                    self._hints.hold(agent.number, self._visiting[agent.number] >= VISITS_MAX)
        # What was submitted runs in the agents' own tasks: nobody waits for anybody.
        await trio.lowlevel.checkpoint()
        return visited

    async def _visit(self, agent: Agent, hinted: Hinted) -> None:
        try:
            await agent.take_hints(hinted)
        finally:
            self._visiting[agent.number] -= 1
            if self._visiting[agent.number] == VISITS_MAX - 1:
                self._hints.hold(agent.number, False)
                self.change()

    async def scan(self, pages: int) -> Step:
        """Up to ``pages`` pages of the linear scan, not beyond the end of the round."""
        self._drain(arm=False)
        visited = 0
        while visited < pages:
            if not self._ready():
                # Who is slow is left out of the rest of this round, unless nobody else is there.
                if not self._scanning.issuperset(self.agents):
                    return self._end_round(visited)
                with trio.move_on_after(BUSY_SECONDS) as scope:
                    await self._stepped.wait()
                if scope.cancelled_caught:
                    return Step(visited, 0)
                continue
            visited += await self._steps(pages - visited)
        return Step(visited, 0)

    def _ready(self) -> Agent | None:
        """Who is next."""
        return next((agent for agent in self._due if agent.number not in self._scanning), None)

    async def _steps(self, pages: int) -> int:
        """Steps of the linear scan, with several agents at a time if there is no rate limit; returns pages visited.

        Ends as soon as they are enough, whoever is not done by then.
        """
        visited = 0
        free = sum(agent.number not in self._scanning for agent in self._due)
        width = min(self.width, free)
        share = min(SCAN_MAX, -(-pages // width))
        if width == 1 and (agent := self._ready()) is not None:
            return await self._step(agent, share)
        async with trio.open_nursery() as nursery:

            async def turn() -> None:
                nonlocal visited
                while visited < pages and (agent := self._ready()) is not None:
                    visited += await self._step(agent, min(share, pages - visited))
                if visited >= pages:
                    nursery.cancel_scope.cancel()

            for _ in range(width):
                nursery.start_soon(turn)
        return visited

    async def _step(self, agent: Agent, pages: int) -> int:
        """One agent's; returns pages visited: all if it does not answer promptly, so that it doesn't get more."""
        if not agent.merging:
            self._due.remove(agent)
            return 0
        ticket = agent.submit(partial(self._scan, agent, pages, trio.current_time(), self._counters.full_scans))
        if ticket is None:
            return pages
        self._scanning.add(agent.number)
        await ticket.wait(0 if agent.number in self._late else PATIENCE)
        if ticket.result is None:
            self._late.add(agent.number)
            return pages
        return ticket.result.visited

    async def _scan(self, agent: Agent, pages: int, asked: float, turn: int) -> Scanned:
        """The part of a step that may outlast the patience with the agent. Who was late is not waited for next time."""
        try:
            step = await agent.scan(pages)
        finally:
            self._scanning.discard(agent.number)
            self._stepped.set()
            self._stepped = trio.Event()
        if trio.current_time() - asked <= PATIENCE:
            self._late.discard(agent.number)
        if step.wrapped and turn == self._counters.full_scans and agent in self._due:
            self._due.remove(agent)
        return step

    def _end_round(self, visited: int) -> Step:
        self._due = list(self.agents.values())
        self._counters.full_scans += 1
        for domain in {agent.domain for agent in self._due}:
            domain.index.age()
        return Step(visited, 1)
