"""The paper's figures: merged over time against the opportunity, latency, visits per merge, CPU."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from udedup.record.recording import Recording

COLORS: Final = ("tab:blue", "tab:orange", "tab:green", "tab:red")
INCHES: Final = (12.0, 8.0)
MOVING_SECONDS: Final = 10.0
"""CPU is shown as the mean over so long."""


def draw(recordings: Mapping[str, Recording], title: str) -> Figure:
    """Four panels; each recording has one colour. The keys are their labels."""
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(2, 2)
    draws = (_sharing, _latency, _visits, _cpu)
    for panel, panel_draw in zip(panels.flat, draws, strict=True):
        for color, (label, recording) in zip(COLORS, recordings.items(), strict=False):
            panel_draw(panel, label, recording, color)
        if panel_draw in (_sharing, _cpu):
            # Not before all is drawn: the upper end would stay where it is then.
            panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return figure


def write_png(recordings: Mapping[str, Recording], title: str, file: Path) -> None:
    """Writes :func:`draw` as a PNG file."""
    draw(recordings, title).savefig(file, format="png", dpi=110)


def svg(recordings: Mapping[str, Recording], title: str) -> str:
    """:func:`draw` as an SVG element."""
    text = io.StringIO()
    draw(recordings, title).savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _sharing(panel: Axes, label: str, recording: Recording, color: str) -> None:
    seconds = recording.column("seconds")
    panel.plot(seconds, recording.column("sharing"), color=color, label=f"{label}: merged")
    panel.plot(seconds, recording.column("opportunity"), color=color, ls=":", lw=1, label=f"{label}: could be")
    for at in recording.about.marks.values():
        panel.axvline(at, color=color, lw=0.5, alpha=0.5)
    panel.set(xlabel="seconds", ylabel="pages", title="Pages saved, and that could be (marks: starts and ends of work)")


def _latency(panel: Axes, label: str, recording: Recording, color: str) -> None:
    values = np.sort(recording.latencies)
    if len(values):
        part = np.arange(1, len(values) + 1) / len(values)
        shown = np.unique(np.linspace(0, len(values) - 1, 2000).astype(int))
        panel.step(values[shown], part[shown], color=color, where="post", label=f"{label}: {len(values)} merges")
    else:
        panel.plot([], [], color=color, label=f"{label}: no merges")
    panel.set_xscale("log")
    panel.set(xlabel="seconds from content in place to merged", ylabel="part of all merges", title="Merge latency")
    panel.set_ylim(0, 1)


def _visits(panel: Axes, label: str, recording: Recording, color: str) -> None:
    visits, merges = recording.column("visits"), recording.column("merges")
    seconds = recording.column("seconds")
    some = merges > 0
    panel.plot(seconds[some], (visits - visits[0])[some] / merges[some], color=color, label=label)
    panel.set(xlabel="seconds", ylabel="visits / merge, so far", title="Pages visited per merge")
    panel.set_yscale("log")


def _cpu(panel: Axes, label: str, recording: Recording, color: str) -> None:
    seconds = recording.column("seconds")
    parts = {
        "engine + agents": recording.column("cpu_engine") + recording.column("cpu_agents"),
        "ksmd": recording.column("cpu_ksmd"),
    }
    for name, cpu in parts.items():
        if cpu[-1] == cpu[0]:
            continue
        before = np.searchsorted(seconds, seconds - MOVING_SECONDS)
        span = np.maximum(seconds - seconds[before], 1e-9)
        share = np.where(span > MOVING_SECONDS / 2, (cpu - cpu[before]) / span * 100, np.nan)
        panel.plot(seconds, share, color=color, label=f"{label}: {name}")
    panel.set(xlabel="seconds", ylabel="% of one CPU", title=f"CPU, mean over {MOVING_SECONDS:.0f} s")
