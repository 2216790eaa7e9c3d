"""Images made by QEMU's own tools, and what QEMU reads from them."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from udedup.vdi.formats.probe import Opening
from udedup.vdi.images import Image, Images

KIB = 1 << 10
MIB = 1 << 20


def qemu_img(*arguments: str | Path | int) -> None:
    """Runs qemu-img, which has to succeed."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def qemu_io(path: Path, *commands: str, kind: str = "qcow2") -> None:
    """Has QEMU write into an image."""
    options = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", kind, *options, str(path)], check=True, capture_output=True)


def expected(path: Path, kind: str) -> bytes:
    """All bytes of the disk, as QEMU reads them."""
    raw = path.with_name(f"{path.name}.expected")
    qemu_img("convert", "-f", kind, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def scribble(path: Path, seed: int, size: int, *, kind: str = "qcow2", zeroes: bool = True) -> None:
    """Writes stretches of bytes, zeros and discards of all sizes and alignments to 512 bytes into an image."""
    chooser = random.Random(seed)
    commands = []
    for _ in range(24):
        length = chooser.choice((512, 4 * KIB, 4 * KIB + 512, 64 * KIB, 200 * KIB, 3 * MIB // 2))
        start = chooser.randrange(0, size - length) // 512 * 512
        kinds = [f"write -P {chooser.randrange(1, 256)}"] * 3 + ["write -z", "discard"] * zeroes
        commands.append(f"{chooser.choice(kinds)} {start} {length}")
    qemu_io(path, *commands, kind=kind)


def check(image: Image, data: bytes, seed: int = 1) -> None:
    """Compares reads of an image, from the page cache and not, of all sizes and places, with what it has to be."""
    assert image.size == len(data)
    chooser = random.Random(seed)
    for _ in range(300):
        offset = chooser.randrange(len(data))
        size = min(chooser.choice((1, 512, 4 * KIB, 64 * KIB, 300 * KIB, MIB)), len(data) - offset)
        view = memoryview(bytearray(b"\xee" * size))
        if chooser.random() < 0.5 and image.read_cached(view, offset):
            assert view == data[offset : offset + size], (offset, size)
        else:
            assert image.read(offset, size) == data[offset : offset + size], (offset, size)
    assert image.read(0, len(data)) == data


@pytest.fixture(autouse=True)
def _qemu(require: Callable[..., None]) -> None:
    require("qemu-utils")


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., Path]:
    """``disk(name, kind, size, seed, …)`` makes an image with things in it; more words are qemu-img's."""

    def make(name: str, kind: str = "qcow2", size: int = 24 * MIB, seed: int = 1, *options: str) -> Path:
        path = tmp_path / name
        qemu_img("create", "-f", kind, *options, path, size)
        scribble(path, seed, size, kind=kind, zeroes=kind == "qcow2")
        return path

    return make


def opened(path: Path, opening: Opening | None = None) -> Image:
    """The image as the mount would have it."""
    return Images().add(path, opening=opening or Opening())
