"""Mappings of images under torture: nobody sees a wrong byte while they are merged and given back."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "mapped" / "run"
SECONDS = 12
GRACE_SECONDS = 120

pytestmark = [pytest.mark.require("gcc", "userfaultfd-move", "fuse"), pytest.mark.timeout(SECONDS + GRACE_SECONDS + 30)]


def test_no_byte_of_an_image_is_wrong() -> None:
    command = [sys.executable, str(RUN), f"--seconds={SECONDS}", "--no-threshold"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + GRACE_SECONDS, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
