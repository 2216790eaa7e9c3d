"""Mappings of images under torture: nobody sees a wrong byte while they are merged and given back."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

MAPPED = Path(__file__).parent / "mapped"
SECONDS = 12
GRACE_SECONDS = 120
PAGE = 4096
PAGES = 200

pytestmark = [pytest.mark.require("gcc"), pytest.mark.timeout(SECONDS + GRACE_SECONDS + 30)]


def test_a_byte_that_changes_is_noticed(tmp_path: Path) -> None:
    """In the file itself, without an agent: the threads that read all the while see it."""
    program = tmp_path / "mapped"
    subprocess.run(["gcc", "-D_GNU_SOURCE", "-O2", "-pthread", "-o", program, MAPPED / "mapped.c"], check=True)
    images = [tmp_path / "1.img", tmp_path / "2.img"]
    for image in images:
        image.write_bytes(bytes(range(256)) * (PAGES * PAGE // 256))
    with subprocess.Popen([program, "1", "60", *images], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(1)
        assert process.poll() is None
        with images[0].open("r+b") as file:
            file.seek(7 * PAGE + 100)
            file.write(b"\xff")
        _, errors = process.communicate(timeout=GRACE_SECONDS)
    assert process.returncode == 1
    assert b"wrong byte" in errors or b"not so: memcmp" in errors


@pytest.mark.require("userfaultfd-move", "fuse")
def test_no_byte_of_an_image_is_wrong() -> None:
    command = [sys.executable, str(MAPPED / "run"), f"--seconds={SECONDS}", "--no-threshold"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + GRACE_SECONDS, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
