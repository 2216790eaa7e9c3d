"""A recording, or several side by side, as one HTML page that needs nothing else."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Final

import msgspec

from udedup.record.plots import svg
from udedup.record.recording import Recording, Totals

STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .15em .8em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
"""


def write_html(recordings: Mapping[str, Recording], title: str, file: Path) -> None:
    """Writes the plots and tables of the recordings, whose keys are their labels."""
    totals = {label: msgspec.to_builtins(recording.totals()) for label, recording in recordings.items()}
    names = {name: name.replace("_", " ") for name in Totals.__struct_fields__}
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>',
        f"<body><h1>{escape(title)}</h1>",
        svg(recordings, title),
        "<h2>Totals</h2>",
        _table(list(totals), {text: [each[name] for each in totals.values()] for name, text in names.items()}),
        "<h2>Events</h2>",
        *(
            f"<h3>{escape(label)}</h3>" + _table(["at, s"], {text: [at] for text, at in recording.about.marks.items()})
            for label, recording in recordings.items()
        ),
        "<h2>Settings</h2>",
        *(
            f"<h3>{escape(label)}</h3>"
            + _table(["value"], {name: [value] for name, value in recording.about.settings.items()})
            for label, recording in recordings.items()
        ),
        "</body></html>",
    ]
    file.write_text("\n".join(parts), encoding="utf-8")


def _table(headings: list[str], rows: Mapping[str, list[object]]) -> str:
    lines = ["<table><tr><th></th>", *(f"<th>{escape(heading)}</th>" for heading in headings), "</tr>"]
    for name, values in rows.items():
        cells = "".join(f"<td>{escape(_text(value))}</td>" for value in values)
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return "".join([*lines, "</table>"])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
