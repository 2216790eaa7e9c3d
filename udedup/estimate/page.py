"""An estimate as one HTML page that needs nothing else: the tables, and bars instead of their figures."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Final

from udedup.commands.report import size
from udedup.estimate.figures import Estimate, Figures
from udedup.estimate.tables import cells, columns, headline, kinds

SHARED_STYLE: Final = Path(__file__).parent.parent / "record" / "page.css"
STYLE: Final = """
td:first-child { max-width: 20em; overflow: hidden; text-overflow: ellipsis }
td svg, p svg { display: inline-block; vertical-align: middle }
p svg { max-width: 100% }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.5em }
.legend svg { margin-right: .4em }
.table { margin-bottom: 1em }
.zero { fill: #4c9f70 } .within { fill: #3b7dd8 } .between { fill: #8e5bd0 } .rest { fill: #d9d9d9 }
.plain { fill: #8a94a3 }
"""

WIDTH: Final = 260
HEIGHT: Final = 12
"""Of a bar, pixels."""

PARTS: Final = {
    "zero": "all zero",
    "within": "equal within a process",
    "between": "equal to other processes'",
    "rest": "unlike any other",
}
"""What a bar is made of: class of the piece, and what it means."""


def page(estimate: Estimate, rows: int) -> str:
    """Returns the page, with so many processes and mappings at most."""
    first, *others = headline(estimate)
    processes = {f"{process.pid} {process.command}": process.figures for process in estimate.processes[:rows]}
    names = dict(list(estimate.names.items())[:rows])
    title = "What could be shared"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        # Whatever programs call themselves, the page loads nothing and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{title}</title><style>{SHARED_STYLE.read_text(encoding='utf-8')}{STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        f"<p><strong>{escape(first)}</strong></p>",
        *(f"<p>{escape(line)}</p>" for line in others),
        f"<p>{_bar(estimate.total, estimate.total.frames, 3 * WIDTH)}</p>",
        _legend(),
        "<h2>By kind</h2>",
        *(_kinds(title, values) for title, values in kinds(estimate).items()),
        f"<h2>Processes: {len(processes)} of {len(estimate.processes)}</h2>",
        _table(processes, estimate),
        f"<h2>Mappings by name: {len(names)} of {len(estimate.names)}</h2>",
        _table(names, estimate),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _legend() -> str:
    samples = (
        '<span><svg width="12" height="12" aria-hidden="true">'
        f'<rect class="{name}" width="12" height="12"/></svg>{text}</span>'
        for name, text in PARTS.items()
    )
    return f'<p class="legend">{"".join(samples)}</p>'


def _kinds(title: str, values: Mapping[str, float]) -> str:
    whole = max(sum(values.values()), 1.0)
    lines = [f"<tr><th>{escape(title)}</th><th></th><th></th></tr>"]
    for name, value in values.items():
        bar = _svg([("plain", value / whole)], WIDTH, name)
        lines.append(f"<tr><td>{escape(name)}</td><td>{size(round(value))}</td><td>{bar}</td></tr>")
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _table(rows: Mapping[str, Figures], estimate: Estimate) -> str:
    most = max((figures.frames for figures in rows.values()), default=1)
    heads = "".join(f"<th>{heading}</th>" for heading in ["", *columns(estimate), ""])
    lines = [f"<tr>{heads}</tr>"]
    for name, figures in rows.items():
        found = "".join(f"<td>{cell}</td>" for cell in cells(figures, estimate))
        lines.append(f"<tr><td>{escape(name)}</td>{found}<td>{_bar(figures, most, WIDTH)}</td></tr>")
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _bar(figures: Figures, most: int, width: int) -> str:
    """Memory by what could become of it; ``most`` pages are ``width`` pixels."""
    values = {"zero": figures.zero, "within": figures.within, "between": figures.between}
    values["rest"] = max(figures.frames - sum(values.values()), 0.0)
    text = ", ".join(f"{PARTS[name]} {value:.0f} pages" for name, value in values.items())
    return _svg([(name, value / max(most, 1)) for name, value in values.items()], width, text)


def _svg(pieces: list[tuple[str, float]], width: int, text: str) -> str:
    """A bar of pieces, each a class and a part of the width."""
    return (
        f'<svg width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(text)}">'
        f"{''.join(_rectangles(pieces, width))}</svg>"
    )


def _rectangles(pieces: list[tuple[str, float]], width: int) -> Iterator[str]:
    left = 0.0
    for name, part in pieces:
        if part > 0:
            yield f'<rect class="{name}" x="{left:.1f}" width="{part * width:.1f}" height="{HEIGHT}"/>'
        left += part * width
