"""The paper's figures: merged over time against the opportunity, lead times, visits per merge, CPU, and memory."""

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from udedup.errors import UdedupError
from udedup.record.recording import Recording

MIB: Final = 1 << 20
MOVING_SECONDS: Final = 10.0
"""CPU is shown as the mean over so long."""

LATENCY_STEPS: Final = 2000
"""Steps of a curve that may have millions."""


@attrs.frozen
class Style:
    """How one recording looks in all panels."""

    color: str
    line: tuple[float, tuple[float, ...] | None]
    """As matplotlib has it: where it begins, and lengths of dashes and gaps in points (None: solid)."""


STYLES: Final = tuple(
    Style(color, line)
    for line, color in itertools.product(
        # Lines first: nobody confuses the first seven. Colours: Okabe and Ito's, which all eyes can tell apart.
        ((0.0, None), (0.0, (6.0, 2.0)), (0.0, (8.0, 2.0, 2.0, 2.0))),
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444"),
    )
)
"""There can be so many recordings in a picture."""


@attrs.frozen
class Panel:
    """One figure."""

    name: str
    """Short, for ids."""

    title: str
    axis: str
    """What its y axis shows, with the unit."""

    about: str
    """How to read it, a sentence."""

    draw: Callable[[Axes, Recording, Style], Iterator[Line2D]]
    """Draws one recording, and gives what it drew."""

    from_zero: bool = False
    """Whether the y axis begins at 0."""

    over_time: bool = True
    """Whether the x axis is seconds since the recording began; else ``draw`` says what it is."""


def draw(recordings: Mapping[str, Recording], title: str) -> Figure:
    """All panels; each recording has a style of its own. The keys are their labels. Raises UdedupError if too many."""
    figure = _figure(14.0, 12.0)
    figure.suptitle(title)
    axes = figure.subplot_mosaic([["sharing", "sharing"], ["latency", "visits"], ["cpu", "pss"]])
    for panel in PANELS:
        _fill(panel, axes[panel.name], recordings)
        axes[panel.name].set_title(panel.title)
    handles = [Line2D([], [], label=label, color=style.color, ls=style.line) for label, style in styled(recordings)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def write_png(recordings: Mapping[str, Recording], title: str, file: Path) -> None:
    """Writes :func:`draw` as a PNG file."""
    draw(recordings, title).savefig(file, format="png", dpi=110)


def svg(panel: Panel, recordings: Mapping[str, Recording], inches: tuple[float, float]) -> str:
    """One panel as an SVG element of an HTML page, without title and legend.

    What belongs to the recording of number N is in elements whose ids have ``-run-N-``. No label is in it.
    """
    figure = _figure(*inches)
    _fill(panel, figure.subplots(), recordings)
    text = io.StringIO()
    # Text as text, in the page's own font; the same ids each time.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    # Several such elements are in one page.
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{panel.name}-", element)


def styled(recordings: Mapping[str, Recording]) -> Iterator[tuple[str, Style]]:
    """The labels, each with its style. Raises UdedupError if there are more than styles."""
    if len(recordings) > len(STYLES):
        raise UdedupError(f"{len(recordings)} recordings can't be told apart in a picture: give {len(STYLES)} at most")
    return zip(recordings, STYLES, strict=False)


def _figure(width: float, height: float) -> Figure:
    """In inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _fill(panel: Panel, axes: Axes, recordings: Mapping[str, Recording]) -> None:
    for number, (label, style) in enumerate(styled(recordings)):
        for part, line in enumerate(panel.draw(axes, recordings[label], style)):
            line.set_gid(f"run-{number}-{part}")
    if panel.from_zero:
        # Not before all is drawn: the upper end would stay where it is then.
        axes.set_ylim(bottom=0)
    if panel.over_time:
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds")
    axes.set_ylabel(panel.axis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _sharing(axes: Axes, recording: Recording, style: Style) -> Iterator[Line2D]:
    seconds = recording.column("seconds")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    yield from axes.plot(seconds, recording.column("sharing"), lw=1.8, color=style.color, ls=style.line)
    yield from axes.plot(seconds, recording.column("opportunity"), color=style.color, ls=":", lw=1.1)
    for at in recording.about.marks.values():
        yield axes.axvline(at, color=style.color, lw=0.6, alpha=0.4)


def _latency(axes: Axes, recording: Recording, style: Style) -> Iterator[Line2D]:
    values = np.sort(recording.latencies)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("seconds from content in place to merged")
    if len(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        part = np.arange(1, len(values) + 1) / len(values)
        shown = np.unique(np.linspace(0, len(values) - 1, LATENCY_STEPS).astype(int))
        steps = np.append(values[0], values[shown]), np.append(0, part[shown])
        yield from axes.step(*steps, where="post", color=style.color, ls=style.line)


def _visits(axes: Axes, recording: Recording, style: Style) -> Iterator[Line2D]:
    visits, merges = recording.column("visits"), recording.column("merges")
    visits = visits - visits[0]
    some = (merges > 0) & (visits > 0)
    if some.any():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        quotient = visits[some] / merges[some]
        yield from axes.plot(recording.column("seconds")[some], quotient, color=style.color, ls=style.line)


def _cpu(axes: Axes, recording: Recording, style: Style) -> Iterator[Line2D]:
    seconds = recording.column("seconds")
    cpu = sum((recording.column(f"cpu_{who}") for who in ("engine", "agents", "ksmd")), np.zeros(len(seconds)))
    before = np.searchsorted(seconds, seconds - MOVING_SECONDS)
    span = np.maximum(seconds - seconds[before], 1e-9)
    share = np.where(span > MOVING_SECONDS / 2, (cpu - cpu[before]) / span * 100, np.nan)
    yield from axes.plot(seconds, share, color=style.color, ls=style.line)


def _pss(axes: Axes, recording: Recording, style: Style) -> Iterator[Line2D]:
    yield from axes.plot(recording.column("seconds"), recording.column("pss") / MIB, color=style.color, ls=style.line)


PANELS: Final = (
    Panel(
        "sharing",
        "Merged over time, against the opportunity",
        "pages",
        "Pages that are saved, and dotted those that would be if all equal pages were merged. "
        "Upright lines are the events listed below.",
        _sharing,
        from_zero=True,
    ),
    Panel(
        "latency",
        "Lead time",
        "part of all merges",
        "How long a page had held what another one holds when it was merged: the further left and up, the earlier. "
        "Not finer than the pause between two samples.",
        _latency,
        over_time=False,
    ),
    Panel(
        "visits",
        "Pages visited per merge",
        "visits per merge, so far",
        "Pages that the merger looked at for each one that it merged, since the beginning.",
        _visits,
    ),
    Panel(
        "cpu",
        "CPU of the merger",
        "% of one CPU",
        f"Engine and agents, or ksmd: mean over {MOVING_SECONDS:.0f} s.",
        _cpu,
        from_zero=True,
    ),
    Panel(
        "pss",
        "Memory",
        "Pss, MiB",
        "Sum over the processes, and the engine if there is one. Pss divides a shared page by its mappings.",
        _pss,
        from_zero=True,
    ),
)
