"""All digests of an image, computed once: with holes passed over, from where it was left, beside a running engine."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from udedup.errors import UdedupError
from udedup.vdi.digests import PAGE_BLOCKS, PAGE_BYTES
from udedup.vdi.images import Images
from udedup.vdi.indexing import Step, index_image
from udedup.vdi.sidecar import Sidecar
from udedup.vdi.state import StateDirectory

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory.open(tmp_path / "state")


def age(path: Path) -> None:
    """Makes ``path`` look as if nobody had changed it for a minute."""
    then = path.stat().st_mtime_ns - 60 * 10**9
    os.utime(path, ns=(then, then))


async def index(state: StateDirectory, path: Path, stop_after: int | None = None) -> tuple[int, bytes]:
    """Blocks that were digested, and the whole table as the sidecar then has it. Cancelled after so many steps."""
    images = Images(state)
    image = images.add(path)
    digested = steps = 0

    def on_step(step: Step) -> None:
        nonlocal digested, steps
        digested += step.digested
        steps += 1
        if steps == stop_after:
            scope.cancel()

    with trio.CancelScope() as scope:
        await index_image(images, image, on_step)
    identity = image.identity
    images.close()
    assert identity is not None
    sidecar = Sidecar.open(state.path / identity.name, identity)
    pages = sidecar.read(0, -(-image.size // MIB))
    sidecar.close()
    return digested, b"".join(page or bytes(PAGE_BYTES) for page in pages)


def without_zeros(table: bytes, data: bytes) -> bytes:
    """The digests of what is not zero."""
    zero = bytes(BLOCK)
    return b"".join(
        table[16 * block : 16 * block + 16] if data[block * BLOCK : (block + 1) * BLOCK] != zero else bytes(16)
        for block in range(len(table) // 16)
    )


def holed(path: Path, size: int, seed: int) -> bytes:
    """Writes a file with holes in random places, not whole blocks of data at all ends; returns its content."""
    chooser = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(30):
            file.seek(chooser.randrange(size))
            file.write(chooser.randbytes(min(chooser.choice((100, BLOCK, 64 << 10, 300 << 10)), size - file.tell())))
    age(path)
    return path.read_bytes()


@pytest.mark.parametrize("size", [100, BLOCK, MIB - 1, 37 * MIB + 5 * BLOCK + 77])
async def test_raw(state: StateDirectory, place: Path, expected_digests: Callable[[bytes], bytes], size: int) -> None:
    path = place / "disk.raw"
    data = holed(path, size, size)
    digested, table = await index(state, path)
    expected = expected_digests(data)
    if size > BLOCK:
        # What little the file system takes for data, zeros though it is, has its digest, too.
        assert without_zeros(table[: len(expected)], data) == without_zeros(expected, data)
    assert digested <= len(expected) // 16
    assert table[len(expected) :] == bytes(len(table) - len(expected))
    assert await index(state, path) == (0, table)


@pytest.mark.require("qemu-utils")
@pytest.mark.parametrize("format_", ["qcow2", "vdi", "vmdk"])
async def test_formats(
    state: StateDirectory, place: Path, expected_digests: Callable[[bytes], bytes], format_: str
) -> None:
    data = holed(place / "plain", 20 * MIB, 3)
    path = place / f"disk.{format_}"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format_, place / "plain", path], check=True)
    age(path)
    digested, table = await index(state, path)
    expected = expected_digests(data)
    assert without_zeros(table, data) == without_zeros(expected, data)
    if format_ == "qcow2":
        assert digested < len(expected) // 16
    assert await index(state, path) == (0, table)


@pytest.mark.require("qemu-utils")
async def test_chain_is_indexed_as_what_it_shows(
    state: StateDirectory, place: Path, expected_digests: Callable[[bytes], bytes]
) -> None:
    base, top = place / "base.raw", place / "top.qcow2"
    data = bytearray(holed(base, 8 * MIB, 4))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    subprocess.run(
        ["qemu-io", "-c", "write -P 7 3M 100k", "-c", "write -z 5M 64k", top], check=True, capture_output=True
    )
    data[3 * MIB : 3 * MIB + (100 << 10)] = b"\7" * (100 << 10)
    data[5 * MIB : 5 * MIB + (64 << 10)] = bytes(64 << 10)
    age(top)
    _, table = await index(state, top)
    expected = expected_digests(bytes(data))
    assert without_zeros(table, bytes(data)) == without_zeros(expected, bytes(data))


async def test_goes_on_where_it_was_left(
    state: StateDirectory, make_image: Callable[..., Path], expected_digests: Callable[[bytes], bytes]
) -> None:
    path = make_image(40 * MIB)
    age(path)
    first, _ = await index(state, path, stop_after=1)
    assert first == 16 * PAGE_BLOCKS
    second, table = await index(state, path)
    assert first + second == 40 * PAGE_BLOCKS
    assert table == expected_digests(path.read_bytes())


@pytest.mark.require("qemu-utils")
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_sparse_disk_of_16_tib(state: StateDirectory, place: Path, kind: str) -> None:
    path = place / f"disk.{kind}"
    size = (16 << 40) - MIB
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, str(size)], check=True)
    subprocess.run(
        ["qemu-io", "-f", kind, "-c", "write -P 1 9T 64k", "-c", f"write -P 2 {size - 65536} 64k", path],
        check=True,
        capture_output=True,
    )
    age(path)
    images = Images(state)
    image = images.add(path)
    digested = 0

    def on_step(step: Step) -> None:
        nonlocal digested
        digested += step.digested

    with trio.fail_after(60):
        await index_image(images, image, on_step)
    # QEMU writes the first block of a raw file to see that it can.
    assert digested == (33 if kind == "raw" else 32)
    identity = image.identity
    assert identity is not None
    images.close()
    assert (state.path / identity.name).stat().st_blocks * 512 < 100 << 10


async def test_beside_an_engine_that_reads_the_same(
    state: StateDirectory, make_image: Callable[..., Path], expected_digests: Callable[[bytes], bytes]
) -> None:
    """Each block is known at the end, whoever was first."""
    path = make_image(48 * MIB)
    data = path.read_bytes()
    age(path)
    engine, tool = Images(state), Images(state)
    mounted = engine.add(path)
    async with engine.keeping():
        for start in range(0, len(data), 2 * MIB):
            mounted.note_digests(start, data[start : start + 64 * BLOCK])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index_image, tool, tool.add(path), lambda step: None)
            for start in range(0, len(data), 3 * MIB):
                mounted.note_digests(start, data[start : start + 64 * BLOCK])
                await engine.flush(mounted)
    engine.close()
    tool.close()
    assert await index(state, path) == (0, expected_digests(data))


async def test_image_that_changes_is_not_indexed(state: StateDirectory, make_image: Callable[..., Path]) -> None:
    path = make_image(40 * MIB)
    age(path)
    images = Images(state)
    image = images.add(path)
    with pytest.raises(UdedupError, match="being changed"):
        await index_image(images, image, lambda step: os.utime(path))
    images.close()
    # Nothing of it is taken for true.
    assert (await index(state, path))[0] == 40 * PAGE_BLOCKS


async def test_image_that_cannot_be_read(
    state: StateDirectory, make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image(2 * MIB)
    age(path)
    images = Images(state)
    image = images.add(path)

    def read(offset: int, size: int) -> memoryview:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(image, "read", read)
    with pytest.raises(UdedupError, match="can't be indexed: Input/output error"):
        await index_image(images, image, lambda step: None)
    images.close()
