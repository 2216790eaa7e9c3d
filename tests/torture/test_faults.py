"""The agent with faults in its own system calls; tests/torture/run --faults does it for as long as one likes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 16
GRACE_SECONDS = 240
LEAST_KINDS = 60
"""Of some 130 pairs of a call and an errno: every start of a process makes most of the calls."""

pytestmark = [pytest.mark.require("gcc", "userfaultfd-move", "fuse"), pytest.mark.timeout(SECONDS + GRACE_SECONDS + 60)]


def test_no_byte_is_wrong_when_system_calls_of_the_agent_fail(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(HERE / "run"), "--faults", f"--seconds={SECONDS}", f"--json={result}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + GRACE_SECONDS, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = json.loads(result.read_text())
    assert sum(fault["times"] > 0 for fault in report["faults"]) >= LEAST_KINDS
    assert report["counters"]["merged"] > 0
