"""VDI by the offset map, with QEMU as the oracle where QEMU can."""

import logging
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from udedup.errors import UdedupError
from udedup.vdi.formats.probe import Opening

from .conftest import KIB, MIB, check, expected, opened, qemu_img

Disk = Callable[..., Path]

TYPE, MAP, DATA, MODIFIED, LINK, PARENT_MODIFIED = 0x4C, 0x154, 0x158, 0x198, 0x1A8, 0x1B8
FREE, ZERO = 0xFFFF_FFFF, 0xFFFF_FFFE


def patch(path: Path, offset: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)


def block_map(path: Path, blocks: int) -> tuple[int, ...]:
    head = path.read_bytes()[: 2 * MIB]
    return struct.unpack_from(f"<{blocks}I", head, struct.unpack_from("<I", head, MAP)[0])


@pytest.mark.parametrize("static", ["off", "on"])
def test_same_bytes_as_qemu(disk: Disk, static: str) -> None:
    path = disk("disk.vdi", "vdi", 24 * MIB + 512, 5, "-o", f"static={static}")
    image = opened(path)
    assert (image.name, image.format) == ("disk.raw", "vdi")
    check(image, expected(path, "vdi"))


def test_zero_blocks(disk: Disk) -> None:
    path = disk("disk.vdi", "vdi")
    data = bytearray(expected(path, "vdi"))
    map_offset = struct.unpack_from("<I", path.read_bytes(), MAP)[0]
    for block in (0, 3, 4, 23):
        patch(path, map_offset + 4 * block, struct.pack("<I", ZERO))
        data[block * MIB : (block + 1) * MIB] = bytes(MIB)
    check(opened(path), bytes(data))


def test_extra_bytes_before_each_block(disk: Disk, tmp_path: Path) -> None:
    """VirtualBox can keep something in front of each block; QEMU can't read such files."""
    path = disk("disk.vdi", "vdi")
    data = expected(path, "vdi")
    raw = path.read_bytes()
    start = struct.unpack_from("<I", raw, DATA)[0]
    blocks = [raw[place : place + MIB] for place in range(start, len(raw), MIB)]
    moved = tmp_path / "moved.vdi"
    moved.write_bytes(raw[:start] + b"".join(b"\xaa" * 512 + block for block in blocks))
    patch(moved, 0x17C, struct.pack("<I", 512))
    check(opened(moved), data)


@pytest.fixture
def pair(disk: Disk) -> tuple[Path, Path, bytes]:
    """A parent, a differencing child of it, and what the child has to read as."""
    parent = disk("parent.vdi", "vdi", 20 * MIB, 1)
    child = disk("child.vdi", "vdi", 24 * MIB, 2)
    below, above = expected(parent, "vdi").ljust(24 * MIB, b"\0"), expected(child, "vdi")
    map_offset = struct.unpack_from("<I", child.read_bytes(), MAP)[0]
    # Some blocks back to the parent's, which are there or not, one hidden by zeros.
    for block, entry in ((2, FREE), (7, FREE), (21, FREE), (9, ZERO)):
        patch(child, map_offset + 4 * block, struct.pack("<I", entry))
    head = parent.read_bytes()[:512]
    patch(child, TYPE, struct.pack("<I", 4))
    patch(child, LINK, head[0x188:0x198])
    patch(child, PARENT_MODIFIED, head[MODIFIED : MODIFIED + 16])
    data = b""
    for block, entry in enumerate(block_map(child, 24)):
        source = below if entry == FREE else bytes(24 * MIB) if entry == ZERO else above
        data += source[block * MIB : (block + 1) * MIB]
    assert FREE in block_map(child, 24)
    return parent, child, data


def test_differencing(pair: tuple[Path, Path, bytes], caplog: pytest.LogCaptureFixture) -> None:
    _, child, data = pair
    check(opened(child), data)
    assert not caplog.records


def test_parent_in_an_allowed_directory(pair: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    parent, child, data = pair
    (tmp_path / "elsewhere").mkdir()
    parent.rename(tmp_path / "elsewhere" / "base.vdi")
    with pytest.raises(UdedupError, match=r"its parent, VDI .* is in none of these directories") as caught:
        opened(child)
    assert "\n" not in str(caught.value)
    check(opened(child, Opening(allow_backing=(tmp_path / "elsewhere",))), data)


def test_parent_changed_since(pair: tuple[Path, Path, bytes], caplog: pytest.LogCaptureFixture) -> None:
    parent, child, _ = pair
    patch(parent, MODIFIED, bytes(range(16)))
    with caplog.at_level(logging.WARNING):
        opened(child)
    (record,) = caplog.records
    assert "has been changed since" in record.message


def test_own_parent(pair: tuple[Path, Path, bytes]) -> None:
    _, child, _ = pair
    patch(child, LINK, child.read_bytes()[0x188:0x198])
    with pytest.raises(UdedupError, match="rests on itself"):
        opened(child)


def test_no_parent_named(pair: tuple[Path, Path, bytes]) -> None:
    _, child, _ = pair
    patch(child, LINK, bytes(16))
    with pytest.raises(UdedupError, match="names no parent"):
        opened(child)


def test_sparse_16_tib(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    size = 16 << 40
    qemu_img("create", "-f", "vdi", path, size)
    image = opened(path)
    for place in (number * (size // 700) for number in range(700)):
        assert image.read(place, 4 * KIB) == bytes(4 * KIB)
    assert image.size == size
    assert len(image._layer._tables) <= 256  # type: ignore[attr-defined]
