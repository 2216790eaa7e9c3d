"""Processes, threads, signals, descriptors and limits: a wrapped program is as it would be without the agent."""

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper

PROGRAM = Path(__file__).parent / "programs" / "process.c"
CASES = (
    "cloned",
    "written-by-a-debugger",
    "cancelled-while-blocked",
    "every-cancellation-point",
    "cancelled-among-hooks",
    "fork-handlers-set-the-mask",
    "only-thread-cancels-itself",
    "main-thread-exits",
    "handler-maps-while-main-unmaps",
    "handler-at-every-instruction",
    "signals-wait-where-they-have-handlers",
    "first-handler-among-hooks",
    "signals-interrupt",
    "pipe-ends-at-once",
    "no-descriptor-free",
    "no-descriptor-free-mremap",
    "drops-privileges",
    "unshares-mounts",
    "unshares-much",
    "unshares-users",
    "enters-mount-namespace",
)
NEED_MERGING = (
    "child-keeps-pages-merged",
    "child-before-its-agent",
    "child-joins-and-merges",
    "shared-with-a-child-then-merged",
    "single-threaded-to-libc",
    "other-programs",
    "every-transfer-is-a-hint",
)
LIMITS = {
    "as": (resource.RLIMIT_AS, 192 << 20),
    "small-as": (resource.RLIMIT_AS, 24 << 20),
    "nofile": (resource.RLIMIT_NOFILE, 4),
    "fsize": (resource.RLIMIT_FSIZE, 0),
    "data": (resource.RLIMIT_DATA, 8 << 20),
    "memlock": (resource.RLIMIT_MEMLOCK, 0),
    "core": (resource.RLIMIT_CORE, 0),
}

DIFFERENT = {"written-by-a-debugger", "unshares-users"}
"""Known differences: what the README lists among the limits."""

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.fixture
def program(compile_c: Callable[..., Path]) -> Path:
    return compile_c(PROGRAM, "-Inative", "-pthread")


@pytest.mark.parametrize("case", CASES + NEED_MERGING)
def test_wrapped_process(wrapped: Wrapper, program: Path, case: str) -> None:
    wrapped.check(program, case)


@pytest.mark.parametrize("case", [case for case in CASES if case not in DIFFERENT])
def test_expectations_hold_without_an_agent(bare: Wrapper, program: Path, case: str) -> None:
    bare.check(program, case)


def test_descriptors_are_those_of_a_bare_process(wrapped: Wrapper, bare: Wrapper, program: Path) -> None:
    alone = bare.check(program, "print-descriptors")
    assert "next" in alone
    assert wrapped.check(program, "print-descriptors") == alone


@pytest.mark.parametrize("limit", LIMITS)
def test_program_does_not_notice_limits(wrapped: Wrapper, bare: Wrapper, program: Path, limit: str) -> None:
    number, value = LIMITS[limit]

    def set_limit() -> None:
        resource.setrlimit(number, (value, value))

    bare.check(program, "works-under-limits", preexec_fn=set_limit)
    wrapped.check(program, "works-under-limits", preexec_fn=set_limit)


def test_standard_descriptors_may_be_closed(wrapped: Wrapper, program: Path) -> None:
    def close_all() -> None:
        os.closerange(0, 3)

    process = wrapped.start(program, "standard-descriptors-closed", preexec_fn=close_all)
    try:
        status = process.wait(45)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert status == 0


def test_program_that_cannot_reach_an_engine(wrapped: Wrapper, program: Path, tmp_path: Path) -> None:
    wrapped.check(program, "works-under-limits", extra={"UDEDUP_SOCKET": str(tmp_path / "nobody")})
    wrapped.check(program, "works-under-limits", extra={"UDEDUP_SOCKET": "/" + "x" * 200})
