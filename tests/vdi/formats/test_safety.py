"""What an image names is opened only where the user allows it, and what can't be is refused in one line."""

import errno
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from udedup.errors import UdedupError
from udedup.vdi.formats.probe import Opening
from udedup.vdi.images import Images

from .conftest import MIB, check, expected, opened, qemu_img

Disk = Callable[..., Path]
BACKING_FORMAT = 0xE2792ACA


def descriptors() -> list[str]:
    """What ours lead to."""
    targets = []
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 (the one that lists them must be gone)
        with suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{entry}"))  # noqa: PTH115 (a number, no path)
    return targets


def refused(path: Path, opening: Opening | None = None) -> str:
    """The one line that an image is refused with; nothing is left open."""
    before = descriptors()
    with pytest.raises(UdedupError) as caught:
        Images().add(path, opening=opening or Opening())
    after = descriptors()
    assert not [target for target in after if target.startswith(str(path.parent))]
    # Fewer: what an earlier test has left was closed in between.
    assert len(after) <= len(before)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("image ")
    return text


def read_damaged(path: Path) -> tuple[dict[int, bytes], str]:
    """What can be read of an image, by offset, and why it can't be opened."""
    try:
        image = Images().add(path)
    except UdedupError as error:
        return {}, str(error)
    found = {}
    for offset in range(0, image.size, 4096):
        view = memoryview(bytearray(min(4096, image.size - offset)))
        try:
            if not image.read_cached(view, offset):
                view = image.read(offset, len(view))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        else:
            found[offset] = bytes(view)
    image.close()
    return found, ""


def overlay(path: Path, backing: bytes, kind: bytes | None = b"raw", size: int = 4 * MIB) -> Path:
    """A qcow2 that names any backing file, of the given format; QEMU would check what it names."""
    qemu_img("create", "-f", "qcow2", path, size)
    raw = bytearray(path.read_bytes())
    header_bytes = struct.unpack_from(">I", raw, 100)[0]
    extensions = b""
    if kind is not None:
        extensions = struct.pack(">II", BACKING_FORMAT, len(kind)) + kind.ljust(-(-len(kind) // 8) * 8, b"\0")
    extensions += bytes(8)
    start = header_bytes + len(extensions)
    raw[header_bytes : start + len(backing)] = extensions + backing
    struct.pack_into(">QI", raw, 8, start, len(backing))
    path.write_bytes(raw)
    return path


@pytest.fixture
def outside(tmp_path: Path) -> tuple[Path, Path]:
    """A directory for images, and a secret that lies beside it."""
    inside = tmp_path / "images"
    inside.mkdir()
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"secret" * 1000)
    return inside, secret


@pytest.mark.parametrize("name", ["/etc/shadow", "../secret.raw", "sub/../../secret.raw", "link.raw", "dir/secret.raw"])
def test_backing_file_outside(outside: tuple[Path, Path], name: str) -> None:
    inside, secret = outside
    (inside / "sub").mkdir()
    (inside / "link.raw").symlink_to(secret)
    (inside / "dir").symlink_to(secret.parent)
    path = overlay(inside / "disk.qcow2", name.encode())
    assert "outside the directories allowed" in refused(path)


@pytest.mark.parametrize("name", ["../secret.raw", "link.raw", "dir/secret.raw"])
def test_backing_file_where_allowed(outside: tuple[Path, Path], name: str) -> None:
    inside, secret = outside
    (inside / "link.raw").symlink_to(secret)
    (inside / "dir").symlink_to(secret.parent)
    path = overlay(inside / "disk.qcow2", name.encode())
    image = opened(path, Opening(allow_backing=(secret.parent,)))
    check(image, secret.read_bytes().ljust(4 * MIB, b"\0"))


def test_links_inside_are_fine(outside: tuple[Path, Path], disk: Disk) -> None:
    inside, _ = outside
    (inside / "base.raw").write_bytes(b"base" * 4096)
    (inside / "link.raw").symlink_to("base.raw")
    (inside.parent / "other").symlink_to(inside)
    overlay(inside / "disk.qcow2", b"link.raw")
    image = opened(inside.parent / "other" / "disk.qcow2")
    assert image.read(0, 8) == b"basebase"


def test_data_file_outside(outside: tuple[Path, Path]) -> None:
    inside, secret = outside
    path = inside / "disk.qcow2"
    data = inside / "data.raw"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data}", path, MIB)
    raw = path.read_bytes()
    wanted = os.path.relpath(secret, inside).encode()
    name = str(data).encode()
    padded = -(-len(name) // 8) * 8
    extension = struct.pack(">II", 0x44415441, len(name)) + name.ljust(padded, b"\0")
    assert extension in raw
    path.write_bytes(raw.replace(extension, struct.pack(">II", 0x44415441, len(wanted)) + wanted.ljust(padded, b"\0")))
    refused(path)


@pytest.mark.parametrize(
    "name",
    [
        b'json:{"driver":"file","filename":"/etc/shadow"}',
        b"nbd:unix:/run/x",
        b"file:/etc/shadow",
        b"fat:/etc",
        b"a:b",
        b"ssh://host/disk",
    ],
)
def test_protocols(tmp_path: Path, name: bytes) -> None:
    assert "not a plain path" in refused(overlay(tmp_path / "disk.qcow2", name))


@pytest.mark.parametrize("name", [b"\0", b"a\0b", b"a\nb", b"\xff\xfe", b"."])
def test_odd_names(tmp_path: Path, name: bytes) -> None:
    refused(overlay(tmp_path / "disk.qcow2", name))


def test_pipe_as_backing_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a regular file nor" in refused(overlay(tmp_path / "disk.qcow2", b"pipe"))


def test_backing_without_format(tmp_path: Path) -> None:
    """QEMU would look into the file; whoever writes to that file could choose what it finds."""
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    text = refused(overlay(tmp_path / "disk.qcow2", b"base.raw", None))
    assert "qemu-img rebase -u" in text


@pytest.mark.parametrize("kind", [b"qed", b"nbd", b"", b"\xff\n"])
def test_backing_of_unknown_format(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    assert "none of raw, qcow2" in refused(overlay(tmp_path / "disk.qcow2", b"base.raw", kind))


def test_header_in_a_raw_backing_file_means_nothing(outside: tuple[Path, Path]) -> None:
    """A guest wrote an image header into its raw disk, on which another image rests."""
    inside, secret = outside
    forged = overlay(inside / "base.raw", os.fsencode(secret))
    path = overlay(inside / "disk.qcow2", b"base.raw", b"raw")
    image = opened(path)
    assert image.read(0, 4096) == forged.read_bytes()[:4096]


def test_backing_file_is_not_what_the_header_says(tmp_path: Path) -> None:
    (tmp_path / "base.img").write_bytes(bytes(MIB))
    for kind in (b"qcow2", b"vdi", b"vmdk", b"vpc", b"vhdx"):
        refused(overlay(tmp_path / "disk.qcow2", b"base.img", kind))


def test_cycles(tmp_path: Path) -> None:
    overlay(tmp_path / "self.qcow2", b"self.qcow2", b"qcow2")
    overlay(tmp_path / "a.qcow2", b"b.qcow2", b"qcow2")
    overlay(tmp_path / "b.qcow2", b"c.qcow2", b"qcow2")
    overlay(tmp_path / "c.qcow2", b"a.qcow2", b"qcow2")
    (tmp_path / "hard.qcow2").hardlink_to(tmp_path / "self.qcow2")
    for name in ("self", "a", "b", "hard"):
        assert "rests on itself" in refused(tmp_path / f"{name}.qcow2")


def test_endless_chain(tmp_path: Path) -> None:
    for number in range(70):
        overlay(tmp_path / f"{number}.qcow2", f"{number + 1}.qcow2".encode(), b"qcow2")
    assert "more than 64 files" in refused(tmp_path / "0.qcow2")


def test_long_chain(tmp_path: Path) -> None:
    for number in range(60):
        overlay(tmp_path / f"{number}.qcow2", f"{number + 1}.qcow2".encode(), b"qcow2")
    qemu_img("create", "-f", "qcow2", tmp_path / "60.qcow2", MIB)
    check(opened(tmp_path / "0.qcow2"), bytes(4 * MIB))


def assert_sound(path: Path, data: bytes) -> None:
    """An image that is damaged is refused in one line, or its reads fail with EIO where they can't be right."""
    found, line = read_damaged(path)
    assert "\n" not in line
    for offset, block in found.items():
        assert block == data[offset : offset + 4096], offset


@pytest.mark.parametrize("length", [71, 100, 200, 65536, 65536 + 4, 4 * 65536, 5 * 65536])
def test_cut_off(disk: Disk, length: int) -> None:
    """Refused, or its reads fail; what can still be read is right."""
    path = disk("disk.qcow2", "qcow2", 4 * MIB)
    data = expected(path, "qcow2")
    os.truncate(path, length)
    assert_sound(path, data)


def patched(path: Path, *changes: tuple[str, int, int]) -> Path:
    raw = bytearray(path.read_bytes())
    for kind, offset, value in changes:
        struct.pack_into(kind, raw, offset, value)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((">I", 4, 4), "version 4"),
        ((">I", 20, 8), "clusters of"),
        ((">I", 20, 63), "clusters of"),
        ((">I", 20, 2**32 - 1), "clusters of"),
        ((">Q", 24, 0), "a disk of 0 bytes"),
        ((">Q", 24, 2**64 - 1), "a disk of"),
        ((">Q", 24, 1 << 50), "too few for"),
        ((">I", 32, 3), "method 3"),
        ((">I", 36, 0), "too few for"),
        ((">I", 36, 2**32 - 1), "more than can be"),
        ((">Q", 40, 5), "first-level table is at"),
        ((">Q", 40, 1 << 63), "first-level table is at"),
        ((">Q", 40, 1 << 40), "beyond the end"),
        ((">Q", 72, 1 << 1), "marked as corrupt"),
        ((">Q", 72, 1 << 2), "does not name"),
        ((">Q", 72, 1 << 17), "not known here"),
        ((">I", 100, 8), "its own length"),
        ((">I", 100, 2**32 - 1), "its own length"),
        ((">Q", 8, 1 << 40), "name of its backing file"),
    ],
)
def test_absurd_headers(tmp_path: Path, change: tuple[str, int, int], said: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, 4 * MIB)
    assert said in refused(patched(path, change))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (1 << 63 | 0x200, "not a multiple of its size"),
        (1 << 63 | 1 << 50, "ends early"),
    ],
)
def test_absurd_maps(disk: Disk, entry: int, said: str) -> None:
    path = disk("disk.qcow2", "qcow2", 4 * MIB)
    raw = path.read_bytes()
    (first_level,) = struct.unpack_from(">Q", raw, 40)
    (table,) = struct.unpack_from(">Q", raw, first_level)
    image = opened(patched(path, (">Q", table & ~(1 << 63), entry)))
    with pytest.raises(OSError, match=said) as caught:
        image.read(0, 4096)
    assert caught.value.errno == errno.EIO
    # The loop's own thread finds the same or leaves it to the worker.
    with suppress(OSError):
        assert not image.read_cached(memoryview(bytearray(4096)), 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("<I", 0x44, 0x20001), "version 2.1"),
        (("<I", 0x4C, 3), "type 3"),
        (("<Q", 0x170, 0), "a disk of 0 bytes"),
        (("<Q", 0x170, 2**63), "a disk of"),
        (("<Q", 0x170, 1 << 50), "too few for"),
        (("<I", 0x178, 0), "blocks of"),
        (("<I", 0x178, 3 << 20), "blocks of"),
        (("<I", 0x17C, 5), "blocks of"),
        (("<I", 0x180, 0), "too few for"),
        (("<I", 0x180, 2**32 - 1), "its map is at"),
        (("<I", 0x154, 0), "its map is at"),
        (("<I", 0x158, 0), "its map is at"),
    ],
)
def test_absurd_vdi_headers(tmp_path: Path, change: tuple[str, int, int], said: str) -> None:
    path = tmp_path / "disk.vdi"
    qemu_img("create", "-f", "vdi", path, 4 * MIB)
    assert said in refused(patched(path, change))


def test_vmdk_of_other_files(tmp_path: Path) -> None:
    """QEMU would open what such a file names, wherever it is."""
    path = tmp_path / "disk.vmdk"
    path.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        'RW 8 FLAT "/etc/shadow" 0\n'
    )
    assert "descriptor of other files" in refused(path)


def test_vmdk_that_hides_a_descriptor(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("convert", "-O", "vmdk", disk("plain.raw", "raw", 4 * MIB), path)
    assert "descriptor of other files" in refused(patched(path, ("<Q", 12, 0)))


def test_vmdk_with_a_parent(tmp_path: Path, disk: Disk) -> None:
    base, path = tmp_path / "base.vmdk", tmp_path / "disk.vmdk"
    qemu_img("convert", "-O", "vmdk", disk("plain.raw", "raw", 4 * MIB), base)
    qemu_img("create", "-f", "vmdk", "-b", base, "-F", "vmdk", path)
    assert "has a parent" in refused(path)


def test_differencing_vhd(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "disk.vhd"
    qemu_img("convert", "-O", "vpc", disk("plain.raw", "raw", 4 * MIB), path)
    assert "differencing VHD" in refused(patched(path, (">I", path.stat().st_size - 512 + 60, 4)))


@pytest.mark.parametrize("kind", ["vmdk", "vhdx", "vpc"])
def test_garbage_behind_a_magic_number(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"disk.{kind}"
    magic = {"vmdk": b"KDMV" + b"\1" * 20, "vhdx": b"vhdxfile", "vpc": b"conectix"}[kind]
    path.write_bytes(magic + b"\x55" * MIB)
    refused(path)


def test_clash_of_shown_names(disk: Disk, tmp_path: Path) -> None:
    images = Images()
    images.add(disk("disk.qcow2"))
    (tmp_path / "disk.raw").write_bytes(b"raw")
    with pytest.raises(UdedupError, match=r"the name 'disk.raw' is taken by .*disk.qcow2; choose another"):
        images.add(tmp_path / "disk.raw")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("disk.qcow2", "disk.raw"),
        ("disk", "disk.raw"),
        ("debian-12.5", "debian-12.5.raw"),
        ("a.b.QCOW2", "a.b.raw"),
        ("x.img", "x.raw"),
        (".qcow2", ".qcow2.raw"),
    ],
)
def test_shown_names(tmp_path: Path, name: str, shown: str) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / name, MIB)
    assert opened(tmp_path / name).name == shown


def test_raw_name_of_a_sparse_image_not_a_multiple_of_4_kib(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(3 * MIB + 777)
    image = opened(path)
    assert (image.format, image.name, image.size) == ("raw", "disk.img", 3 * MIB + 777)
    assert image.read(3 * MIB, 777) == bytes(777)
