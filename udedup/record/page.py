"""A recording, or several side by side, as one HTML page that needs nothing else: no network, no script."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

import attrs
import msgspec

from udedup.record.plots import MIB, PANELS, Panel, Style, styled, svg
from udedup.record.recording import Recording, Totals
from udedup.record.sampler import PAGE

WIDE: Final = (13.0, 4.6)
NARROW: Final = (7.0, 4.0)
"""Panels, inches."""

DIFFERENT: Final = "different"
"""Class of rows whose values are not all the same."""

STYLE: Final = Path(__file__).with_name("page.css")


@attrs.frozen
class Figure:
    """A row of the first table."""

    title: str
    value: Callable[[Totals], float | None]
    text: Callable[[float], str]
    """The value for people, with its unit."""


def _pages(count: float) -> str:
    return f"{count * PAGE / MIB:,.1f} MiB"


def _seconds(value: float) -> str:
    return f"{value:,.2f} s"


def _cpu(totals: Totals) -> float:
    return totals.cpu_engine + totals.cpu_agents + totals.cpu_ksmd


def _part(part: float, whole: float) -> float | None:
    return part / whole if whole else None


GLANCE: Final = (
    Figure("run", lambda totals: totals.seconds, _seconds),
    Figure("saved, at the best moment", lambda totals: totals.sharing_most, _pages),
    Figure("saved, at the end", lambda totals: totals.sharing, _pages),
    Figure(
        "of what could be saved at the end", lambda totals: _part(totals.sharing, totals.opportunity), "{:.1%}".format
    ),
    Figure("pages merged over the run", lambda totals: totals.merges, "{:,.0f}".format),
    Figure("lead time, median", lambda totals: totals.latency_p50, _seconds),
    Figure("lead time, 90% are below", lambda totals: totals.latency_p90, _seconds),
    Figure("lead time, 99% are below", lambda totals: totals.latency_p99, _seconds),
    Figure("pages visited per merge", lambda totals: totals.visits_per_merge, "{:.2f}".format),
    Figure("CPU of the merger", _cpu, _seconds),
    Figure("… of one CPU", lambda totals: _part(_cpu(totals), totals.seconds), "{:.2%}".format),
    Figure("… per merged page", lambda totals: _part(_cpu(totals) * 1e6, totals.merges), "{:,.1f} µs".format),
    Figure("sum of Pss at the end", lambda totals: totals.pss / MIB, "{:,.1f} MiB".format),
)


def write_html(recordings: Mapping[str, Recording], title: str, file: Path) -> None:
    """Writes plots and tables of the recordings, whose keys are their labels; they are compared with the first one.

    Raises UdedupError if there are more than can be told apart.
    """
    styles = list(styled(recordings))
    totals = [recording.totals() for recording in recordings.values()]
    runs = [recording.about for recording in recordings.values()]
    heads = [
        f'<th class="run-{number}">{_sample(style)}{escape(label)}</th>' for number, (label, style) in enumerate(styles)
    ]
    raw = [msgspec.to_builtins(each) for each in totals]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        # Whatever a recording says, the page loads nothing and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}{_switches(len(styles))}</style></head>",
        f"<body><h1>{escape(title)}</h1>",
        f"<p>{_introduction(len(styles))}</p>",
        "<nav>",
        *(
            f'<label><input type="checkbox" id="show-{number}" checked>{_sample(style)}{escape(label)}</label>'
            for number, (label, style) in enumerate(styles)
        ),
        '</nav><div class="panels">',
        *(_panel(panel, recordings) for panel in PANELS),
        "</div><h2>At a glance</h2>",
        _table(heads, {figure.title: _compared(figure, totals) for figure in GLANCE}),
        "<details><summary>All totals</summary>",
        _table(heads, {name: [_text(each[name]) for each in raw] for name in Totals.__struct_fields__}),
        "</details><h2>Events</h2><p>Seconds since the recording began.</p>",
        _table(
            heads, {name: [_text(run.marks.get(name)) for run in runs] for name in _names([run.marks for run in runs])}
        ),
        "<h2>Settings</h2>",
        _table(
            heads,
            {name: [_text(run.settings.get(name)) for run in runs] for name in _names([run.settings for run in runs])},
            mark=True,
        ),
        "</body></html>",
    ]
    file.write_text("\n".join(parts), encoding="utf-8")


def _introduction(runs: int) -> str:
    if runs == 1:
        return "One recording."
    return f"{runs} recordings; small figures are multiples of the first one's. Untick a recording to hide it."


def _switches(runs: int) -> str:
    """Hides what belongs to a recording that is not ticked: curves, and columns of the tables."""
    return "".join(
        f'body:has(#show-{number}:not(:checked)) :is([id*="-run-{number}-"], .run-{number}) {{ display: none }}\n'
        for number in range(runs)
    )


def _sample(style: Style) -> str:
    """A piece of the recording's line."""
    dashes = f' stroke-dasharray="{" ".join(map(str, style.line[1]))}"' if style.line[1] else ""
    path = f'<path d="M0 4h28" stroke="{style.color}" stroke-width="3"{dashes}/>'
    return f'<svg viewBox="0 0 28 8" aria-hidden="true">{path}</svg>'


def _panel(panel: Panel, recordings: Mapping[str, Recording]) -> str:
    picture = svg(panel, recordings, WIDE if panel is PANELS[0] else NARROW)
    picture = picture.replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1)
    return f"<figure><h2>{escape(panel.title)}</h2>{picture}<figcaption>{escape(panel.about)}</figcaption></figure>"


def _compared(figure: Figure, totals: Sequence[Totals]) -> list[str]:
    """The cells of a row."""
    first, *others = (figure.value(each) for each in totals)
    cells = ["–" if first is None else figure.text(first)]
    for value in others:
        times = f" <small>× {value / first:.2f}</small>" if first and value is not None else ""
        cells.append("–" if value is None else figure.text(value) + times)
    return cells


def _names(tables: Sequence[Mapping[str, object]]) -> list[str]:
    """All keys, in the order in which they come."""
    return list(dict.fromkeys(name for table in tables for name in table))


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]], *, mark: bool = False) -> str:
    """``heads`` and cells are HTML; ``mark``: the rows in which recordings differ."""
    lines = ['<div class="table"><table><tr><th></th>', *heads, "</tr>"]
    for name, values in rows.items():
        different = f' class="{DIFFERENT}"' if mark and len(set(values)) > 1 else ""
        cells = "".join(f'<td class="run-{number}">{value}</td>' for number, value in enumerate(values))
        lines.append(f"<tr{different}><td>{escape(name)}</td>{cells}</tr>")
    return "".join([*lines, "</table></div>"])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else escape(str(value))
