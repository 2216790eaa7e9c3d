"""The columns of the tables: what they are called, what is in them, and what they are sorted by."""

from collections.abc import Callable
from typing import Generic, TypeVar

import attrs

from udedup.commands.report import size
from udedup.engine.accounting import PAGE, AgentStatus, ImageStatus
from udedup.top.rates import AgentRates

Row = TypeVar("Row")

UNKNOWN = "-"
"""Where two answers are needed and there was one."""


@attrs.frozen
class Column(Generic[Row]):
    """One column; of words (to the left, may be cut) or of numbers (to the right)."""

    title: str

    cell: Callable[[Row], str]

    key: Callable[[Row], float | str]
    """What rows are sorted by: numbers with the greatest first, words by the alphabet."""

    words: bool = False

    least: int = 0
    """Cells it takes at least, so that the screen keeps still while figures change."""


@attrs.frozen
class AgentRow:
    """One process."""

    agent: AgentStatus

    rates: AgentRates | None
    """None: it was not there before."""

    @property
    def breaks(self) -> float | None:
        """Those of ``rates``."""
        return None if self.rates is None else self.rates.breaks

    @property
    def cpu(self) -> float | None:
        """That of ``rates``."""
        return None if self.rates is None else self.rates.cpu


@attrs.frozen
class ImageRow:
    """One image."""

    image: ImageStatus

    reads: float | None
    """A second; None: it was not there before."""


def state(agent: AgentStatus) -> str:
    """Whether a process takes part, and why if not."""
    if agent.merging:
        return "active"
    if agent.paused:
        return agent.reason
    return f"not merging: {agent.reason}" if agent.reason else "not merging"


def rate(value: float | None) -> str:
    """Something a second, or percent."""
    if value is None:
        return UNKNOWN
    return f"{value:.1f}" if 0 < value < 99.95 else f"{value:,.0f}"


def known(value: float | None) -> float:
    """For sorting: what isn't known comes after 0."""
    return -1.0 if value is None else value


def _share(image: ImageStatus) -> str:
    return f"{100 * image.blocks_served / image.blocks_read:.0f}%" if image.blocks_read else UNKNOWN


AGENTS: dict[str, Column[AgentRow]] = {
    "pid": Column("PID", lambda row: str(row.agent.pid), lambda row: row.agent.pid, least=7),
    "uid": Column("UID", lambda row: str(row.agent.uid), lambda row: row.agent.uid, least=4),
    "domain": Column("DOMAIN", lambda row: row.agent.domain, lambda row: row.agent.domain, words=True, least=6),
    "shared": Column(
        "SHARED", lambda row: size(row.agent.pages_sharing * PAGE), lambda row: row.agent.pages_sharing, least=10
    ),
    "zero": Column("ZERO", lambda row: size(row.agent.zero_pages * PAGE), lambda row: row.agent.zero_pages, least=10),
    "breaks": Column("BREAKS/S", lambda row: rate(row.breaks), lambda row: known(row.breaks), least=8),
    "vmas": Column("VMAS", lambda row: str(row.agent.vmas), lambda row: row.agent.vmas, least=5),
    "cpu": Column("CPU%", lambda row: rate(row.cpu), lambda row: known(row.cpu), least=4),
    "command": Column("COMMAND", lambda row: row.agent.command, lambda row: row.agent.command, words=True, least=8),
    "state": Column("STATE", lambda row: state(row.agent), lambda row: state(row.agent), words=True, least=8),
}
"""By the names that ``--sort`` takes."""

IMAGES: dict[str, Column[ImageRow]] = {
    "name": Column("IMAGE", lambda row: row.image.name, lambda row: row.image.name, words=True, least=24),
    "format": Column("FORMAT", lambda row: row.image.format, lambda row: row.image.format, words=True, least=6),
    "size": Column("SIZE", lambda row: size(row.image.size), lambda row: row.image.size, least=10),
    "reads": Column("READS/S", lambda row: rate(row.reads), lambda row: known(row.reads)),
    "store": Column("FROM STORE", lambda row: _share(row.image), lambda row: row.image.blocks_served),
}


def ordered(rows: list[AgentRow], column: Column[AgentRow], *, backwards: bool) -> list[AgentRow]:
    """Rows as they are shown; equal ones by their pid, so that they keep their places."""
    by_pid = sorted(rows, key=lambda row: row.agent.pid)
    return sorted(by_pid, key=column.key, reverse=backwards == column.words)
