"""Memory that devices, the program's own userfaultfd or huge pages hold on to merges rightly or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper

PROGRAM = Path(__file__).parent / "programs" / "device.c"
SKIPPED = 77
"""Status of a case that this machine can't run."""

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.mark.parametrize("case", ["registered-buffer", "direct-read", "own-userfaultfd", "huge-pages"])
def test_held_memory(wrapped: Wrapper, compile_c: Callable[..., Path], tmp_path: Path, case: str) -> None:
    program = compile_c(PROGRAM, "-Inative", "-pthread")
    done = wrapped.run(program, case, extra={"DIRECT_FILE": str(tmp_path / "direct")})
    if done.returncode == SKIPPED:
        pytest.skip("the kernel or this file system does not offer it")
    assert done.returncode == 0, done.stderr
