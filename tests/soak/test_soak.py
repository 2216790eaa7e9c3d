"""The soak: that it notices what grows, and a short one in which nothing does."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from soak.trend import Allowance, trend

HERE = Path(__file__).parent
SECONDS = 240


def noisy(at: int, *, per_step: float, seed: int = 1) -> list[float]:
    dice = random.Random(seed)
    return [1000 + per_step * i + dice.uniform(-20, 20) for i in range(at)]


@pytest.mark.parametrize(("per_step", "grows"), [(0.0, False), (0.1, False), (1.0, True), (-3.0, False)])
def test_what_grows_by_more_than_is_allowed_is_noticed(per_step: float, grows: bool) -> None:
    found = trend(range(200), noisy(200, per_step=per_step), Allowance(50))
    assert found.grows is grows
    assert found.growth == pytest.approx(150 * per_step, abs=15)


def test_wild_samples_and_what_is_filled_once_do_not_count() -> None:
    values = noisy(200, per_step=0)
    for i in range(0, 200, 7):
        values[i] = 1e6
    assert not trend(range(200), values, Allowance(50)).grows
    filled = [float(min(i, 40) * 100) for i in range(200)]
    assert not trend(range(200), filled, Allowance(50)).grows


def test_too_few_samples_say_nothing() -> None:
    with pytest.raises(ValueError, match="too few"):
        trend(range(8), [1.0] * 8, Allowance(1))


@pytest.mark.require("gcc", "userfaultfd-move")
@pytest.mark.timeout(SECONDS + 30)
def test_nothing_is_left_of_processes_that_come_and_go(tmp_path: Path) -> None:
    options = ["--processes=220", "--batch=20", "--parallel=10", "--residents=2", f"--directory={tmp_path}"]
    command = [sys.executable, str(HERE / "run"), *options, "--plot", str(tmp_path / "soak.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
