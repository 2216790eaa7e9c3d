"""What was recorded: rows, one a sample, and what they add up to."""

from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from udedup.errors import UdedupError
from udedup.record.sampler import Sample

ABOUT: Final = b"udedup"
"""Key of :class:`About` in the file's metadata."""

LATENCIES: Final = b"udedup-latencies"
"""Key of the latencies, 32-bit floats."""


class Row(Sample, frozen=True, kw_only=True):
    """One sample, and what the merger itself says at about that time. Counters count from their own beginning."""

    seconds: float
    """Since the recording began."""

    visits: int = 0
    """pages_scanned of the engine or of KSM."""

    full_scans: int = 0
    """Of the same."""

    hints_place: int = 0
    hints_content: int = 0
    hints_dropped: int = 0
    hints_visited: int = 0
    hints_merged: int = 0
    breaks: int = 0
    """Pages of udedup's that were written to."""

    cpu_engine: float = 0.0
    """CPU time of the engine, s."""

    cpu_agents: float = 0.0
    """CPU time of all agents, s."""

    cpu_ksmd: float = 0.0
    """CPU time of ksmd, s."""

    cpu_recorder: float = 0.0
    """CPU time of the process that records, s."""

    pss: int = 0
    """Sum over the processes and the engine, bytes, not older than a few samples."""


class About(msgspec.Struct, frozen=True):
    """What a recording is of."""

    settings: dict[str, str]
    """Anything that its maker wanted to keep."""

    marks: dict[str, float]
    """Events, s since the beginning."""

    interval: float
    """From one sample to the next, s, where nothing delayed it."""


class Totals(msgspec.Struct, frozen=True):
    """A recording in a few numbers."""

    seconds: float
    merges: int
    """Pages that came to share a frame over the run."""

    merges_at_once: int
    """Of them: in the first sample that saw the opportunity."""

    opportunities: int
    """Times that a page came to hold what another one holds."""

    known_opportunities: int
    """Of them: with the content of a block of an image."""

    known_merges: int
    known_merges_at_once: int
    sharing: int
    """Pages saved at the end."""

    sharing_most: int
    """At the best moment."""

    opportunity: int
    """Pages that could have been saved at the end."""

    opportunity_most: int
    """At the best moment."""

    latency_p50: float | None
    """From opportunity to merge, s."""

    latency_p90: float | None
    latency_p99: float | None
    visits: int
    """Pages that the merger looked at."""

    visits_per_merge: float | None
    cpu_engine: float
    cpu_agents: float
    cpu_ksmd: float
    cpu_recorder: float
    hints_place: int
    hints_content: int
    hints_dropped: int
    hints_visited: int
    hints_merged: int
    breaks: int
    pss: int
    """Sum at the end, bytes."""


_AT_END: Final = (
    *("seconds", "merges", "merges_at_once", "opportunities"),
    *("known_opportunities", "known_merges", "known_merges_at_once"),
)
_GROWN: Final = (
    *("cpu_engine", "cpu_agents", "cpu_ksmd", "cpu_recorder", "breaks"),
    *("hints_place", "hints_content", "hints_dropped", "hints_visited", "hints_merged"),
)
"""Totals that are the last row's value, and its difference to the first's."""


def _line(error: Exception) -> str:
    """What it says, on one line."""
    return " ".join(str(error).split())


class Recording:
    """A recording, read back."""

    def __init__(self, rows: list[Row], about: About, latencies: NDArray[np.float32]) -> None:
        self.rows = rows
        self.about = about
        self.latencies = latencies
        """From opportunity to merge, s, of every merge."""

    @classmethod
    def read(cls, file: Path) -> "Recording":
        """Reads what :meth:`write` wrote. Raises UdedupError for anything else, and if there is no sample in it."""
        try:
            # The file itself: given a path, pyarrow would read all there is in a folder. And without threads, which
            # now and then abort the interpreter at its end.
            with file.open("rb") as source, pq.ParquetFile(source) as parquet:
                table = parquet.read(use_threads=False)
        except OSError as error:
            # pyarrow's own have no strerror.
            raise UdedupError(f"{file}: can't be read: {error.strerror or _line(error)}") from None
        except pa.ArrowException as error:
            raise UdedupError(f"{file}: is no Parquet file, or a broken one: {_line(error)}") from None
        metadata = table.schema.metadata or {}
        if not {ABOUT, LATENCIES} <= metadata.keys():
            raise UdedupError(f"{file}: is Parquet, but no recording of udedup's (`demo/run NAME --record DIR`)")
        try:
            about = msgspec.json.decode(metadata[ABOUT], type=About)
            latencies = np.frombuffer(metadata[LATENCIES], dtype=np.float32)
            rows = msgspec.convert(table.to_pylist(), list[Row])
        except ValueError as error:
            raise UdedupError(f"{file}: is no recording of this version: {_line(error)}") from None
        if not rows:
            raise UdedupError(f"{file}: has no sample in it")
        times = np.array([row.seconds for row in rows])
        if not (np.all(np.isfinite(times)) and np.all(np.diff(times) >= 0)):
            raise UdedupError(f"{file}: its samples are not in the order of their times")
        return cls(rows, about, latencies)

    def write(self, file: Path) -> None:
        """As Parquet: a column for each field of :class:`Row`; the rest in the metadata."""
        columns = {name: [getattr(row, name) for row in self.rows] for name in Row.__struct_fields__}
        metadata = {ABOUT: msgspec.json.encode(self.about), LATENCIES: self.latencies.tobytes()}
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)

    def column(self, name: str) -> NDArray[np.float64]:
        """One field of all rows."""
        return np.array([getattr(row, name) for row in self.rows], dtype=float)

    def time_to(self, pages: float, since: float) -> float | None:
        """Seconds from ``since`` to the first sample with so many pages saved (0 if before); None: never."""
        for row in self.rows:
            if row.sharing >= pages:
                return max(0.0, row.seconds - since)
        return None

    def totals(self) -> Totals:
        """See :class:`Totals`. Raises ValueError if nothing was recorded."""
        if not self.rows:
            raise ValueError("the recording is empty")
        first, last = self.rows[0], self.rows[-1]
        # What the merger did before the first sample is not of this run; what it did until then is all of the run's.
        visits = last.visits - first.visits
        quantiles = (
            [None] * 3
            if not len(self.latencies)
            else [float(value) for value in np.quantile(self.latencies, (0.5, 0.9, 0.99))]
        )
        # Processes end one after the other: the end is when most of their memory was last there.
        most = max(row.present for row in self.rows)
        final = [row for row in self.rows if 2 * row.present >= most][-1]
        return Totals(
            **{name: getattr(last, name) for name in _AT_END},
            **{name: getattr(last, name) - getattr(first, name) for name in _GROWN},
            sharing=final.sharing,
            sharing_most=max(row.sharing for row in self.rows),
            opportunity=final.opportunity,
            opportunity_most=max(row.opportunity for row in self.rows),
            latency_p50=quantiles[0],
            latency_p90=quantiles[1],
            latency_p99=quantiles[2],
            visits=visits,
            visits_per_merge=visits / last.merges if last.merges else None,
            pss=final.pss,
        )
