"""The main job runs to its end, finds every byte right, and its figures hold together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ledger import mounted

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 0.1

pytestmark = [
    pytest.mark.require("userfaultfd-move", "fuse", "root", "redis", "sqlite3", "mke2fs", "fuse2fs"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run reports. It must leave no mount behind, and the programs' folder gone."""
    folder = tmp_path_factory.mktemp("demo")
    temp = folder / "temp"
    temp.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "demo", "--json", str(folder / "result.json")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temp)},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert list(temp.iterdir()) == []
    assert not any(place.is_relative_to(temp) for place in mounted())
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_every_byte_is_right(result: dict[str, Any]) -> None:
    assert result["wrong"] == []
    assert result["programs"] >= 4
    assert result["items_verified"] > 10000


def test_memory_is_saved_by_both_accounts(result: dict[str, Any]) -> None:
    """The fall of Pss, in which udedup's own memory is contained, is what the engine says is left after that."""
    assert result["saved_kernel"] > 0.3 * result["pss_without"]
    assert abs(result["saved_kernel"] - result["general_profit"]) < TOLERANCE * result["saved_kernel"]


def test_writes_were_served(result: dict[str, Any]) -> None:
    assert result["breaks"] > 1000
