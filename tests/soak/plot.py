"""The picture of a soak: what the engine had, over the time of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INCHES: Final = (12.0, 9.0)
MIB: Final = 1 << 20
PANELS: Final[Mapping[str, tuple[float, tuple[str, ...]]]] = {
    "the engine's memory, MiB": (MIB, ("rss_bytes", "pss_bytes", "heap_bytes")),
    "the engine's descriptors, mappings and threads": (1, ("descriptors", "vmas", "threads")),
    "the store, MiB": (MIB, ("store_bytes", "store_live_bytes")),
    "segments and processes": (1, ("segments", "agents")),
    "entries of the index": (1, ("candidates", "index_shared")),
    "processes so far": (1, ("ended",)),
}
"""Title, divisor, and fields of a sample, by panel."""


def write_png(samples: Sequence[Mapping[str, float]], title: str, file: Path) -> None:
    """Writes the picture; quiet moments are dots, busy ones the thin line."""
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for panel, (name, (divisor, fields)) in zip(figure.subplots(3, 2).flat, PANELS.items(), strict=True):
        for field in fields:
            seconds = [sample["seconds"] / 60 for sample in samples]
            (line,) = panel.plot(seconds, [sample[field] / divisor for sample in samples], lw=0.6, alpha=0.5)
            quiet = [sample for sample in samples if sample["quiet"]]
            panel.plot(
                [sample["seconds"] / 60 for sample in quiet],
                [sample[field] / divisor for sample in quiet],
                ".",
                ms=3,
                color=line.get_color(),
                label=field,
            )
        panel.set(title=name, xlabel="minutes")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=110)
