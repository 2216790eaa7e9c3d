"""What a program does to merged memory has the effect that it would have on memory of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper

PROGRAM = Path(__file__).parent / "programs" / "memory.c"
NEED_MERGING = {"write-keeps-the-rest", "written-by-the-kernel", "raw-dontneed", "free", "mergeable"}
"""Cases that speak of the merging itself; all others must hold without an agent, too."""

CASES = (
    "write-keeps-the-rest",
    "written-by-the-kernel",
    "dontneed",
    "free",
    "dontneed-across-a-hole",
    "raw-dontneed",
    "unmapped",
    "mapped-over",
    "read-only",
    "read-only-up-to-a-hole",
    "inaccessible",
    "executable",
    "moved-by-growing",
    "grown-in-place",
    "shrunk",
    "moved-onto-merged",
    "moved-and-kept-mapped",
    "kept-mapped-all-the-while",
    "heap-shrinks",
    "locked",
    "attributes",
    "mergeable",
    "wiped-on-fork",
    "own-stack",
)

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.fixture
def program(compile_c: Callable[..., Path]) -> Path:
    return compile_c(PROGRAM, "-Inative", "-pthread")


@pytest.mark.parametrize("layout", ["whole", "cut"])
@pytest.mark.parametrize("case", CASES)
def test_merged_memory(wrapped: Wrapper, program: Path, case: str, layout: str) -> None:
    wrapped.check(program, case, layout)


@pytest.mark.parametrize("case", CASES)
def test_merged_memory_with_quiet_breaks(wrapped: Wrapper, program: Path, case: str) -> None:
    """Where there is hardly a page that is not merged."""
    wrapped.check(program, case, "whole", extra={"UDEDUP_QUIET_BREAKS": "1"})


@pytest.mark.parametrize("layout", ["whole", "cut"])
def test_memory_is_given_to_ksm_on_request(wrapped: Wrapper, program: Path, layout: str) -> None:
    wrapped.check(program, "mergeable", layout, extra={"UDEDUP_KEEP_KSM": "1"})


@pytest.mark.parametrize("case", [case for case in CASES if case not in NEED_MERGING])
def test_expectations_hold_without_an_agent(bare: Wrapper, program: Path, case: str) -> None:
    bare.check(program, case, "whole")
