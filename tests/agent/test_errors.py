"""Every hooked call answers as the unhooked one does, to good, odd and bad arguments."""

from collections.abc import Callable
from pathlib import Path

import pytest
from agent.conftest import Wrapper

PROGRAM = Path(__file__).parent / "programs" / "errors.c"

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.mark.parametrize(
    "case",
    ["mappings", "remaps", "protections", "locking-everything", "advices", "others", "odd-ioctl", "transfers"],
)
def test_answers_are_those_of_a_bare_process(
    wrapped: Wrapper, bare: Wrapper, compile_c: Callable[..., Path], case: str
) -> None:
    program = compile_c(PROGRAM, "-Inative", "-Wno-nonnull", "-Wno-stringop-overflow", "-Wno-stringop-overread")
    alone = bare.check(program, case).splitlines()
    assert alone
    with_agent = wrapped.check(program, case).splitlines()
    different = [pair for pair in zip(with_agent, alone, strict=True) if pair[0] != pair[1]]
    assert not different, "\n".join(f"wrapped: {one}\n   bare: {other}" for one, other in different)
