"""Gives the memory of segments back in which few slots are still in use (see ``udedup.engine.store``)."""

from collections.abc import Collection, Iterable
from functools import partial
from typing import Protocol

import trio

from udedup.engine.accounting import Counters
from udedup.engine.agent import Agent
from udedup.engine.compaction import PATIENCE, Compaction
from udedup.engine.domain import Domain
from udedup.engine.pressure import Level, PressureState
from udedup.engine.shortage import Shortage
from udedup.engine.wire import AgentError


class Household(Protocol):
    """What a retirement looks after."""

    counters: Counters
    shortage: Shortage
    pressure: PressureState

    @property
    def agents(self) -> Iterable[Agent]:
        """Connected agents."""

    @property
    def domains(self) -> Iterable[Domain]:
        """All domains."""


class Retirement:
    """One look every few seconds; all the work is jobs of agents. On the way agents' copies give back their memory."""

    def __init__(self, household: Household, seconds: float) -> None:
        self._household = household
        self._seconds = seconds
        self._compactions: dict[Domain, Compaction] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(self._seconds)
            self.look()

    def look(self) -> None:
        """Begins, pushes on and finishes retirements."""
        domains = list(self._household.domains)
        self._compactions = {domain: self._compactions.get(domain) or Compaction() for domain in domains}
        for domain in domains:
            agents = [agent for agent in self._household.agents if agent.domain is domain]
            for agent in agents:
                if agent.may_hand_over:
                    agent.submit(agent.take_over)
            # What is not counted seems to be dead.
            if not domain.recounts:
                self._retire(domain, agents)
            for agent in agents:
                if agent.has_stale_segments:
                    agent.submit(agent.forget_segments)
                self._drop_copies(agent)

    def _drop_copies(self, agent: Agent) -> None:
        try:
            agent.drop_copies()
        except AgentError as error:
            agent.fail(error)

    def _retire(self, domain: Domain, agents: Collection[Agent]) -> None:
        now = trio.current_time()
        patience = PATIENCE if self._household.pressure.level == Level.NONE else 0.0
        for number in self._compactions[domain].choose(domain.store.fills(now), now, patience=patience):
            segment = domain.store.segments[number]
            domain.store.begin_retirement(segment, domain.index_of(segment))
        for segment in list(domain.store.segments.values()):
            if segment.moves is None:
                continue
            # A child that has pages of its parent's must not be given what that parks later.
            apart = segment.owner != 0 and any(
                agent.segment_pages(segment.number) for agent in agents if agent.number != segment.owner
            )
            try:
                domain.store.continue_retirement(segment, domain.index_of(segment), apart=apart)
            except OSError as error:
                if not self._household.shortage.explains(error, "moving pages out of a sparse segment has to wait"):
                    raise
            for agent in agents:
                # Asked again at every look: what was busy the last time may not be now.
                if agent.segment_pages(segment.number):
                    agent.submit(partial(agent.move_out, segment))
        self._household.counters.segments_retired += len(domain.store.finish_retirement())
