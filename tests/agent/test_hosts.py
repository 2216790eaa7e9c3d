"""Programs that are hard to live in do the same wrapped and bare."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper

PROGRAM = Path(__file__).parent / "programs" / "hosts.c"
CASES = re.findall(r'\{"([a-z-]+)",', PROGRAM.read_text())

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.fixture
def program(compile_c: Callable[..., Path]) -> Path:
    return compile_c(PROGRAM, "-Inative", "-pthread")


@pytest.mark.parametrize("case", CASES)
def test_program_does_what_it_does_bare(wrapped: Wrapper, bare: Wrapper, program: Path, case: str) -> None:
    assert wrapped.check(program, case) == bare.check(program, case)
