"""The agent's parts by themselves: small programs in C, made of the real sources, under the sanitizers."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

UNITS = Path(__file__).parent / "units"
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)

pytestmark = pytest.mark.require("gcc")


def run_unit(
    compile_c: Callable[..., Path], name: str, sources: tuple[str, ...], sanitizers: tuple[str, ...], *arguments: str
) -> None:
    """Compiles and runs one; it fails by a line on standard error, its own or the sanitizer's."""
    paths = [f"native/agent/{source}.c" for source in sources]
    program = compile_c(UNITS / f"{name}_test.c", *paths, "-Inative", "-pthread", *sanitizers)
    # The thread sanitizer's shadow does not go with the most random of address space layouts.
    command = ["setarch", "-R", str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_runs_against_a_model(compile_c: Callable[..., Path], seed: str) -> None:
    run_unit(compile_c, "runs", ("runs",), ADDRESS, seed)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_marks_against_a_model(compile_c: Callable[..., Path], seed: str) -> None:
    run_unit(compile_c, "marks", ("marks", "layout"), ADDRESS, seed)


def test_layout_from_crafted_smaps(compile_c: Callable[..., Path]) -> None:
    run_unit(compile_c, "layout", ("layout",), ADDRESS)


@pytest.mark.parametrize("sanitizers", [ADDRESS, THREAD], ids=["address", "thread"])
def test_lock(compile_c: Callable[..., Path], sanitizers: tuple[str, ...]) -> None:
    run_unit(compile_c, "lock", ("lock",), sanitizers)


def test_patch(compile_c: Callable[..., Path]) -> None:
    run_unit(compile_c, "patch", (), ADDRESS)
