"""What a recording adds up to, how it is kept, and how it is shown."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from udedup.record.page import write_html
from udedup.record.plots import draw, write_png
from udedup.record.recording import About, Recording, Row

PNG = b"\x89PNG\r\n\x1a\n"


def row(seconds: float, sharing: int, merges: int, **more: float) -> Row:
    """A sample in which nothing else happens."""
    counts = dict.fromkeys(("zero_pages", "zero_shared", "shared", "opportunities", "merges_at_once"), 0)
    counts |= dict.fromkeys(("known_opportunities", "known_merges", "known_merges_at_once"), 0)
    fields = counts | {"present": 100, "opportunity": 50} | more
    return Row(seconds=seconds, sharing=sharing, merges=merges, **fields)  # type: ignore[arg-type]


@pytest.fixture
def recording() -> Recording:
    """Five samples; before the first the merger had looked at 1000 pages already."""
    rows = [
        row(0.0, 0, 0, visits=1000, cpu_engine=2.0),
        row(1.0, 10, 20, visits=1040, cpu_engine=2.5),
        row(2.0, 40, 60, visits=1100, cpu_engine=3.0),
        row(3.0, 30, 80, visits=1160, cpu_engine=3.5, pss=4096),
        row(4.0, 0, 80, visits=1200, cpu_engine=4.0, present=0, opportunity=0),
    ]
    about = About(settings={"policy": "xlh & <more>"}, marks={"last <starts>": 1.5}, interval=1.0)
    return Recording(rows, about, np.linspace(1, 9, 80, dtype=np.float32))


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


def test_shown(recording: Recording, tmp_path: Path) -> None:
    """A picture, and a page that holds it, escapes what it shows, and loads nothing."""
    recordings = {"ours": recording, "nothing": Recording(recording.rows[:1], recording.about, np.empty(0, "f4"))}
    write_png(recordings, "a title", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)
    write_html(recordings, "a <title>", tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "<h1>a &lt;title&gt;</h1>" in page
    assert "last &lt;starts&gt;" in page
    assert "xlh &amp; &lt;more&gt;" in page
    assert "<svg" in page
    assert not any(word in page for word in ("<script", "<link", "<img", "@import", "url(http"))
