"""The interfaces for programs that cooperate knowingly, in C and in Python."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import xxhash
from agent.conftest import LIBRARY, REPOSITORY, Wrapper
from support.engine import Engine
from support.users import NOBODY, as_nobody, as_user, listener_of, open_way

import udedup
from udedup.engine.native import lib
from udedup.engine.wire import refusal

PROGRAM = Path(__file__).parent / "programs" / "api.c"
SOCKET_PATH_MAX = 107
"""Bytes (unix(7)), without the NUL."""

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")


@pytest.mark.parametrize("case", ["joins", "no-engine", "refused", "bad-arguments", "pauses", "pauses-among-threads"])
def test_c(bare: Wrapper, compile_c: Callable[..., Path], shared_engine: Engine, tmp_path: Path, case: str) -> None:
    program = compile_c(PROGRAM, "-Inative", "-pthread", str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}")
    socket = tmp_path / "nobody" if case == "no-engine" else shared_engine.socket
    bare.check(program, case, str(socket))


@pytest.fixture
def closed_socket(tmp_path: Path) -> Iterator[Path]:
    """Of root's, which nobody else may connect to, with a path as long as such paths can be."""
    open_way(tmp_path)
    path = tmp_path / ("x" * (SOCKET_PATH_MAX - len(f"{tmp_path}/")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        yield path


def test_c_without_permission(bare: Wrapper, compile_c: Callable[..., Path], closed_socket: Path) -> None:
    program = compile_c(PROGRAM, "-Inative", "-pthread", str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}")
    bare.check(program, "forbidden", str(closed_socket))


def test_c_joins_among_threads(bare: Wrapper, compile_c: Callable[..., Path], shared_engine: Engine) -> None:
    """Other threads are in and out of the functions while these are hooked: many times, as the moment is short."""
    program = compile_c(PROGRAM, "-Inative", "-pthread", str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}")
    for _ in range(15):
        bare.check(program, "joins-among-threads", shared_engine.socket)


def run_python(text: str, *arguments: str | Path, prefix: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    command = [*prefix, sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_python_joins_and_merges(shared_engine: Engine) -> None:
    done = run_python(
        """
import mmap, os, sys, time
import udedup
try:
    udedup.stats()
except udedup.UdedupError as error:
    assert "udedup.join()" in str(error)
else:
    raise SystemExit("stats before join")
try:
    udedup.advise(bytearray(8192))
except udedup.UdedupError as error:
    assert "udedup.join()" in str(error)
else:
    raise SystemExit("advise before join")
udedup.join(sys.argv[1])
udedup.join(sys.argv[1])
content = os.urandom(64 * 4096)
areas = [mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
for area in areas:
    area[:] = content
before = udedup.stats().hints
deadline = time.monotonic() + 30
while udedup.stats().pages_merged < 128:
    for area in areas:
        udedup.advise(area)
    assert time.monotonic() < deadline, udedup.stats()
    time.sleep(0.02)
stats = udedup.stats()
assert stats.merging and stats.reason == "" and stats.runs >= 2 and stats.hints > before, stats
areas[0][0] = content[0] ^ 1
assert areas[0][1:] == content[1:] and areas[1][:] == content
assert udedup.stats().break_pages >= 1
print("fine")
""",
        shared_engine.socket,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_python_without_an_engine(tmp_path: Path) -> None:
    socket = tmp_path / "nobody"
    done = run_python("import sys, udedup\nudedup.join(sys.argv[1])", socket)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"udedup.errors.UdedupError: no engine answers at {socket}; start one with `udedup engine`"
    )


def test_python_refused(shared_engine: Engine) -> None:
    # The root user may have any label; one that is none is refused.
    done = run_python("import sys, udedup\nudedup.join(sys.argv[1], 'x' * 64)", shared_engine.socket)
    assert done.returncode == 1
    assert "joining the engine failed: File name too long" in done.stderr


def test_python_without_permission(closed_socket: Path) -> None:
    done = run_python("import sys, udedup\nudedup.join(sys.argv[1])", closed_socket, prefix=as_nobody())
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"udedup.errors.UdedupError: this process can't join the engine: may not connect to {closed_socket}"
    )


@pytest.mark.parametrize("trusted", [False, True])
def test_engine_of_another_user_in_the_place_of_ones_own(trusted: bool) -> None:
    """Anybody may put a socket where those of users without a directory are: nothing is said to it."""
    path, uid = Path(f"/tmp/udedup-test-{os.getpid()}.sock"), 0x10000 + os.getpid()
    with listener_of(uid if trusted else NOBODY, path) as listener:
        command = [*as_user(uid), sys.executable, "-c", "import sys, udedup\nudedup.join(sys.argv[1])", str(path)]
        joining = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        connection, _ = listener.accept()
        with connection:
            said = connection.recv(1 << 16)
            if said:
                connection.send(refusal(lib.UDD_REFUSED, "it was only asked"))
            _, errors = joining.communicate(timeout=30)
    assert bool(said) is trusted
    reason = "it was only asked" if trusted else f"not this user's: {path}"
    assert errors.splitlines()[-1] == f"udedup.errors.UdedupError: this process can't join the engine: {reason}"


def test_digest_is_xxh3_128(compile_c: Callable[..., Path], tmp_path: Path) -> None:
    sources = sorted((REPOSITORY / "native" / "common").glob("*.c"))
    program = compile_c(PROGRAM.with_name("digest.c"), "-Inative", *sources)
    pages = [bytes(4096), b"\xff" * 4096, *(os.urandom(4096) for _ in range(100))]
    done = subprocess.run([str(program)], input=b"".join(pages), capture_output=True, check=True, timeout=30)
    ways = 3 if "avx2" in Path("/proc/cpuinfo").read_text().split() else 2
    assert done.stdout.decode().split() == [xxhash.xxh3_128_hexdigest(page) for page in pages for _ in range(ways)]


def test_python_pauses(shared_engine: Engine) -> None:
    done = run_python(
        """
import sys, udedup
with udedup.pause():
    udedup.join(sys.argv[1])
assert udedup.stats().merging
try:
    with udedup.pause(), udedup.pause():
        assert not udedup.stats().merging
        raise KeyError
except KeyError:
    assert udedup.stats().merging
print("fine")
""",
        shared_engine.socket,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_the_engine_knows_that_a_program_paused(shared_engine: Engine) -> None:
    text = "import sys, udedup\nudedup.join(sys.argv[1])\nwith udedup.pause():\n    print(flush=True)\n    input()"
    command = [sys.executable, "-c", text, str(shared_engine.socket)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (agent,) = [agent for agent in shared_engine.status()["agents"] if agent["pid"] == process.pid]
        process.communicate("\n")
    assert (agent["merging"], agent["paused"], agent["reason"]) == (False, False, "the program has paused it")


EXAMPLES = """
import doctest, importlib, os, sys
os.environ["UDEDUP_SOCKET"] = sys.argv[1]
import udedup
for name in ("api", "client", "places"):
    module = importlib.import_module(f"udedup.{name}")
    names = {**vars(module), "udedup": udedup, "os": os, "trio": importlib.import_module("trio"), "image": sys.argv[2]}
    print(name, *doctest.testmod(module, globs=names))
"""


@pytest.mark.require("fuse")
def test_examples_of_the_documentation(engine: Engine, tmp_path: Path) -> None:
    """In a process of their own: joining is for life."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(1 << 16))
    done = run_python(EXAMPLES, engine.socket, image)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["api", "0"],
        ["client", "0"],
        ["places", "0"],
    ], done.stdout


def test_each_public_name_has_an_example() -> None:
    """Or is part of what has one: an exception, and what is returned."""
    for name in set(udedup.__all__) - {"UdedupError", "Stats"}:
        text = getattr(udedup, name).__doc__
        assert text is not None
        assert ">>> " in text, name
