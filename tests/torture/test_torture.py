"""The torture program: whether it would notice a wrong byte at all, and that it notices none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.engine import Engine

HERE = Path(__file__).parent
SECONDS = int(os.environ.get("UDEDUP_TORTURE_SECONDS", "20"))
"""Length of the main run; tests/run has one of three minutes on its own."""

SHORT_SECONDS = 10
GRACE_SECONDS = 240

pytestmark = [pytest.mark.require("gcc"), pytest.mark.timeout(SECONDS + GRACE_SECONDS + 60)]


def torture(*options: str, seconds: int) -> None:
    """Runs the harness; its output is the failure's message."""
    command = [sys.executable, str(HERE / "run"), f"--seconds={seconds}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The torture program."""
    path = tmp_path_factory.mktemp("torture") / "torture"
    subprocess.run([HERE / "program" / "build", path], check=True)
    return path


def test_every_kind_of_fault_is_noticed(program: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [program, "--self-test", "--threads=6", f"--directory={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=GRACE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert len(re.findall("^self-test .* ok ", done.stdout, re.MULTILINE)) == 20


def test_a_wrong_byte_is_reported_with_all_that_is_needed_to_find_it(program: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [program, "--sabotage=flip", "--seed=5", "--seconds=5", f"--directory={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=GRACE_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    for word in ("address", "expected", "got", "operation", "thread", "seed         5", "generation", "mapping"):
        assert word in done.stderr


def test_the_program_is_right_without_an_agent() -> None:
    torture("--unwrapped", "--instances=1", seconds=SHORT_SECONDS)


@pytest.mark.require("userfaultfd-move")
def test_an_agent_without_an_engine_changes_nothing(program: Path, tmp_path: Path, engine: Engine) -> None:
    process = engine.wrap(program, "--seconds=8", f"--directory={tmp_path}", stdout=subprocess.DEVNULL)
    engine.stop()
    assert process.wait(GRACE_SECONDS) == 0


@pytest.mark.require("userfaultfd-move", "fuse")
def test_no_byte_is_wrong() -> None:
    # Too short for the counts that tests/run asks of its three minutes.
    torture("--no-thresholds", seconds=SECONDS)


@pytest.mark.require("userfaultfd-move", "fuse")
def test_no_byte_is_wrong_when_engines_are_killed() -> None:
    torture("--kill-engine", "--no-thresholds", seconds=SECONDS)


@pytest.mark.require("userfaultfd-move", "fuse")
def test_no_byte_is_wrong_when_system_calls_bypass_libc() -> None:
    torture("--raw", seconds=SHORT_SECONDS)
