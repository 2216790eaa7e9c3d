"""What keys do."""

import pytest
from support.statuses import agent

from udedup.commands.top import COLUMNS as SORTS
from udedup.top.columns import AGENTS, AgentRow, ordered
from udedup.top.rates import AgentRates
from udedup.top.view import COLUMNS, Deed, View, fitted, press

ROWS = [AgentRow(agent(pid), None) for pid in range(1, 11)]
PAGE = 4


def pressed(view: View, *keys: str, rows: list[AgentRow] = ROWS) -> tuple[View, list[Deed]]:
    deeds = []
    for key in keys:
        view, deed = press(fitted(view, rows, PAGE), key, rows, PAGE)
        deeds += [] if deed is None else [deed]
    return fitted(view, rows, PAGE), deeds


@pytest.mark.parametrize(
    ("keys", "pid", "top"),
    [
        ((), None, 0),
        (("down",), 1, 0),
        (("j", "j", "k"), 1, 0),
        (("up",), 1, 0),
        (("down",) * 5, 5, 1),
        (("end",), 10, 6),
        (("end", "up", "up"), 8, 6),
        (("end", "home"), 1, 0),
        (("page down",), 5, 1),
        (("down", "page down", "page down", "page down"), 10, 6),
        (("end", "escape", "down"), 7, 6),
        (("end", "page up"), 6, 5),
        (("x", "enter"), None, 0),
    ],
)
def test_selecting(keys: tuple[str, ...], pid: int | None, top: int) -> None:
    view, deeds = pressed(View(), *keys)
    assert (view.pid, view.top, deeds) == (pid, top, [])


def test_no_rows() -> None:
    view, deeds = pressed(View(), "down", "end", "page up", "p", "u", "y", rows=[])
    assert (view.pid, view.top, deeds) == (None, 0, [])


def test_the_selected_process_stays_so_where_the_order_changes() -> None:
    view, _ = pressed(View(), "down", "down")
    assert fitted(view, ROWS[::-1], PAGE).pid == 2
    assert fitted(view, ROWS[::-1], PAGE).top == 5
    # Another that comes to its place is not taken for it.
    assert fitted(view, ROWS[2:], PAGE).pid is None


def test_unmerging_is_asked_about_first() -> None:
    view, deeds = pressed(View(), "u")
    assert "select a process" in view.remark
    view, deeds = pressed(View(), "down", "u")
    assert (view.question, deeds) == (Deed("unmerge", 1), [])
    assert pressed(view, "y")[1] == [Deed("unmerge", 1)]
    assert pressed(view, "y", "y")[1] == [Deed("unmerge", 1)]
    for key in ("n", "q", "u", "p", "down", "escape"):
        left, deeds = pressed(view, key)
        assert (left.question, left.remark, left.quits, left.pid, deeds) == (None, "left as it is", False, 1, [])


def test_pausing_and_resuming() -> None:
    assert pressed(View(), "down", "p")[1] == [Deed("pause", 1)]
    paused = [AgentRow(agent(1, paused=True, merging=False, reason="paused on request"), None)]
    assert pressed(View(), "down", "p", rows=paused)[1] == [Deed("resume", 1)]
    # One that does not merge for reasons of its own can be paused.
    idle = [AgentRow(agent(1, merging=False, reason="a discard came past libc"), None)]
    assert pressed(View(), "down", "p", rows=idle)[1] == [Deed("pause", 1)]
    assert "select a process" in pressed(View(), "p")[0].remark


def test_quitting() -> None:
    assert pressed(View(), "q")[0].quits


def test_sorting() -> None:
    assert SORTS == COLUMNS == tuple(AGENTS)
    view, _ = pressed(View(sort="pid"), "<")
    assert view.sort == COLUMNS[-1]
    view, _ = pressed(view, ">", "right")
    assert view.sort == COLUMNS[1]
    assert pressed(view, "r")[0].backwards
    assert not pressed(view, "r", ">")[0].backwards


def test_order() -> None:
    rows = [
        AgentRow(agent(3, command="b", pages_sharing=5), AgentRates(1.0, 0.0)),
        AgentRow(agent(1, command="a", pages_sharing=9), None),
        AgentRow(agent(2, command="a", pages_sharing=5), AgentRates(2.0, 0.0)),
    ]

    def pids(sort: str, *, backwards: bool = False) -> list[int]:
        return [row.agent.pid for row in ordered(rows, AGENTS[sort], backwards=backwards)]

    assert pids("shared") == [1, 2, 3]
    assert pids("shared", backwards=True) == [2, 3, 1]
    assert pids("command") == [1, 2, 3]
    assert pids("command", backwards=True) == [3, 1, 2]
    # Rates that nobody knows yet come last.
    assert pids("breaks") == [2, 3, 1]
