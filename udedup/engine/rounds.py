"""Work with many agents: rounds of the linear scan, and hints handed to whom they concern.

Like ksmd, the linear scan goes through one agent's memory to its end before it turns to the next; without a rate limit
several agents are worked with at a time. An agent that does not answer promptly is passed over until it does.
"""

import time
from functools import partial

import trio

from udedup.engine.accounting import Counters
from udedup.engine.agent import Agent, Scanned, agents_cpu_seconds
from udedup.engine.hints import HintStack
from udedup.engine.planner import Targets
from udedup.engine.scheduler import Step
from udedup.engine.wire import REPORTS_MAX, AgentError

PATIENCE = 0.25
"""How long others wait for an agent's answer, s. It may answer later (see EngineConfig.answer_seconds), but alone."""

TAKE_A_BREATH = 0.005
"""Pause when all agents that are due are busy, s."""


HALF_WRITTEN = 0.001
"""Pause while an application thread finishes a hint, s."""


class Rounds:
    """The agents, and whose turn it is."""

    def __init__(self, counters: Counters, hints: HintStack, *, width: int) -> None:
        """``width``: agents scanned at a time."""
        self.agents: dict[int, Agent] = {}
        """By number; kept by the server."""
        self._counters = counters
        self._hints = hints
        self._width = width
        self._due: list[Agent] = []
        """Agents whose memory this round has not been through yet, in turn."""
        self._scanning: set[int] = set()
        """Numbers of agents with a step of the scan under way."""
        self._changed = trio.Event()

    # ---- membership ----

    def joined(self, agent: Agent) -> None:
        """Takes part from the current round on."""
        self.agents[agent.number] = agent
        self._due.append(agent)
        self.change()

    def left(self, agent: Agent) -> None:
        """Forgets it."""
        del self.agents[agent.number]
        self._scanning.discard(agent.number)
        if agent in self._due:
            self._due.remove(agent)
        self._hints.forget_agent(agent.number)

    def change(self) -> None:
        """Wakes whoever waits for something to do."""
        self._changed.set()
        self._changed = trio.Event()

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
    def cpu_seconds(self) -> float:
        """CPU that the engine and all agents have used so far, s."""
        return time.process_time() + agents_cpu_seconds(self.agents.values(), self._counters)

    async def wait_for_agents(self) -> None:
        """Returns once there is an agent."""
        while not self.agents:
            await self._changed.wait()

    async def wait_for_change(self, *, hints: bool) -> None:
        """Returns once an agent joined or, if ``hints``, a ring has something."""
        changed = self._changed
        if hints and self._drain(arm=True):
            # A ring whose next hint is not finished yet has nothing on the stack: don't spin on it.
            await trio.sleep(0 if len(self._hints) else HALF_WRITTEN)
            return
        await changed.wait()

    def _drain(self, *, arm: bool) -> bool:
        """Takes in all rings; whether there are hints now."""
        more = False
        for agent in list(self.agents.values()):
            try:
                drained = self._hints.drain(agent.number, agent.area.hints, arm=arm)
                agent.tend()
            except AgentError as error:
                agent.fail(error)
                continue
            self._counters.hints_place += drained.hints
            self._counters.hints_dropped += drained.dropped
            if drained.armed:
                agent.armed()
            more = more or drained.more
        return more or len(self._hints) > 0

    async def visit_hints(self, pages: int) -> int:
        """Hands up to ``pages`` hinted pages to their agents; newest first."""
        self._drain(arm=False)
        visited = 0
        while visited < pages and len(self._hints):
            async with trio.open_nursery() as nursery:
                for hinted in self._hints.pop(min(pages - visited, REPORTS_MAX)):
                    visited += hinted.count
                    agent = self.agents[hinted.agent]
                    ticket = agent.submit(partial(agent.take_hints, hinted))
                    if ticket is None:
                        self._counters.hints_dropped += hinted.count
                    else:
                        nursery.start_soon(ticket.wait, PATIENCE)
        return visited

    async def scan(self, pages: int) -> Step:
        """Up to ``pages`` pages of the linear scan, not beyond the end of the round."""
        self._drain(arm=False)
        visited = 0
        while visited < pages:
            ready = [agent for agent in self._due if agent.number not in self._scanning][: self._width]
            if not ready:
                # Who is slow is left out of the rest of this round, unless nobody else is there.
                if self._scanning.issuperset(self.agents):
                    await trio.sleep(TAKE_A_BREATH)
                    return Step(visited, 0)
                return self._end_round(visited)
            share = min(REPORTS_MAX, -(-(pages - visited) // len(ready)))
            async with trio.open_nursery() as nursery:
                steps = [Scanned(0, wrapped=False) for _ in ready]
                for place, agent in enumerate(ready):
                    nursery.start_soon(self._step, agent, share, steps, place)
            visited += sum(step.visited for step in steps)
        return Step(visited, 0)

    async def _step(self, agent: Agent, pages: int, steps: list[Scanned], place: int) -> None:
        if not agent.merging:
            steps[place] = Scanned(0, wrapped=True)
        else:
            ticket = agent.submit(partial(self._scan, agent, pages))
            if ticket is not None:
                self._scanning.add(agent.number)
                await ticket.wait(PATIENCE)
            # Unanswered pages count as visited: a slow agent does not get more than its share.
            steps[place] = Scanned(pages, wrapped=False) if ticket is None or ticket.result is None else ticket.result
        if steps[place].wrapped and agent in self._due:
            self._due.remove(agent)

    async def _scan(self, agent: Agent, pages: int) -> Scanned:
        """The part of a step that may outlast the patience with the agent."""
        try:
            return await agent.scan(pages)
        finally:
            self._scanning.discard(agent.number)

    def _end_round(self, visited: int) -> Step:
        self._due = list(self.agents.values())
        self._counters.full_scans += 1
        for domain in {agent.domain for agent in self._due}:
            domain.index.age()
        return Step(visited, 1)
