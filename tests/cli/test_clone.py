"""Writable clones, through a real mount: what programs write is there, in a file that QEMU reads, and errors arrive."""

import errno
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.engine import UDEDUP, Engine, udedup
from support.fio import verify
from support.ledger import Ledger
from support.tmpfs import mount_tmpfs
from support.users import as_nobody, open_way

from udedup.fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, punch_hole

pytestmark = pytest.mark.require("root", "fuse", "qemu-utils")

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4 * KIB
SIZE = 8 * MIB


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def engine(engine_factory: Callable[..., Engine]) -> Engine:
    return engine_factory()


@pytest.fixture
def small(tmp_path: Path, ledger: Ledger) -> Path:
    """An empty file system with little room."""
    return mount_tmpfs(tmp_path / "small", "size=3M", ledger)


def clone(engine: Engine, base: Path, name: str, *options: str | Path) -> Path:
    """Makes one and returns its path in the mount."""
    done = engine.command("mount", "--clone", base, "--to", name, *options)
    assert (done.returncode, done.stderr) == (0, "")
    return Path(done.stdout.strip())


def command(engine: Engine, *argv: str) -> str:
    """Runs ``udedup clone …``, which succeeds, and returns what it prints."""
    action, *rest = argv
    done = clone_command(engine, action, *rest)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def clone_command(engine: Engine, action: str, *rest: str) -> "subprocess.CompletedProcess[str]":
    """Runs ``udedup clone …``."""
    return udedup("clone", action, "--socket", engine.socket, *rest)


def listed(engine: Engine) -> dict[str, dict[str, Any]]:
    """All clones, by name."""
    return {entry["name"]: entry for entry in json.loads(command(engine, "list", "--json"))}


def refused(engine: Engine, *argv: str) -> str:
    """Runs ``udedup clone …``, which fails with one line, and returns that."""
    action, *rest = argv
    done = clone_command(engine, action, *rest)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_direct(path: Path, offset: int, size: int) -> bytes:
    """Past the kernel's page cache."""
    with opened(path, os.O_RDONLY | os.O_DIRECT) as descriptor, mmap.mmap(-1, size) as buffer:
        done = 0
        while done < size:
            with memoryview(buffer) as view, view[done:] as rest:
                done += os.preadv(descriptor, [rest], offset + done)
        return buffer[:]


def converted(overlay: Path) -> bytes:
    """What QEMU finds in an overlay, which is in order."""
    subprocess.run(["qemu-img", "check", "-q", overlay], check=True)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy.raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, copy], check=True)
        return copy.read_bytes()


def test_list(engine: Engine, base: Path) -> None:
    assert command(engine, "list") == ""
    path = clone(engine, base, "vm1")
    heads, line = (text.split("\t") for text in command(engine, "list").splitlines())
    assert heads == ["clone", "shown at", "room", "base", "overlay", "note"]
    assert (line[0], line[1], line[3]) == ("vm1", str(path), str(base))
    assert " ".join(udedup("clone", "list", "--help").stdout.split()).count("how much room each takes") == 1


def test_others_are_told_what_they_may_not(engine_factory: Callable[..., Engine]) -> None:
    engine = engine_factory("--socket-mode", "666")
    open_way(engine.socket.parent)
    for what, words in (("listing clones", ("list",)), ("making or changing clones", ("discard", "vm1"))):
        command = [*as_nobody(), *UDEDUP, "clone", *words, "--socket", str(engine.socket)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"udedup: {what} is for root and the engine's user only, you are uid 65534\n"


def test_what_is_written_is_there(engine: Engine, base: Path) -> None:
    """For other descriptors at once, past the page cache too, and for QEMU once it is synced; the base stays."""
    path, before = clone(engine, base, "vm1"), base.read_bytes()
    expected = bytearray(before)
    draw = random.Random(2)
    assert path.read_bytes() == before
    with opened(path) as writer, opened(path, os.O_RDONLY) as reader:
        for _ in range(300):
            size = draw.choice((1, 512, BLOCK, 5000, 64 * KIB, 300 * KIB))
            offset = draw.randrange(SIZE - size)
            if draw.random() < 0.5:
                offset -= offset % BLOCK
            data = bytes(size) if draw.random() < 0.2 else draw.randbytes(size)
            assert os.pwrite(writer, data, offset) == size
            expected[offset : offset + size] = data
            assert os.pread(reader, size, offset) == data
            start = offset - offset % BLOCK
            span = min(-(-(offset + size) // BLOCK) * BLOCK, SIZE) - start
            assert read_direct(path, start, span) == expected[start : start + span]
        os.fsync(writer)
        assert path.read_bytes() == expected
    assert read_direct(path, 0, SIZE) == expected
    assert base.read_bytes() == before
    overlay = Path(listed(engine)["vm1"]["overlay"])
    assert engine.command("umount", "vm1.raw").returncode == 0
    assert converted(overlay) == expected
    assert path.name not in os.listdir(path.parent)  # noqa: PTH208
    command(engine, "show", "vm1")
    assert path.read_bytes() == expected
    assert engine.stop() == 0
    assert engine.log.read_text() == ""


def test_direct_and_buffered_writers_see_each_other(engine: Engine, base: Path) -> None:
    """What the kernel has cached of the clone is what was written last, whichever way."""
    path = clone(engine, base, "vm1")
    with (
        opened(path) as buffered,
        opened(path, os.O_RDWR | os.O_DIRECT) as direct,
        opened(path, os.O_RDONLY) as reader,
        mmap.mmap(-1, BLOCK) as block,
        mmap.mmap(reader, SIZE, prot=mmap.PROT_READ) as mapped,
    ):
        for number in range(100):
            offset = number % 7 * BLOCK
            assert mapped[offset : offset + BLOCK] == os.pread(reader, BLOCK, offset)
            block[:] = bytes([number + 1]) * BLOCK
            os.pwrite(direct if number % 2 else buffered, block, offset)
            assert os.pread(reader, BLOCK, offset) == block[:]
            assert mapped[offset : offset + BLOCK] == block[:]
            assert read_direct(path, offset, BLOCK) == block[:]


def test_writes_to_a_shared_mapping(engine: Engine, base: Path) -> None:
    path = clone(engine, base, "vm1")
    with opened(path) as descriptor, mmap.mmap(descriptor, SIZE) as mapped:
        mapped[100:200] = bytes(range(100))
        mapped.flush()
        assert read_direct(path, 0, BLOCK)[100:200] == bytes(range(100))


def test_it_is_a_disk(engine: Engine, base: Path) -> None:
    """Its size stays, what lies beyond its end has no room, and nothing else about it can be changed."""
    path, before = clone(engine, base, "vm1"), base.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(PermissionError):
        os.truncate(path, BLOCK)
    with pytest.raises(PermissionError):
        path.chmod(0o400)
    with pytest.raises(OSError, match="Read-only file system"):
        path.unlink()
    with opened(path) as descriptor:
        os.truncate(descriptor, SIZE)
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(descriptor, b"x", SIZE)
        # Room can't be set aside, and a disk doesn't grow.
        for mode, message in ((0, "not supported"), (KEEP_SIZE, "not supported"), (ZERO_RANGE, "No space left")):
            with pytest.raises(OSError, match=message):
                fallocate(descriptor, mode, SIZE - BLOCK, 2 * BLOCK)
    with opened(path, os.O_WRONLY | os.O_TRUNC) as descriptor:
        os.pwrite(descriptor, b"first", 0)
    assert path.stat().st_size == SIZE
    assert path.read_bytes() == b"first" + before[5:]


def wait_for_room(engine: Engine, descriptor: int, most: int) -> None:
    """Until vm1 takes no more than so many bytes: what somebody may still be reading goes with a later sync."""
    deadline = time.monotonic() + 20
    while True:
        os.fsync(descriptor)
        room = listed(engine)["vm1"]["room"]
        if room <= most:
            return
        assert time.monotonic() < deadline, f"{room} bytes, and {most} wanted"


def test_zeros_free_room(engine: Engine, base: Path) -> None:
    path = clone(engine, base, "vm1")
    with opened(path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, random.Random(3).randbytes(4 * MIB), 0)
        os.fsync(descriptor)
        full = listed(engine)["vm1"]["room"]
        assert full >= 4 * MIB
        os.pwrite(descriptor, bytes(4 * MIB), 0)
        # Its tables may have grown meanwhile.
        wait_for_room(engine, descriptor, full - 4 * MIB + 256 * KIB)
    assert path.read_bytes() == bytes(4 * MIB) + base.read_bytes()[4 * MIB :]


@pytest.mark.parametrize("mode", [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_holes_free_room(engine: Engine, base: Path, mode: int) -> None:
    path = clone(engine, base, "vm1")
    with opened(path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, random.Random(3).randbytes(4 * MIB), 0)
        os.fsync(descriptor)
        full = listed(engine)["vm1"]["room"]
        fallocate(descriptor, mode, 0, 4 * MIB)
        wait_for_room(engine, descriptor, full - 4 * MIB + 256 * KIB)
    # Of the base, too, nothing shows there.
    assert path.read_bytes() == bytes(4 * MIB) + base.read_bytes()[4 * MIB :]
    assert engine.stop() == 0
    assert engine.log.read_text() == ""


def test_holes_are_zero_for_everybody(engine: Engine, base: Path) -> None:
    """At once, of any size and place, for who reads buffered, directly or in a mapping, and for QEMU in the end."""
    path, expected = clone(engine, base, "vm1"), bytearray(base.read_bytes())
    draw = random.Random(5)
    with opened(path) as writer, opened(path) as reader, mmap.mmap(reader, SIZE, prot=mmap.PROT_READ) as mapped:
        for _ in range(200):
            length = draw.choice((1, 512, BLOCK, 5000, 64 * KIB, 300 * KIB))
            offset = draw.randrange(SIZE - length + 1)
            if draw.random() < 0.5:
                offset -= offset % BLOCK
            if draw.random() < 0.3:
                data = draw.randbytes(length)
                os.pwrite(writer, data, offset)
            else:
                data = bytes(length)
                assert mapped[offset : offset + length] == expected[offset : offset + length]
                fallocate(writer, draw.choice((PUNCH_HOLE, ZERO_RANGE)) | KEEP_SIZE, offset, length)
            expected[offset : offset + length] = data
            around = slice(max(offset - BLOCK, 0), offset + length + BLOCK)
            assert os.pread(reader, around.stop - around.start, around.start) == expected[around]
            assert mapped[around] == expected[around]
            start = offset - offset % BLOCK
            span = min(-(-(offset + length) // BLOCK) * BLOCK, SIZE) - start
            assert read_direct(path, start, span) == expected[start : start + span]
        # What lies beyond the end is nobody's.
        punch_hole(writer, SIZE - 100, 1 << 40)
        expected[-100:] = bytes(100)
        punch_hole(writer, SIZE + BLOCK, BLOCK)
    overlay = Path(listed(engine)["vm1"]["overlay"])
    assert path.read_bytes() == expected
    assert engine.command("umount", path).returncode == 0
    assert converted(overlay) == expected


def test_a_huge_disk_is_discarded_at_once(engine: Engine, tmp_path: Path) -> None:
    """It takes room for what it hides only: a guest discards all of its disk when it makes a file system."""
    size, middle = (16 << 40) - BLOCK, 8 << 40
    base = tmp_path / "huge.raw"
    with base.open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"first", 0)
        os.pwrite(file.fileno(), b"last", size - BLOCK)
    path = clone(engine, base, "vm1")
    with opened(path) as descriptor:
        os.pwrite(descriptor, b"middle" * MIB, middle)
        os.fsync(descriptor)
        before = listed(engine)["vm1"]["room"]
        punch_hole(descriptor, 0, size)
        os.fsync(descriptor)
        for place in (0, middle, size - BLOCK):
            assert os.pread(descriptor, BLOCK, place) == bytes(BLOCK)
        wait_for_room(engine, descriptor, before - 5 * MIB)


def test_discards_of_qemu_free_room(engine: Engine, base: Path) -> None:
    path = clone(engine, base, "vm1")
    commands = ("write -P 7 0 4M", "discard 0 1M", "write -z 1M 1M", "write -zu 2M 1M", "flush")
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", "-d", "unmap", *words, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with opened(path) as descriptor:
        wait_for_room(engine, descriptor, 2 * MIB)
    assert path.read_bytes() == bytes(3 * MIB) + b"\7" * MIB + base.read_bytes()[4 * MIB :]


@pytest.mark.parametrize("direct", [False, True])
def test_no_room(engine: Engine, base: Path, small: Path, *, direct: bool) -> None:
    """The writer gets ENOSPC, what was written before is there, what failed is old or new, and it goes on with room."""
    overlay = small / "vm1.qcow2"
    path, expected = clone(engine, base, "vm1", "--overlay", overlay), bytearray(base.read_bytes())
    draw = random.Random(4)
    failed = number = 0
    with opened(path, os.O_RDWR | (os.O_DIRECT if direct else 0)) as descriptor, mmap.mmap(-1, 16 * BLOCK) as buffer:
        for offset in range(0, SIZE, len(buffer)):
            buffer[:] = draw.randbytes(len(buffer))
            try:
                assert os.pwrite(descriptor, buffer, offset) == len(buffer)
            except OSError as error:
                failed, number = offset, error.errno
                break
            expected[offset : offset + len(buffer)] = buffer
        assert number == errno.ENOSPC
        assert failed >= MIB
        for start in range(0, len(buffer), BLOCK):
            block = read_direct(path, failed + start, BLOCK)
            assert block in (buffer[start : start + BLOCK], expected[failed + start : failed + start + BLOCK])
        # What is not new can still be written, and is.
        buffer[:] = draw.randbytes(len(buffer))
        assert os.pwrite(descriptor, buffer, 0) == len(buffer)
        expected[: len(buffer)] = buffer
        os.fsync(descriptor)
        assert path.read_bytes()[:failed] == expected[:failed]
        subprocess.run(["mount", "-o", "remount,size=16M", small], check=True)
        for offset in range(failed, SIZE, len(buffer)):
            buffer[:] = draw.randbytes(len(buffer))
            assert os.pwrite(descriptor, buffer, offset) == len(buffer)
            expected[offset : offset + len(buffer)] = buffer
        os.fsync(descriptor)
    assert path.read_bytes() == expected
    assert engine.command("umount", path.name).returncode == 0
    assert converted(overlay) == expected
    assert engine.log.read_text().count("can't grow") == 1


def test_readers_see_no_stale_block(engine: Engine, base: Path) -> None:
    """Blocks are written in ascending versions; who reads, by whatever way, never sees an older one than before.

    Who reads a block while it is written may see a part of either, as in any file: reads take no lock.
    """
    path = clone(engine, base, "vm1")
    blocks, rounds = 16, 150
    begun, written = [0] * blocks, [0] * blocks
    with opened(path) as descriptor:
        os.pwrite(descriptor, bytes(blocks * BLOCK), 0)
    wrong: list[str] = []
    done = threading.Event()

    def read(*, direct: bool) -> None:
        draw = random.Random(direct)
        seen = [0] * blocks
        with opened(path, os.O_RDONLY) as descriptor:
            while not done.is_set() and not wrong:
                block = draw.randrange(blocks)
                least = max(written[block], seen[block])
                content = (
                    read_direct(path, block * BLOCK, BLOCK) if direct else os.pread(descriptor, BLOCK, block * BLOCK)
                )
                versions = set(memoryview(content).cast("Q"))
                if min(versions) < least or max(versions) > begun[block]:
                    wrong.append(f"block {block} has {sorted(versions)}, not of {least} to {begun[block]}")
                seen[block] = max(least, min(versions))

    threads = [threading.Thread(target=read, kwargs={"direct": direct}) for direct in (False, True)]
    for thread in threads:
        thread.start()
    try:
        with (
            opened(path) as buffered,
            opened(path, os.O_RDWR | os.O_DIRECT) as direct,
            mmap.mmap(-1, BLOCK) as data,
        ):
            for version in range(1, rounds):
                for block in range(blocks):
                    data[:] = version.to_bytes(8, sys.byteorder) * (BLOCK // 8)
                    begun[block] = version
                    os.pwrite(buffered if (version + block) % 2 else direct, data, block * BLOCK)
                    written[block] = version
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []


READER = """
import mmap, sys
file = open(sys.argv[1], "rb")
shared = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
for line in sys.stdin:
    start = int(line) * 4096
    print(*{view[at : at + 8].hex() for view in (shared, private) for at in range(start, start + 4096, 8)}, flush=True)
"""


@pytest.mark.require("userfaultfd-move")
def test_mappings_of_wrapped_readers_are_not_stale(engine_factory: Callable[..., Engine], base: Path) -> None:
    """Also where what they map is the same in many blocks, and two of them, under an engine that merges all it can."""
    engine = engine_factory("--sleep-millisecs", "0")
    path = clone(engine, base, "vm1")
    blocks, rounds = 64, 8
    wrapped = [
        sys.executable,
        "-m",
        "udedup",
        "run",
        "--socket",
        engine.socket,
        "--",
        sys.executable,
        "-c",
        READER,
        path,
    ]
    draw = random.Random(3)
    with ExitStack() as stack:
        buffered = stack.enter_context(opened(path))
        direct = stack.enter_context(opened(path, os.O_RDWR | os.O_DIRECT))
        data = stack.enter_context(mmap.mmap(-1, BLOCK))
        os.pwrite(buffered, bytes(range(1, 9)) * (blocks * BLOCK // 8), 0)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        readers = [stack.enter_context(subprocess.Popen(wrapped, **pipes)) for _ in range(2)]

        def seen(block: int) -> list[str]:
            for reader in readers:
                reader.stdin.write(f"{block}\n")
            return [reader.stdout.readline().strip() for reader in readers]

        assert [seen(block) for block in range(blocks)] == [["0102030405060708"] * 2] * blocks
        for version in range(1, rounds):
            # What is mapped has some time to be merged.
            time.sleep(0.2)
            for block in draw.sample(range(blocks), 16):
                data[:] = version.to_bytes(8, "big") * (BLOCK // 8)
                os.pwrite(draw.choice([buffered, direct]), data, block * BLOCK)
                assert seen(block) == [f"{version:016x}"] * 2
        for reader in readers:
            reader.stdin.close()


@pytest.mark.parametrize("direct", [False, True])
def test_fio_verifies(engine: Engine, base: Path, *, direct: bool) -> None:
    """What fio writes, in all ways and at all depths, is what it reads; and the overlay is in order after it."""
    path = clone(engine, base, "vm1")
    for pattern in ("write", "randwrite", "randrw"):
        for depth in (1, 8, 32):
            verify(path, SIZE, pattern=pattern, depth=depth, direct=direct)
    overlay, content = Path(listed(engine)["vm1"]["overlay"]), path.read_bytes()
    assert engine.command("umount", path).returncode == 0
    assert converted(overlay) == content


def test_two_clones_of_one_base(engine: Engine, base: Path) -> None:
    before = base.read_bytes()
    one, two = clone(engine, base, "one"), clone(engine, base, "two")
    for path, letter in ((one, b"1"), (two, b"2")):
        with opened(path) as descriptor:
            os.pwrite(descriptor, letter * BLOCK, BLOCK)
    assert one.read_bytes() == before[:BLOCK] + b"1" * BLOCK + before[2 * BLOCK :]
    assert two.read_bytes() == before[:BLOCK] + b"2" * BLOCK + before[2 * BLOCK :]
    assert "its base" in refused(engine, "commit", "one")
    command(engine, "discard", "two")
    assert not two.exists()
    assert command(engine, "commit", "one").strip() == str(base)
    assert base.read_bytes() == before[:BLOCK] + b"1" * BLOCK + before[2 * BLOCK :]
    assert listed(engine) == {}
    assert not any((engine.socket.parent / "state" / "clones").iterdir())


def test_refusals(engine: Engine, base: Path) -> None:
    path = clone(engine, base, "vm1")
    with opened(path):
        assert f"process {os.getpid()} (" in refused(engine, "commit", "vm1")
        assert f"process {os.getpid()} (" in refused(engine, "discard", "vm1")
    assert "already" in refused(engine, "show", "vm1")
    assert "none of that name" in refused(engine, "commit", "vm2")
    assert engine.command("mount", base).returncode == 0
    assert "is in the mount" in refused(engine, "commit", "vm1")
    assert engine.command("mount", "--clone", base, "--to", "vm1").returncode == 1
    assert listed(engine)["vm1"]["shown"] == str(path)


def test_the_next_engine_shows_it_again(engine_factory: Callable[..., Engine], base: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = engine_factory("--state-dir", state)
    path = clone(first, base, "vm1")
    with opened(path) as descriptor:
        os.pwrite(descriptor, b"written" * 1000, 12345)
    expected = path.read_bytes()
    # Nobody asked for it to be on the disk.
    assert first.stop() == 0
    record = tmp_path / "state" / "clones" / "vm1.json"
    record.write_text(record.read_text().replace("/engine0/", "/engine1/"))
    second = engine_factory("--state-dir", state)
    assert second.mount is not None
    assert (second.mount / "vm1.raw").read_bytes() == expected
    # No digests of it are kept; others' files are.
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["clones"]
