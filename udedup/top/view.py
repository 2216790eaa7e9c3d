"""What is looked at, and what each key does about it."""

from collections.abc import Sequence
from typing import Literal

import attrs

from udedup.top.columns import AGENTS, AgentRow

COLUMNS = tuple(AGENTS)


@attrs.frozen
class Deed:
    """Something the engine is to do with a process."""

    kind: Literal["unmerge", "pause", "resume"]

    pid: int


@attrs.frozen
class View:
    """What a person has chosen so far."""

    sort: str = "shared"
    """One of AGENTS."""

    backwards: bool = False

    pid: int | None = None
    """Of the row that is selected; None: none is."""

    top: int = 0
    """Rows above the first one that is shown."""

    question: Deed | None = None
    """What is done if the next key is y."""

    remark: str = ""
    """What the last key led to."""

    quits: bool = False


def fitted(view: View, rows: Sequence[AgentRow], page: int) -> View:
    """The view where there are these rows, and room for ``page`` of them: the one selected is shown."""
    page = max(1, page)
    top = min(view.top, max(0, len(rows) - page))
    at = position(view, rows)
    if at is None:
        return attrs.evolve(view, pid=None, top=top)
    return attrs.evolve(view, top=min(max(top, at - page + 1), at))


def position(view: View, rows: Sequence[AgentRow]) -> int | None:
    """Where the selected row is; None: nowhere."""
    if view.pid is None:
        return None
    return next((at for at, row in enumerate(rows) if row.agent.pid == view.pid), None)


def press(view: View, key: str, rows: Sequence[AgentRow], page: int) -> tuple[View, Deed | None]:
    """What a key leads to, and what the engine is to do. Keys are named as ``udedup.top.keys`` does."""
    asked, view = view.question, attrs.evolve(view, question=None, remark="")
    if asked is not None:
        return (view, asked) if key in ("y", "Y") else (attrs.evolve(view, remark="left as it is"), None)
    match key:
        case "q" | "Q":
            return attrs.evolve(view, quits=True), None
        case "<" | "left":
            return _sorted(view, -1), None
        case ">" | "right":
            return _sorted(view, 1), None
        case "r":
            return attrs.evolve(view, backwards=not view.backwards), None
        case "p" | "u":
            return _deed(view, key, rows)
        case "escape":
            return attrs.evolve(view, pid=None), None
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -page, "page down": page, "home": -len(rows)}
    steps["end"] = len(rows)
    if key in steps and rows:
        return _moved(view, steps[key], rows), None
    return view, None


def _sorted(view: View, step: int) -> View:
    return attrs.evolve(view, sort=COLUMNS[(COLUMNS.index(view.sort) + step) % len(COLUMNS)], backwards=False)


def _moved(view: View, step: int, rows: Sequence[AgentRow]) -> View:
    at = position(view, rows)
    # The first step selects what is in sight.
    to = min(view.top, len(rows) - 1) if at is None and abs(step) == 1 else (at or 0) + step
    return attrs.evolve(view, pid=rows[min(max(to, 0), len(rows) - 1)].agent.pid)


def _deed(view: View, key: str, rows: Sequence[AgentRow]) -> tuple[View, Deed | None]:
    at = position(view, rows)
    if at is None:
        return attrs.evolve(view, remark="select a process first: ↑ and ↓"), None
    agent = rows[at].agent
    if key == "u":
        return attrs.evolve(view, question=Deed("unmerge", agent.pid)), None
    return view, Deed("resume" if agent.paused else "pause", agent.pid)
