"""The engine's C beside the threads it has for company, under sanitizers."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}

pytestmark = pytest.mark.require("gcc")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_engine_among_threads(sanitizer: str, tmp_path: Path) -> None:
    # Those that have no fences: the thread sanitizer can't do with them.
    engine = [NATIVE / "engine" / f"{name}.c" for name in ("store", "numbered", "index", "digest")]
    sources = [*engine, *(NATIVE / "common").glob("*.c")]
    program = tmp_path / "threads"
    build = [
        *("gcc", "-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"),
        *("-Wno-unused-parameter", "-Wno-missing-field-initializers", f"-I{NATIVE}", *SANITIZERS[sanitizer]),
        *(HERE / "units" / "threads_test.c", *sources, "-o", program),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The thread sanitizer's shadow does not go with the most random of address space layouts.
    done = subprocess.run(["setarch", "-R", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
