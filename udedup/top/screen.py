"""The screen, as lines of text: no line is wider than the screen, and there are no more than it has."""

from collections.abc import Sequence
from typing import TypeVar

import attrs
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from udedup.commands.report import size
from udedup.engine.accounting import Status
from udedup.top.columns import AGENTS, IMAGES, AgentRow, Column, ImageRow, known, ordered, rate, state
from udedup.top.rates import Rates
from udedup.top.view import View, position

Row = TypeVar("Row")

KEYS = "↑↓ select   p pause/resume   u unmerge   <> sort   r reverse   q quit"
BARS = "▁▂▃▄▅▆▇█"
GAUGE_CELLS = 20
TREND_WORDS_CELLS = 24
"""For what is said beside the trend."""

GAP = 2
"""Cells between two columns, …"""

ROWS_LEAST = 4
"""Processes that go before the last lines of the head."""

NARROW = 100
"""… of which there is one less on a screen that is not as wide."""

IMAGE_PART = 3
"""Images take one part in this many of the tables' lines, unless the processes need fewer."""


@attrs.frozen
class Frame:
    """All that is shown."""

    status: Status

    rates: Rates | None
    """None: this is the first answer."""

    saved: Sequence[int]
    """Bytes saved, by earlier answers and this one, oldest first."""

    interval: float
    """Between two of these, s."""

    notice: str = ""
    """What goes before everything else in the last line."""


@attrs.frozen
class Layout:
    """Lines of each part."""

    head: int

    agents: int
    """Without their title; like …"""

    images: int
    """… these."""


def layout(height: int, agents: int, images: int) -> Layout:
    """What has room on a screen of ``height`` lines, where there are so many rows."""
    # An empty line, the title of the processes, what is selected, and the keys.
    left = height - 4
    head = min(len(_LABELS), max(1, left - ROWS_LEAST))
    left -= head
    wanted = min(images, max(left - agents, left // IMAGE_PART) - 2) if images else 0
    shown = max(0, wanted)
    return Layout(head=head, agents=max(0, left - (shown + 2 if shown else 0)), images=shown)


def rows_of(frame: Frame, view: View) -> list[AgentRow]:
    """All processes, in their order."""
    rates = {} if frame.rates is None else frame.rates.agents
    rows = [AgentRow(agent, rates.get(agent.pid)) for agent in frame.status.agents]
    return ordered(rows, AGENTS[view.sort], backwards=view.backwards)


def screen(frame: Frame, view: View, rows: Sequence[AgentRow], width: int, height: int) -> list[Text]:
    """As many lines as the screen has, each as wide as it is. ``rows`` and ``view`` fit (see ``view.fitted``)."""
    parts = layout(height, len(rows), len(frame.status.images))
    lines = [*_head(frame, width)[: parts.head], Text("")]
    chosen = position(view, rows)
    lines += _table(
        AGENTS, rows[view.top : view.top + parts.agents], width, sort=view.sort, marked=_below(chosen, view.top)
    )
    images = _images(frame)
    if parts.images:
        lines += [Text("")] * (parts.agents - min(parts.agents, len(rows) - view.top) + 1)
        lines += _table(IMAGES, images[: parts.images], width)
    below = [_selected(rows, chosen), _last(frame, view)]
    lines = lines[: max(0, height - len(below))]
    lines += [Text("")] * (height - len(below) - len(lines))
    lines = [*lines, *below][:height]
    for line in lines:
        _cut(line, width)
    return lines


def once(frame: Frame, view: View) -> list[str]:
    """Everything, as lines of plain text, as wide as they get."""
    head = [line for label, line in zip(_LABELS, _head(frame, 0), strict=True) if label != _TREND]
    lines = [*head, Text(""), *_table(AGENTS, rows_of(frame, view), None)]
    if frame.status.images:
        lines += [Text(""), *_table(IMAGES, _images(frame), None)]
    return [line.plain.rstrip() for line in lines]


# ---- the head ----

_TREND = ""
_LABELS = ("udedup", "saved", _TREND, "pages", "rates", "hints", "cpu")


def _head(frame: Frame, width: int) -> list[Text]:
    status, rates = frame.status, frame.rates
    values = (
        f"engine {status.pid} at {status.socket}, policy {status.policy}, up {_clock(status.uptime_seconds)}",
        _saved(status),
        _trend(frame, width - _LABEL_CELLS),
        f"shared {status.pages_shared:,}  sharing {status.pages_sharing:,}  zero {status.zero_pages:,}"
        f"  unshared {status.pages_unshared:,}  volatile {status.pages_volatile:,}",
        _rates(status, rates),
        _hints(status, rates),
        _cpu(status, rates),
    )
    return [
        Text.assemble((f"{label:{_LABEL_CELLS}}", "bold"), (value, "green" if label == _TREND else ""))
        for label, value in zip(_LABELS, values, strict=True)
    ]


_LABEL_CELLS = max(map(len, _LABELS)) + GAP


def _saved(status: Status) -> str:
    own = status.memory.engine + status.memory.agents
    return (
        f"{size(status.bytes_saved)}  profit {size(status.general_profit)}  store {size(status.store.live_bytes)}"
        f"  udedup itself {size(own)}"
    )


def _trend(frame: Frame, cells: int) -> str:
    """The memory saved over time, as far as it fits."""
    shown = frame.saved[-max(1, cells - TREND_WORDS_CELLS) :]
    return f"{sparkline(shown)} {_clock((len(shown) - 1) * frame.interval)}, most {size(max(shown))}"


def sparkline(values: Sequence[int]) -> str:
    """A bar of one character for each value, from 0 to the greatest of them."""
    most = max([1, *values])
    return "".join(BARS[max(0, value) * (len(BARS) - 1) // most] for value in values)


def _rates(status: Status, rates: Rates | None) -> str:
    sleep = status.limits.sleep_millisecs
    limit = f"{status.pages_to_scan * 1000 // sleep:,}" if sleep else "no limit"
    merged, breaks = (None, None) if rates is None else (rates.merged, rates.breaks)
    return (
        f"scanned {rate(None if rates is None else rates.scanned)}/s of {limit}"
        f"  merged {rate(merged)}/s  breaks {rate(breaks)}/s  pressure {status.pressure.level}"
    )


def _hints(status: Status, rates: Rates | None) -> str:
    waiting, slots = status.hints.waiting, status.limits.hint_slots
    given, dropped = (None, None) if rates is None else (rates.hints, rates.dropped)
    return (
        f"[{gauge(waiting, slots)}] {waiting:,} of {slots:,} waiting  given {rate(given)}/s  dropped {rate(dropped)}/s"
    )


def gauge(value: int, most: int) -> str:
    """A bar that is as full as ``value`` is of ``most``; anything above 0 shows."""
    cells = min(GAUGE_CELLS, -(-value * GAUGE_CELLS // most))
    return "|" * cells + " " * (GAUGE_CELLS - cells)


def _cpu(status: Status, rates: Rates | None) -> str:
    engine, agents = (None, None) if rates is None else (rates.engine_cpu, rates.agents_cpu)
    limit = "" if status.limits.cpu_percent is None else f"  of at most {status.limits.cpu_percent:g}%"
    merging = sum(agent.merging for agent in status.agents)
    return (
        f"engine {rate(engine)}%  agents {rate(agents)}%{limit}"
        f"  processes {len(status.agents)}, active {merging}  mappings at most {status.limits.vmas:,}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---- the tables ----


def _images(frame: Frame) -> list[ImageRow]:
    rates = {} if frame.rates is None else frame.rates.images
    rows = [ImageRow(image, rates.get(image.name)) for image in frame.status.images]
    return sorted(rows, key=lambda row: (-known(row.reads), row.image.name))


def _table(
    columns: dict[str, Column[Row]], rows: Sequence[Row], width: int | None, *, sort: str = "", marked: int = -1
) -> list[Text]:
    """A title and the rows. What has no room in ``width`` cells is cut off columns of words; None: nothing is."""
    gap = GAP if width is None or width >= NARROW else GAP - 1
    cells = [[_printable(column.cell(row)) for column in columns.values()] for row in rows]
    widths = [
        max([column.least, cell_len(column.title), *(cell_len(line[at]) for line in cells)])
        for at, column in enumerate(columns.values())
    ]
    if width is not None:
        _shrink(widths, list(columns.values()), width - gap * (len(widths) - 1))
    title = Text(style="bold")
    for (name, column), cells_wide in zip(columns.items(), widths, strict=True):
        title.append(_padded(column.title, cells_wide, words=column.words), "reverse" if name == sort else "")
        title.append(" " * gap)
    lines = [title]
    for at, line in enumerate(cells):
        words = (
            _padded(text, cells_wide, words=column.words)
            for text, column, cells_wide in zip(line, columns.values(), widths, strict=True)
        )
        lines.append(Text((" " * gap).join(words), "reverse" if at == marked else _style(rows[at])))
    return lines


def _style(row: object) -> str:
    if not isinstance(row, AgentRow) or row.agent.merging:
        return ""
    return "dim" if row.agent.paused else "yellow"


def _shrink(widths: list[int], columns: Sequence[Column[Row]], width: int) -> None:
    """Takes what is more than ``width`` from columns of words, the widest first, down to what they have at least."""
    excess = sum(widths) - width
    while excess > 0:
        able = [at for at, column in enumerate(columns) if column.words and widths[at] > column.least]
        if not able:
            return
        widest = max(able, key=lambda at: widths[at])
        widths[widest] -= 1
        excess -= 1


def _padded(text: str, cells: int, *, words: bool) -> str:
    if cell_len(text) > cells:
        return set_cell_size(text, cells - 1) + "…"
    blank = " " * (cells - cell_len(text))
    return text + blank if words else blank + text


def _printable(text: str) -> str:
    """Names come from elsewhere, and must not say anything to the terminal."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


# ---- the last lines ----


def _below(at: int | None, top: int) -> int:
    return -1 if at is None else at - top


def _selected(rows: Sequence[AgentRow], at: int | None) -> Text:
    if at is None:
        return Text("")
    agent = rows[at].agent
    return Text(
        f"{agent.pid} {_printable(agent.command)}: {_printable(state(agent))}; {agent.runs:,} runs,"
        f" {agent.break_pages:,} pages broken, {agent.hints:,} hints, {agent.cpu_seconds:.1f} s of CPU",
        "bold",
    )


def _last(frame: Frame, view: View) -> Text:
    if frame.notice:
        return Text(_printable(frame.notice), "bold red")
    if view.question is not None:
        return Text(f"{view.question.kind} {view.question.pid}? y/n", "bold yellow")
    return Text(view.remark or KEYS, "" if view.remark else "dim")


def _cut(line: Text, width: int) -> None:
    line.truncate(width, pad=True)
