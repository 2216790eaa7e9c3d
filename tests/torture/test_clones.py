"""Clones under torture: engines are killed while programs write, and nothing that was synced is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "clones" / "run"
SECONDS = 8
GRACE_SECONDS = 120


@pytest.mark.require("root", "fuse", "qemu-utils")
@pytest.mark.timeout(SECONDS + GRACE_SECONDS + 30)
def test_nothing_that_was_synced_is_lost() -> None:
    command = [sys.executable, str(RUN), f"--seconds={SECONDS}", "--longest=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + GRACE_SECONDS, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
