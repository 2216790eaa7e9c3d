"""The page, in a browser."""

from pathlib import Path

import pytest
from support import browser
from support.ledger import Ledger

from udedup.estimate.figures import Estimate, Figures, Kinds, Process, add
from udedup.estimate.page import PARTS, page

EVIL = "<script>throw Error()</script><img src='none.png'>"


@pytest.fixture
def estimate() -> Estimate:
    """Three processes, of which one has nothing to share."""
    figures = [
        Figures(pages=9000, already=1000, already_file=900, file=500, zero=2000, within=1000, between=3000),
        Figures(pages=5000, already=4000, zero=100.5, zero_file=10, within=0, between=250.25),
        Figures(pages=100),
    ]
    total = add(figures)
    commands = ["/usr/bin/qemu " + "-device virtio " * 40, EVIL, "idle"]
    return Estimate(
        page_bytes=4096,
        total=total,
        saved=total.saved,
        saved_least=5000,
        saved_most=8000,
        confidence=0.95,
        kinds=Kinds(3000, 1000, 250.25),
        processes=[Process(number + 1, commands[number], each) for number, each in enumerate(figures)],
        names={"anonymous": figures[0], EVIL: figures[1]},
        images={},
        sample=0.05,
        sampled=450,
        page_frames=True,
        left_out=[],
    )


@pytest.mark.require("chromium")
def test_in_a_browser(estimate: Estimate, tmp_path: Path, ledger: Ledger) -> None:
    """Bars are as long as what they stand for, it fits narrow windows, and nothing is loaded or run."""
    file = tmp_path / "page.html"
    file.write_text(page(estimate, 10), encoding="utf-8")
    with browser.opened(file, tmp_path / "browser", ledger) as opened:
        rows = "[...document.querySelectorAll('h2 + .table')].map(table => table.querySelectorAll('tr').length)"
        assert opened.evaluate(rows) == [4, 4, 3]
        widths = "[...document.querySelectorAll('{}')].map(each => Math.round(each.getBoundingClientRect().width))"
        whole = opened.evaluate(widths.format("h1 ~ p > svg rect"))
        total = estimate.total
        pieces = [total.zero, total.within, total.between, total.frames - total.saved]
        assert whole == pytest.approx([780 * part / total.frames for part in pieces], abs=1)
        most = opened.evaluate(widths.format("h2 ~ h2 + .table tr:nth-child(2) rect"))
        assert most[:4] == pytest.approx([260 * part / 8000 for part in (2000, 1000, 3000, 2000)], abs=1)
        legend = opened.evaluate("[...document.querySelectorAll('p span')].map(each => each.innerText)")
        assert legend == [*PARTS.values()]
        assert EVIL in opened.evaluate("document.body.innerText")
        for width in (1280, 400):
            opened.resize(width, 900)
            assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"wider than {width}"
        assert opened.troubles == []
        assert opened.requests == [file.as_uri()]
        opened.resize(1280, 900)
        opened.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_as_many_rows_as_wanted(estimate: Estimate) -> None:
    text = page(estimate, 1)
    assert "Processes: 1 of 3" in text
    assert "idle" not in text
