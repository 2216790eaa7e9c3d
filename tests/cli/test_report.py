"""``udedup report``."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from record.conftest import row
from support.engine import udedup

from udedup.cli import main
from udedup.record.recording import About, Recording


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A recording of two samples."""
    rows = [row(0.0, 0, 0), row(1.0, 10, 20, visits=40)]
    file = tmp_path / "one" / "ours.parquet"
    file.parent.mkdir()
    Recording(rows, About(settings={}, marks={}, interval=1.0), np.ones(20, np.float32)).write(file)
    return file


def test_page(run: Path, tmp_path: Path) -> None:
    """Runs are called as they are told, or by as much of their paths as tells them apart."""
    other = tmp_path / "two" / "ours.parquet"
    other.parent.mkdir()
    other.write_bytes(run.read_bytes())
    page = tmp_path / "page.html"
    done = udedup("report", run, other, f"mine={run}", "-o", page, "--title", "A & B")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = page.read_text()
    assert "<title>A &amp; B</title>" in text
    assert all(f">{label}</label>" in text for label in ("one/ours", "two/ours", "mine"))
    assert main(["report", str(run), "-o", str(page)]) == 0
    assert ">ours</label>" in page.read_text()


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    (tmp_path / "text.parquet").write_text("no")
    for argv, reason in (
        ((tmp_path / "none.parquet", "-o", page), f"{tmp_path}/none.parquet: can't be read: No such file"),
        ((tmp_path / "text.parquet", "-o", page), f"{tmp_path}/text.parquet: is no Parquet file"),
        ((run, run, "-o", page), "two runs are called 'ours': give one of them another name, LABEL="),
        ((f"a={run}", f"a={run}", "-o", page), "two runs are called 'a'"),
        ((*(f"{n}={run}" for n in range(22)), "-o", page), "22 recordings can't be told apart in a picture: give 21"),
        ((run, "-o", run), f"{run}: is one of the recordings"),
        ((run, "-o", tmp_path / "none" / "page.html"), f"{tmp_path}/none/page.html: can't be written: No such file"),
        ((run, "-o", tmp_path), f"{tmp_path}: can't be written: Is a directory"),
    ):
        status = main(["report", *map(str, argv)])
        output, errors = capsys.readouterr()
        assert (status, output, errors.count("\n")) == (1, "", 1), argv
        assert errors.startswith(f"udedup: {reason}")
        assert not page.exists()
    Recording.read(run)


@pytest.mark.parametrize("argv", [("-o", "page.html"), ("run.parquet",), ("=run.parquet", "-o", "page.html")])
def test_wrong_usage(argv: tuple[str, ...], tmp_path: Path) -> None:
    done = udedup("report", *argv, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "page.html").exists()


def test_without_the_extra(run: Path, tmp_path: Path) -> None:
    """As after `pip install udedup` alone."""
    program = "import sys; sys.modules['matplotlib'] = None\nfrom udedup.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "report", str(run), "-o", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "udedup: udedup report needs the Python package matplotlib: pip install 'udedup[record]'\n"
