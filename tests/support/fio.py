"""fio as a judge: it writes a file in some pattern, each block with a checksum, and reads them all back."""

import subprocess
from pathlib import Path
from typing import Final

VERIFY_SECONDS: Final = 60.0


def verify(path: Path, size: int, *, pattern: str, depth: int, direct: bool) -> None:
    """Writes ``size`` bytes of a file as fio's ``--rw=pattern`` does, ``depth`` requests at once, and reads them back.

    Raises AssertionError with what fio says if a block is not what was written.
    """
    job = [
        "fio", "--name=verify", f"--filename={path}", f"--size={size}", "--bs=4k", "--ioengine=libaio",
        f"--rw={pattern}", f"--iodepth={depth}", f"--direct={int(direct)}", f"--randseed={depth}",
        "--allow_file_create=0", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1",
        "--output-format=terse",
    ]  # fmt: skip
    done = subprocess.run(job, capture_output=True, text=True, check=False, timeout=VERIFY_SECONDS)
    assert done.returncode == 0, f"{pattern}, depth {depth}, direct {direct}: {done.stdout}\n{done.stderr}"
