"""Damaged images: whatever is in them, they are refused in one line or their reads give bytes or EIO.

``fuzz_bytes(kind, data)`` is one attempt, for another fuzzer (``fuzz`` beside this file) to call too.
"""

import errno
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from udedup.errors import UdedupError
from udedup.vdi.formats import qcow2, vdi
from udedup.vdi.formats.probe import Opening
from udedup.vdi.images import Images

KIB = 1 << 10
SIZE = 96 * KIB
SIZE_MOST = 192 * KIB
"""Of an image's file."""
VARIANTS = {
    "qcow2": ("qcow2", "cluster_size=512"),
    "qcow2-v2": ("qcow2", "cluster_size=512,compat=0.10"),
    "qcow2-extended": ("qcow2", "cluster_size=16384,extended_l2=on"),
    "qcow2-backed": ("qcow2", "cluster_size=512,backing_file=base.raw,backing_fmt=raw"),
    "vdi": ("vdi", "static=off"),
}
OFFSETS = (0, 511, 4 * KIB, 30 * KIB, SIZE - 1, SIZE, 1 << 20, 1 << 40, (1 << 61) - 512)


@cache
def place() -> Path:
    """A directory with what the images may rest on; lives as long as the interpreter."""
    # The object is the directory's owner.
    directory = tempfile.TemporaryDirectory(prefix="udedup-fuzz-")
    place.owner = directory  # type: ignore[attr-defined]
    (Path(directory.name) / "base.raw").write_bytes(b"base" * 5 * KIB)
    return Path(directory.name)


@cache
def seed(variant: str) -> bytes:
    """A good image to begin with."""
    kind, options = VARIANTS[variant]
    path = place() / f"seed.{kind}"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, "-o", options, path, str(SIZE)], check=True)
    commands = [word for start in (0, 3000, 40000, 70000) for word in ("-c", f"write -q {start // 512 * 512} 2048")]
    subprocess.run(["qemu-io", "-f", kind, *commands, path], check=True)
    # Of a VDI's block of 1 MiB the beginning does.
    return path.read_bytes()[:SIZE_MOST]


def fuzz_bytes(kind: str, data: bytes) -> str:
    """Opens ``data`` as an image of ``kind`` and reads from it; says how it went."""
    if not data:
        return "nothing"
    path = place() / f"fuzz.{kind}"
    path.write_bytes(data)
    images = Images()
    try:
        image = images.add(path, opening=Opening(format=kind))
    except UdedupError as error:
        line = str(error)
        assert "\n" not in line, line
        assert line.isprintable(), line
        return "refused"
    outcome = "read"
    for offset in OFFSETS:
        for length in (1, 5000):
            if offset + length > image.size:
                continue
            try:
                if not image.read_cached(memoryview(bytearray(length)), offset):
                    image.read(offset, length)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                outcome = "EIO"
            except RuntimeError as error:
                # A compressed cluster: the helper wants a thread of trio's.
                if "trio" not in str(error):
                    raise
                outcome = "helper"
    images.close()
    return outcome


def put(data: bytearray, offset: int, value: bytes) -> None:
    offset %= len(data)
    data[offset : offset + len(value)] = value[: len(data) - offset]


NUMBERS_OF_NOTE = [
    0,
    1,
    2,
    511,
    512,
    4096,
    1 << 16,
    1 << 20,
    1 << 31,
    1 << 32,
    1 << 55,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]
NUMBERS = st.one_of(st.sampled_from(NUMBERS_OF_NOTE), st.integers(0, (1 << 64) - 1))
CHANGES = st.lists(
    st.tuples(
        # The header most of all, then its extensions and the tables.
        st.one_of(st.integers(0, 511), st.integers(0, 8 * KIB), st.integers(0, SIZE_MOST)),
        st.one_of(
            st.binary(min_size=1, max_size=16),
            st.builds(struct.pack, st.sampled_from([">Q", "<Q"]), NUMBERS),
            st.builds(lambda order, n: struct.pack(order, n & 0xFFFF_FFFF), st.sampled_from([">I", "<I"]), NUMBERS),
        ),
    ),
    max_size=6,
)
LENGTHS = st.one_of(st.none(), st.integers(1, SIZE_MOST))


@pytest.mark.parametrize("variant", VARIANTS)
@given(changes=CHANGES, length=LENGTHS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_image(variant: str, changes: list[tuple[int, bytes]], length: int | None) -> None:
    data = bytearray(seed(variant))
    for offset, value in changes:
        put(data, offset, value)
    fuzz_bytes(VARIANTS[variant][0], bytes(data[:length]))


@given(data=st.binary(max_size=600), tail=st.integers(0, 600))
def test_any_bytes_as_a_header(data: bytes, tail: int) -> None:
    for parse in (qcow2.parse_header, vdi.parse_header):
        for raw in (data, qcow2.MAGIC + data, bytes(vdi.SIGNATURE_OFFSET) + vdi.SIGNATURE + data + bytes(tail)):
            try:
                parse(raw, "image x")
            except UdedupError as error:
                line = str(error)
                assert "\n" not in line
                assert line.startswith("image x")
