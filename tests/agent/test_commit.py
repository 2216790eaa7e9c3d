"""No page is lost when the kernel gives no more memory: vm.overcommit_memory=2, and limits a process sets itself."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent.conftest import Wrapper

CASES = ("moves-to-free-addresses", "writes", "calls", "limited-addresses", "limited-data")
PROGRAM = Path(__file__).parent / "programs" / "commit.c"
SETTINGS = Path("/proc/sys/vm")
LIMIT_KB = 3 << 29
"""1.5 TiB, which no other process notices."""

RESERVE_KB = 1 << 32
"""For users: a process may not have what is left below the limit, up to a 32nd of the addresses that it has mapped."""

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """For the program to switch on; all is put back, whatever becomes of it."""
    # In the order of putting back: first what puts the limit in force, or all processes would feel it for a moment.
    names = ("overcommit_memory", "overcommit_kbytes", "overcommit_ratio", "user_reserve_kbytes")
    before = {name: (SETTINGS / name).read_text().strip() for name in names}
    (SETTINGS / "overcommit_kbytes").write_text(str(LIMIT_KB))
    (SETTINGS / "user_reserve_kbytes").write_text(str(RESERVE_KB))
    yield
    for name, value in before.items():
        # Of the two that set the limit, one is 0, and setting the other makes it so.
        if not (name in ("overcommit_kbytes", "overcommit_ratio") and value == "0"):
            (SETTINGS / name).write_text(value)


@pytest.fixture
def program(compile_c: Callable[..., Path]) -> Path:
    return compile_c(PROGRAM, "-Inative")


@pytest.mark.parametrize("case", CASES)
def test_merged_memory_at_the_limit(wrapped: Wrapper, program: Path, case: str) -> None:
    wrapped.check(program, case)


@pytest.mark.parametrize("case", CASES)
def test_expectations_hold_without_an_agent(bare: Wrapper, program: Path, case: str) -> None:
    bare.check(program, case)
