"""qcow2 by the offset map, with QEMU as the oracle."""

from collections.abc import Callable
from pathlib import Path

import pytest

from udedup.vdi.formats.probe import Opening
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.images import Images

from .conftest import KIB, MIB, check, expected, opened, qemu_img, qemu_io, scribble

Disk = Callable[..., Path]


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16384",
        "extended_l2=on,cluster_size=2M",
        "preallocation=metadata",
        "preallocation=full",
    ],
)
def test_same_bytes_as_qemu(disk: Disk, options: str) -> None:
    path = disk("disk.qcow2", "qcow2", 24 * MIB + 512, 7, "-o", options)
    image = opened(path)
    assert (image.name, image.format) == ("disk.raw", "qcow2")
    check(image, expected(path, "qcow2"))


@pytest.mark.parametrize("kinds", [("raw",), ("qcow2",), ("vdi",), ("raw", "qcow2", "qcow2"), ("vdi", "qcow2")])
@pytest.mark.parametrize("options", ["cluster_size=65536", "extended_l2=on"])
def test_backing_chain(disk: Disk, tmp_path: Path, kinds: tuple[str, ...], options: str) -> None:
    """Each layer has its own writes, zeros and discards; some are smaller, some larger than the one below."""
    sizes = (9 * MIB, 24 * MIB, 17 * MIB + 3 * 512, 30 * MIB)
    path = disk(f"0.{kinds[0]}", kinds[0], sizes[0], 1)
    for number, kind in enumerate((*kinds[1:], "qcow2"), start=1):
        below, below_kind = path.name, kinds[number - 1]
        path = tmp_path / f"{number}.qcow2"
        qemu_img("create", "-f", kind, "-o", options, "-b", below, "-F", below_kind, path, sizes[number])
        scribble(path, number + 1, sizes[number])
    check(opened(path), expected(path, "qcow2"))


@pytest.mark.parametrize("raw", ["off", "on"])
def test_data_file(disk: Disk, tmp_path: Path, raw: str) -> None:
    data = tmp_path / "disk.data"
    path = disk("disk.qcow2", "qcow2", 24 * MIB, 3, "-o", f"data_file={data},data_file_raw={raw}")
    check(opened(path), expected(path, "qcow2"))


def test_snapshots_are_ignored(disk: Disk) -> None:
    path = disk("disk.qcow2")
    before = expected(path, "qcow2")
    qemu_img("snapshot", "-c", "one", path)
    scribble(path, 9, 24 * MIB)
    now = expected(path, "qcow2")
    assert now != before
    check(opened(path), now)


def test_contiguous_clusters_are_one_extent(tmp_path: Path) -> None:
    """What QEMU lays out in one piece costs one system call to read, however many clusters it is."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, 64 * MIB)
    qemu_io(path, f"write -P 5 0 {64 * MIB}")
    layer = opened(path)._layer
    for offset in (0, 12345, 10 * MIB + 512):
        extent = layer.lookup(offset, MIB, wait=True)
        assert extent is not None
        assert isinstance(extent.source, RawFile)
        assert extent.length == MIB


def test_equal_blocks_of_overlays_have_one_identity(disk: Disk, tmp_path: Path) -> None:
    base = disk("base.raw", "raw")
    extents = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.qcow2"
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", path)
        extent = opened(path)._layer.lookup(5 * MIB, 4 * KIB, wait=True)
        assert extent is not None
        assert isinstance(extent.source, RawFile)
        extents.append((extent.source.status.st_ino, extent.offset))
    assert extents == [(base.stat().st_ino, 5 * MIB)] * 2


def test_sparse_16_tib_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 16 << 40
    qemu_img("create", "-f", "qcow2", path, size)
    places = [number * (size // 600) // 65536 * 65536 for number in range(600)]
    qemu_io(path, *(f"write -P {1 + number % 255} {place} 4k" for number, place in enumerate(places)))
    image = opened(path)
    for number, place in enumerate(places):
        assert image.read(place, 4 * KIB) == bytes([1 + number % 255]) * 4 * KIB
        assert image.read(place + 64 * KIB, 4 * KIB) == bytes(4 * KIB)
    assert image.read(size - 4 * KIB, 4 * KIB) == bytes(4 * KIB)
    assert len(image._layer._tables) <= 256  # type: ignore[attr-defined]


def test_many_sparse_images_stay_small(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, 16 << 40)
    images = Images()
    images.add(path, "first")
    before = resident_bytes()
    for number in range(200):
        images.add(path, f"{number}.raw")
    assert resident_bytes() - before < 200 * 64 * KIB
    images.close()


def resident_bytes() -> int:
    """Memory this process has right now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4 * KIB


def test_change_drops_the_map(disk: Disk) -> None:
    path = disk("disk.qcow2")
    image = opened(path)
    check(image, expected(path, "qcow2"))
    scribble(path, 11, 24 * MIB)
    image.update(image.examine())
    assert image.generation == 1
    check(image, expected(path, "qcow2"))


def test_raw_by_choice(disk: Disk) -> None:
    path = disk("disk.img")
    assert opened(path).format == "qcow2"
    image = opened(path, Opening(format="raw"))
    assert (image.format, image.name, image.size) == ("raw", "disk.img", path.stat().st_size)
    check(image, path.read_bytes())


def test_a_name_that_says_raw_is_believed(disk: Disk) -> None:
    """A guest can write any header into its raw disk."""
    path = disk("disk.raw")
    image = opened(path)
    assert (image.format, image.size) == ("raw", path.stat().st_size)
