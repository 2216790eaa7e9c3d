"""What a recording adds up to, how it is kept, and how it is shown."""

from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record.conftest import row

from udedup.errors import UdedupError
from udedup.record.plots import STYLES, draw, styled, write_png
from udedup.record.recording import ABOUT, LATENCIES, Recording

PNG = b"\x89PNG\r\n\x1a\n"


def test_totals(recording: Recording) -> None:
    """The end is the last sample with any process in it; the merger's counters count from the first sample."""
    totals = recording.totals()
    assert (totals.merges, totals.visits, totals.visits_per_merge) == (80, 200, 2.5)
    assert (totals.sharing, totals.sharing_most, totals.opportunity, totals.pss) == (30, 40, 50, 4096)
    assert totals.cpu_engine == 2.0
    assert totals.latency_p50 == pytest.approx(5.0)
    assert totals.latency_p99 == pytest.approx(8.92)


def test_time_to(recording: Recording) -> None:
    assert recording.time_to(35, 0.5) == 1.5
    assert recording.time_to(5, 3.0) == 0.0
    assert recording.time_to(41, 0.0) is None


def test_nothing_merged(recording: Recording) -> None:
    bare = Recording([row(0.0, 0, 0), row(1.0, 0, 0)], recording.about, np.empty(0, np.float32))
    totals = bare.totals()
    assert totals.visits_per_merge is None
    assert totals.latency_p50 is None


def test_nothing_recorded(recording: Recording) -> None:
    with pytest.raises(ValueError, match="empty"):
        Recording([], recording.about, recording.latencies).totals()


def test_kept(recording: Recording, tmp_path: Path) -> None:
    recording.write(tmp_path / "run.parquet")
    again = Recording.read(tmp_path / "run.parquet")
    assert again.rows == recording.rows
    assert again.about == recording.about
    assert again.totals() == recording.totals()


def test_every_curve_is_inside_its_panel(recording: Recording) -> None:
    """Also where the first one drawn is empty, or lower than the others."""
    low = [msgspec.structs.replace(recording.rows[-1], seconds=i) for i in range(20)]
    high = [msgspec.structs.replace(row, sharing=10**6 * i, cpu_engine=i / 2) for i, row in enumerate(low)]
    recordings = {
        name: Recording(rows, recording.about, recording.latencies) for name, rows in (("low", low), ("high", high))
    }
    for panel in draw(recordings, "").axes:
        bottom, top = panel.get_ylim()
        for line in panel.get_lines() if panel.get_yscale() == "linear" else ():
            values = np.asarray(line.get_ydata(), dtype=float)
            assert np.all((values >= bottom) & (values <= top) | np.isnan(values)), panel.get_title()


def test_every_recording_is_drawn(recording: Recording) -> None:
    """In a way that no other is, however many there are; and more than can be told apart are refused."""
    few = {str(number): recording for number in range(7)}
    assert len({style.color for _, style in styled(few)}) == 7
    most = {str(number): recording for number in range(len(STYLES))}
    assert [label for label, _ in styled(most)] == list(most)
    assert len({style for _, style in styled(most)}) == len(most)
    figure = draw(few, "")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(few)
    for panel in figure.axes:
        assert panel.get_xlabel()
        assert panel.get_ylabel()
        drawn = {str(line.get_gid()).rpartition("-")[0] for line in panel.get_lines()}
        assert drawn == {f"run-{number}" for number in range(7)}, panel.get_title()
    with pytest.raises(UdedupError, match="give 21 at most"):
        draw(most | {"one more": recording}, "")


def test_picture(recording: Recording, tmp_path: Path) -> None:
    recordings = {"ours": recording, "nothing": Recording(recording.rows[:1], recording.about, np.empty(0, "f4"))}
    write_png(recordings, "a title", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)


# ---- files that are none ----


def broken(recording: Recording, file: Path, kind: str) -> None:
    """Writes a file that is not quite a recording."""
    recording.write(file)
    table = pq.read_table(file)
    metadata = table.schema.metadata
    match kind:
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("seconds,sharing\n1,2\n")
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
        case "damaged":
            content = bytearray(file.read_bytes())
            content[4:2000] = bytes(1996)
            file.write_bytes(content)
        case "other":
            pq.write_table(table.replace_schema_metadata({}), file)
        case "columns":
            pq.write_table(table.drop_columns(["seconds"]), file)
        case "types":
            words = pa.array([str(row.sharing) for row in recording.rows])
            pq.write_table(table.set_column(table.schema.names.index("sharing"), "sharing", words), file)
        case "about":
            pq.write_table(table.replace_schema_metadata(metadata | {ABOUT: b"{"}), file)
        case "latencies":
            pq.write_table(table.replace_schema_metadata(metadata | {LATENCIES: b"123"}), file)
        case "no samples":
            pq.write_table(table.slice(0, 0), file)
        case "order":
            pq.write_table(table.take([1, 0, 2]), file)
        case "no time":
            rows = [msgspec.structs.replace(row, seconds=float("nan")) for row in recording.rows]
            Recording(rows, recording.about, recording.latencies).write(file)
        case "folder":
            file.unlink()
            file.mkdir()
        case "none":
            file.unlink()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "is no Parquet file, or a broken one: "),
        ("text", "is no Parquet file, or a broken one: "),
        ("cut", "is no Parquet file, or a broken one: "),
        ("damaged", ""),
        ("other", "is Parquet, but no recording of udedup's"),
        ("columns", "is no recording of this version: Object missing required field `seconds`"),
        ("types", "is no recording of this version: Expected `int`, got `str`"),
        ("about", "is no recording of this version: "),
        ("latencies", "is no recording of this version: "),
        ("no samples", "has no sample in it"),
        ("order", "its samples are not in the order of their times"),
        ("no time", "its samples are not in the order of their times"),
        ("folder", "can't be read: Is a directory"),
        ("none", "can't be read: No such file or directory"),
    ],
)
def test_no_recordings(recording: Recording, tmp_path: Path, kind: str, reason: str) -> None:
    """One line, which names the file and what is wrong with it."""
    file = tmp_path / "run.parquet"
    broken(recording, file, kind)
    with pytest.raises(UdedupError) as caught:
        Recording.read(file)
    assert str(caught.value).startswith(f"{file}: {reason}")
    assert "\n" not in str(caught.value)
