"""The page of recordings, as a browser shows it."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from record.conftest import row
from support import browser
from support.ledger import Ledger

from udedup.record.page import write_html
from udedup.record.plots import PANELS, styled
from udedup.record.recording import About, Recording


@pytest.fixture(scope="module")
def recordings() -> dict[str, Recording]:
    """Five runs of 60 s, each twice as fast as the one before, and one in which nothing was merged."""
    runs = {}
    for number in range(5):
        speed = 20 << number
        rows = [
            row(
                float(second),
                min(speed * second, 9000),
                speed * second,
                opportunity=10000,
                visits=speed * second * (10 + second),
                cpu_engine=speed * second**2 * 1e-6,
                pss=(200 << 20) - min(speed * second, 9000) * 4096,
            )
            for second in range(60)
        ]
        about = About(
            settings={"side": "ours & <theirs>", "speed": str(speed)}, marks={f"start <{number}>": 5.0}, interval=1.0
        )
        latencies = np.geomspace(1, 60, rows[-1].merges, dtype=np.float32) / np.float32(number + 1)
        runs[f"<run> {number}"] = Recording(rows, about, latencies)
    nothing = [row(float(second), 0, 0) for second in range(60)]
    return runs | {"nothing": Recording(nothing, About(settings={}, marks={}, interval=1.0), np.empty(0, "f4"))}


@pytest.fixture(scope="module")
def file(recordings: dict[str, Recording], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "runs.html"
    write_html(recordings, "a <title> & more", file)
    return file


def test_nothing_else_is_needed(file: Path) -> None:
    """And what recordings say is text, whatever is in it."""
    text = file.read_text()
    assert "<h1>a &lt;title&gt; &amp; more</h1>" in text
    assert "start &lt;0&gt;" in text
    assert "ours &amp; &lt;theirs&gt;" in text
    assert not re.search(r"<(script|link|img|iframe|object)|@import|src=|<run>|<title> ", text)
    # Names of XML's namespaces and places in the page itself.
    assert all(
        target.startswith("#") or "w3.org" in target
        for target in re.findall(r"""(?:href=|url\()["']?([^"')]+)""", text)
    )


def test_the_same_recordings_make_the_same_page(recordings: dict[str, Recording], file: Path, tmp_path: Path) -> None:
    write_html(recordings, "a <title> & more", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == file.read_text()


def test_ids_are_unique(file: Path) -> None:
    ids = re.findall(r' id="([^"]+)"', file.read_text())
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(|href=")#([^")]+)', file.read_text())
    assert set(targets) <= set(ids)


def test_a_single_sample(recordings: dict[str, Recording], tmp_path: Path) -> None:
    """A recording that was over at once is shown as well."""
    one = recordings["<run> 0"]
    short = {"short": Recording(one.rows[:1], one.about, np.empty(0, "f4"))}
    write_html(short, "one", tmp_path / "one.html")
    assert "One recording." in (tmp_path / "one.html").read_text()


SHOWN = """
(id => {
    const element = document.getElementById(id), box = element && element.getBoundingClientRect();
    return element ? [Math.round(box.width), Math.round(box.height)] : null;
})
"""


@pytest.mark.require("chromium")
def test_in_a_browser(recordings: dict[str, Recording], file: Path, tmp_path: Path, ledger: Ledger) -> None:
    """All curves are there and in their colours, nothing goes wrong, and each run can be hidden."""
    with browser.opened(file, tmp_path / "browser", ledger) as page:

        def shown(panel: str, run: int) -> tuple[int, int]:
            width, height = page.evaluate(f"{SHOWN}('{panel}-run-{run}-0')") or (0, 0)
            return width, height

        assert page.evaluate("document.title") == "a <title> & more"
        assert page.evaluate("[...document.querySelectorAll('nav label')].map(each => each.innerText)") == [*recordings]
        labels = page.evaluate("[...document.querySelectorAll('figure svg')].map(each => each.ariaLabel)")
        assert labels == [panel.title for panel in PANELS]
        for number in range(5):
            for panel in PANELS:
                assert min(shown(panel.name, number)) > 5, (panel.name, number)
        page.screenshot(tmp_path / "page.png")
        picture = imread(tmp_path / "page.png")[:, :, :3]
        for number, (_, style) in enumerate(styled(recordings)):
            same = np.all(np.abs(picture - to_rgb(style.color)) < 0.01, axis=2)
            assert same.sum() > 200, f"next to nothing is in the colour of run {number}"
        page.evaluate("document.getElementById('show-3').click()")
        assert [shown(panel.name, 3) for panel in PANELS] == [(0, 0)] * len(PANELS)
        assert min(shown("sharing", 2)) > 50
        cells = "[...document.querySelectorAll('td.run-{}')].map(each => each.offsetWidth)"
        assert not any(page.evaluate(cells.format(3)))
        assert any(page.evaluate(cells.format(2)))
        page.evaluate("document.getElementById('show-3').click()")
        assert min(shown("sharing", 3)) > 50
        for width in (1280, 400):
            page.resize(width, 900)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"wider than {width}"
        assert page.troubles == []
        assert page.requests == [file.as_uri()]


@pytest.mark.require("chromium")
def test_the_browser_tells_what_goes_wrong(tmp_path: Path, ledger: Ledger) -> None:
    """Or the test above would be worth nothing."""
    file = tmp_path / "bad.html"
    file.write_text("<!doctype html><img src='none.png'><script>throw Error('as tests do')</script>")
    with browser.opened(file, tmp_path / "browser", ledger) as page:
        assert any("as tests do" in trouble for trouble in page.troubles)
        assert page.requests == [file.as_uri(), (tmp_path / "none.png").as_uri()]
