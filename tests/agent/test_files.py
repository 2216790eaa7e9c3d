"""Mappings of images on the mount merge, and stay to the program what they were: the file."""

import random
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

import pytest
from agent.conftest import Wrapper, lasting_engine
from support.engine import Engine, read_line, start_engine
from support.ledger import Ledger

PROGRAM = Path(__file__).parent / "programs" / "files.c"
PAGE = 4096
PAGES = 96
PATIENCE = 20.0

CASES = (
    "merges",
    "merges-with-anonymous",
    "goes-with-its-mappings",
    "written",
    "inaccessible",
    "discarded",
    "mapped-over",
    "moved",
    "mapped-twice",
    "forked",
    "written-by-a-debugger",
    "locked",
)
TYPES = ("private", "shared")

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "fuse", "root")


@pytest.fixture
def program(compile_c: Callable[..., Path]) -> Path:
    return compile_c(PROGRAM, "-Inative")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two with the same pages, the second behind one of its own."""
    folder = tmp_path_factory.mktemp("images")
    pages = random.Random(7).randbytes(PAGES * PAGE)
    files = {"a.img": folder / "a", "b.img": folder / "b"}
    files["a.img"].write_bytes(pages)
    files["b.img"].write_bytes(bytes(range(256)) * (PAGE // 256) + pages)
    return files


@pytest.fixture(scope="module")
def mounting_engine(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, images: dict[str, Path]
) -> Iterator[Engine]:
    """One for all tests that leave it alone."""
    with lasting_engine(tmp_path_factory.mktemp("engine"), pytestconfig, "files", images=images) as engine:
        yield engine


def mounted(engine: Engine) -> tuple[Path, Path]:
    """The images as programs see them."""
    assert engine.mount is not None
    return engine.mount / "a.img", engine.mount / "b.img"


def start_merged(
    engine: Engine, ledger: Ledger, program: Path, case: str, kind: str
) -> "tuple[subprocess.Popen[str], IO[str], IO[str]]":
    """Starts a case that talks with its test; returns it, its input and its output once all it maps is merged."""
    process = Wrapper(engine, ledger).start(
        program, case, kind, *mounted(engine), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert read_line(process.stdout, PATIENCE) == "merged\n"
    return process, process.stdin, process.stdout


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_merged_files(mounting_engine: Engine, ledger: Ledger, program: Path, case: str, kind: str) -> None:
    Wrapper(mounting_engine, ledger).check(
        program, case, kind, *mounted(mounting_engine), extra={"UDEDUP_TEST_DELAYS": "1"}
    )


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_expectations_hold_without_an_agent(
    bare: Wrapper, images: dict[str, Path], program: Path, case: str, kind: str, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in images]
    for path, image in zip(paths, images.values(), strict=True):
        path.hardlink_to(image)
    bare.check(program, case, kind, *paths)


@pytest.mark.parametrize("kind", TYPES)
def test_pages_can_be_read_without_an_engine(
    images: dict[str, Path], tmp_path: Path, ledger: Ledger, program: Path, kind: str
) -> None:
    engine = start_engine(tmp_path, ledger, "--sleep-millisecs", "0", images=images)
    process, stdin, stdout = start_merged(engine, ledger, program, "without-an-engine", kind)
    engine.stop(signal.SIGKILL)
    assert engine.mount is not None
    subprocess.run(["umount", "--lazy", "--no-canonicalize", engine.mount], check=True)
    print("", file=stdin, flush=True)
    assert read_line(stdout, PATIENCE) == "right\n"
    # Its successor serves another mount, and has its pages kept as they are.
    successor = start_engine(tmp_path, ledger, "--sleep-millisecs", "0", images=images)
    successor.wait_until("adopted", lambda status: [agent["pid"] for agent in status["agents"]] == [process.pid])
    successor.command("unmerge")
    print("", file=stdin, flush=True)
    assert process.wait(PATIENCE) == 0
    assert successor.stop() == 0


def test_unmerged_they_are_the_file_again(
    images: dict[str, Path], tmp_path: Path, ledger: Ledger, program: Path
) -> None:
    engine = start_engine(tmp_path, ledger, "--sleep-millisecs", "0", images=images)
    process, stdin, stdout = start_merged(engine, ledger, program, "without-an-engine", "private")
    engine.command("unmerge", str(process.pid))
    assert "udedup-store" not in "".join(
        line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if " r--p " in line
    )
    print("", file=stdin, flush=True)
    assert read_line(stdout, PATIENCE) == "right\n"
    engine.command("unmerge", "--resume", str(process.pid))
    print("", file=stdin, flush=True)
    assert process.wait(PATIENCE) == 0
    assert engine.stop() == 0


def test_faults_are_hints_with_addresses(
    images: dict[str, Path], tmp_path: Path, ledger: Ledger, program: Path
) -> None:
    """The linear scan hardly ever has a turn."""
    pace = ("--hint-ratio", "100:1", "--sleep-millisecs", "300", "--pages-to-scan", "200")
    engine = start_engine(tmp_path, ledger, *pace, images=images)
    process, stdin, _ = start_merged(engine, ledger, program, "faults", "private")
    engine.wait_until("merged by hints", lambda status: status["hints"]["merged"] >= PAGES)
    print("", file=stdin, flush=True)
    assert process.wait(PATIENCE) == 0
    assert engine.stop() == 0


def test_an_image_that_changes_is_the_file_again(
    images: dict[str, Path], tmp_path: Path, ledger: Ledger, program: Path
) -> None:
    files = {name: tmp_path / name for name in images}
    for name, path in files.items():
        path.write_bytes(images[name].read_bytes())
    engine = start_engine(tmp_path, ledger, "--sleep-millisecs", "0", images=files)
    process, stdin, stdout = start_merged(engine, ledger, program, "changes", "shared")
    content = bytearray(files["a.img"].read_bytes())
    content[5 * PAGE : 6 * PAGE] = bytes(range(16)) * (PAGE // 16)
    with files["a.img"].open("r+b") as file:
        file.write(content)
    print("", file=stdin, flush=True)
    assert read_line(stdout, PATIENCE) == "the file again\n"
    assert process.wait(PATIENCE) == 0
    assert engine.stop() == 0


def test_libraries_loaded_at_the_start(compile_c: Callable[..., Path], tmp_path: Path, ledger: Ledger) -> None:
    """Called all the while, by threads that run in what is being replaced."""
    source = PROGRAM.with_name("library.c")
    library = compile_c(source, "-DLIBRARY", "-shared", "-fPIC")
    program = compile_c(source, "-Inative", "-pthread")
    engine = start_engine(
        tmp_path, ledger, "--sleep-millisecs", "0", images={"libone.so": library, "libtwo.so": library}
    )
    assert engine.mount is not None
    libraries = [str(engine.mount / name) for name in ("libone.so", "libtwo.so")]
    wrapper = Wrapper(engine, ledger)
    preload = f"{wrapper.environment()['LD_PRELOAD']} {' '.join(libraries)}"
    wrapper.check(program, *libraries, extra={"LD_PRELOAD": preload, "UDEDUP_TEST_DELAYS": "1"})
    assert engine.stop() == 0


def test_python_and_sqlite(images: dict[str, Path], tmp_path: Path, ledger: Ledger) -> None:
    database = tmp_path / "things.db"
    with closing(sqlite3.connect(database)) as connection:
        draw = random.Random(3)
        connection.execute("CREATE TABLE things (number INTEGER, text TEXT)")
        rows = [(i, draw.randbytes(200).hex()) for i in range(1000)]
        connection.executemany("INSERT INTO things VALUES (?, ?)", rows)
        connection.commit()
    copies = {"one.db": database, "two.db": database}
    engine = start_engine(tmp_path, ledger, "--sleep-millisecs", "0", images=images | copies)
    assert engine.mount is not None
    paths = [engine.mount / name for name in (*images, *copies)]
    Wrapper(engine, ledger).check("/usr/bin/python3", PROGRAM.with_name("mapped.py"), *paths)
    assert engine.stop() == 0
