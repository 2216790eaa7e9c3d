"""However many pages break, by whatever help: no write is lost, and every break is known in the end."""

from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper

PROGRAM = Path(__file__).parent / "programs" / "breaks.c"
SKIPPED = 77
"""Status of a case that this machine can't run."""

STORMS = ("counted", "discarded", "forked", "moved", "executable", "pinned", "written-by-threads")
IN_ORDER = ("scattered-in-the-store", "unlike-neighbours", "replaced-past-the-hooks")

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.fixture
def program(compile_c: Callable[..., Path]) -> Path:
    return compile_c(PROGRAM, "-Inative", "-pthread")


@pytest.mark.parametrize("layout", ["whole", "cut"])
@pytest.mark.parametrize("case", STORMS)
def test_storm_of_lone_writes(wrapped: Wrapper, program: Path, case: str, layout: str) -> None:
    done = wrapped.run(program, case, layout)
    if done.returncode == SKIPPED:
        pytest.skip("the kernel does not offer it")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", IN_ORDER)
def test_overwriting_in_order(wrapped: Wrapper, program: Path, case: str) -> None:
    wrapped.check(program, case)
