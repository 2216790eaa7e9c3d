"""A scenario from its start to its JSON, its picture and its files, with KSM beside it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.ledger import mounted

from demo.scenarios.comparison import Ratios, medians
from udedup.record.kernel import KSM
from udedup.record.recording import Recording

ROOT = Path(__file__).parent.parent.parent
RATIOS = ("merged", "time_to_90", "lead_fraction", "visits_per_merge", "scanner_cpu", "run_time")

needs_machine = pytest.mark.require("userfaultfd-move", "fuse", "root", "qemu")


def start(*argv: str | Path, temporary: Path) -> "subprocess.Popen[str]":
    """``demo/run``."""
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as in a shell's background
    )


def run(*argv: str | Path, temporary: Path) -> "subprocess.CompletedProcess[str]":
    """``demo/run`` to its end."""
    with start(*argv, temporary=temporary) as process:
        output, errors = process.communicate(timeout=280)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def command_lines() -> Iterator[bytes]:
    """Of all processes."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            yield file.read_bytes()


@needs_machine
@pytest.mark.timeout(300)
def test_boot_beside_ksm(tmp_path: Path) -> None:
    """Two guests at ten times KSM's rate: udedup is earlier, and KSM and the machine are as before."""
    temporary, kept = tmp_path / "temporary", tmp_path / "kept"
    temporary.mkdir()
    switches = ("run", "pages_to_scan", "sleep_millisecs")
    before = {name: (KSM / name).read_text() for name in switches}
    done = run(
        *("boot", "--guests", "2", "--stagger", "2", "--memory", "192", "--rate", "1000/20"),
        *("--json", tmp_path / "boot.json", "--plot", tmp_path / "boot.html", "--record", kept),
        temporary=temporary,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: (KSM / name).read_text() for name in switches} == before
    assert list(temporary.iterdir()) == []
    assert not any(place.is_relative_to(temporary) for place in mounted())

    result: dict[str, Any] = json.loads((tmp_path / "boot.json").read_text())
    assert result["scenario"] == "boot"
    assert result["settings"]["rate"] == {"pages_to_scan": 1000, "sleep_millisecs": 20}
    assert tuple(result["ratios"]) == RATIOS
    assert all(value is not None for value in result["ratios"].values()), result["ratios"]
    ours, ksm = result["ours"], result["ksm"]
    # The image holds over 10,000 blocks that a guest reads when it checks its files.
    assert ours["sharing"] > 10_000
    assert ksm["sharing"] > 10_000
    assert ours["known_merges"] > 10_000
    assert ours["latency_p50"] < ksm["latency_p50"]
    assert result["ratios"]["time_to_90"] < 1
    assert result["bare"]["merges"] == 0

    page = (tmp_path / "boot.html").read_text()
    assert "<svg" in page
    again = Recording.read(kept / "boot-1-ours.parquet").totals()
    assert (again.merges, again.visits) == (ours["merges"], ours["visits"])


@needs_machine
def test_terminated(tmp_path: Path) -> None:
    """Guests, engine and mount go with it, in the middle of a run."""
    with start("boot", "--no-bare", "--against", "none", temporary=tmp_path) as process:
        assert process.stdout is not None
        while "sharing" not in process.stdout.readline():
            assert process.poll() is None
        guests = list(tmp_path.glob("*/boot-1/ours/*.console"))
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert guests
    assert process.returncode == 1
    assert errors.endswith("demo/run: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert not any(place.is_relative_to(tmp_path) for place in mounted())
    assert not any(str(tmp_path).encode() in command for command in command_lines())


def test_unknown_kind_of_plot(tmp_path: Path) -> None:
    done = run("idle", "--plot", tmp_path / "x.pdf", temporary=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"demo/run: {tmp_path / 'x.pdf'}: a plot is a .png or an .html file\n"


def test_medians() -> None:
    """Of those runs that have a value."""
    nothing = Ratios(**dict.fromkeys(RATIOS))
    runs = [attrs.evolve(nothing, merged=value, run_time=1.0) for value in (4.0, 2.0, 10.0, None)]
    middle, ranges = medians(runs)
    assert middle == attrs.evolve(nothing, merged=4.0, run_time=1.0)
    assert ranges["merged"] == (2.0, 10.0)
    assert ranges["lead_fraction"] is None
