import errno
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from udedup.errors import UdedupError
from udedup.vdi.images import FIRST_INODE, Image, Images

BLOCK = 4096
NOBODY = 65534


def refused(images: Images, path: Path, name: str | None = None) -> str:
    """The one line that adding this image is refused with; nothing may be left behind."""
    before = len(images), len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UdedupError) as caught:
        images.add(path, name)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert (len(images), len(list(Path("/proc/self/fd").iterdir()))) == before
    return text


def resident_pages() -> int:
    """Memory this process has right now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


def test_missing(place: Path) -> None:
    assert "No such file" in refused(Images(), place / "none.raw")


def test_directory(place: Path) -> None:
    assert "is a directory" in refused(Images(), place)


def test_pipe_is_not_opened(place: Path) -> None:
    os.mkfifo(place / "pipe")
    assert "neither a regular file nor a block device" in refused(Images(), place / "pipe")


def test_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
        assert "neither a regular file nor a block device" in refused(Images(), place / "socket")


def test_character_device() -> None:
    assert "neither a regular file nor a block device" in refused(Images(), Path("/dev/zero"))


def test_empty(place: Path) -> None:
    (place / "empty.raw").touch()
    assert "is empty" in refused(Images(), place / "empty.raw")


def test_unreadable(make_image: Callable[..., Path]) -> None:
    path = make_image(BLOCK)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        text = refused(Images(), path)
    finally:
        os.seteuid(user)
    assert "Permission denied" in text


def test_dangling_link(place: Path) -> None:
    (place / "link.raw").symlink_to("nowhere")
    assert "No such file" in refused(Images(), place / "link.raw")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0b", "a\nb"])
def test_bad_name(make_image: Callable[..., Path], name: str) -> None:
    assert "can't be a file name" in refused(Images(), make_image(BLOCK), name)


def test_long_name(make_image: Callable[..., Path]) -> None:
    path = make_image(BLOCK)
    assert "255 bytes" in refused(Images(), path, "é" * 128)
    assert Images().add(path, "é" * 127).size == BLOCK


def test_duplicate_name(make_image: Callable[..., Path]) -> None:
    images = Images()
    first = make_image(BLOCK, "a.raw")
    second = make_image(BLOCK, "b.raw")
    images.add(first)
    text = refused(images, second, "a.raw")
    assert str(first) in text
    assert images.add(second).inode == FIRST_INODE + 1
    assert [image.name for image in images] == ["a.raw", "b.raw"]
    assert {image.inode for image in images} == set(images.by_inode)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 37 * BLOCK + 100, 300 * BLOCK])
def test_digests_are_pythons(
    make_image: Callable[..., Path], expected_digests: Callable[[bytes], bytes], size: int
) -> None:
    path = make_image(size)
    data = path.read_bytes()
    image = Images().add(path)
    assert image.note_digests(0, data) == (0, size // BLOCK)
    assert image.digests[: 16 * (size // BLOCK)] == expected_digests(data)


@pytest.mark.parametrize(
    ("offset", "size", "blocks"),
    [
        (0, BLOCK, (0, 1)),
        (1, BLOCK, (1, 0)),
        (1, 2 * BLOCK - 1, (1, 1)),
        (BLOCK, 3 * BLOCK + 7, (1, 3)),
        (512, 512, (1, 0)),
        (5 * BLOCK - 512, BLOCK + 1024, (5, 1)),
    ],
)
def test_only_whole_blocks_count(
    make_image: Callable[..., Path],
    expected_digests: Callable[[bytes], bytes],
    offset: int,
    size: int,
    blocks: tuple[int, int],
) -> None:
    path = make_image(16 * BLOCK)
    data = path.read_bytes()
    image = Images().add(path)
    first, count = image.note_digests(offset, data[offset : offset + size])
    assert (first, count) == blocks
    table = bytearray(16 * 16)
    table[16 * first : 16 * (first + count)] = expected_digests(data)[16 * first : 16 * (first + count)]
    assert image.digests[: 16 * 16] == table


def test_known_digests_are_not_computed_again(make_image: Callable[..., Path]) -> None:
    image = Images().add(make_image(4 * BLOCK))
    image.note_digests(0, bytes(4 * BLOCK))
    kept = image.digests[:64]
    image.note_digests(0, b"\1" * (4 * BLOCK))
    assert image.digests[:64] == kept
    image.digests[16:32] = bytes(16)
    image.note_digests(0, b"\1" * (4 * BLOCK))
    assert image.digests[16:32] not in (bytes(16), kept[16:32])


def test_huge_sparse_image_costs_what_is_read(place: Path, expected_digests: Callable[[bytes], bytes]) -> None:
    path = place / "huge.raw"
    # The largest file ext4 takes.
    size = (16 << 40) - BLOCK
    with path.open("wb") as file:
        file.truncate(size)
    before = resident_pages()
    image = Images().add(path)
    assert image.size == size
    last = size // BLOCK - 1
    for block in (0, last // 3, last):
        view = memoryview(bytearray(BLOCK))
        assert image.read_cached(view, block * BLOCK) or image.read(block * BLOCK, BLOCK) == view
        assert image.note_digests(block * BLOCK, view) == (block, 1)
        assert image.digests[16 * block : 16 * block + 16] == expected_digests(bytes(BLOCK))
    assert resident_pages() - before < 1024


def test_change_drops_digests_and_warns_once(make_image: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = make_image(8 * BLOCK)
    image = Images().add(path)
    for round_ in (1, 2):
        image.note_digests(0, path.read_bytes())
        image.update(image.examine())
        assert image.generation == round_ - 1
        assert image.digests[:16] != bytes(16)
        os.utime(path, ns=(0, round_))
        image.update(image.examine())
        assert image.generation == round_
        assert image.digests[: 8 * 16] == bytes(8 * 16)
        assert image.mtime_ns == round_
    assert [record.message for record in caplog.records] == [
        f"image {path} has changed while mounted: its digests are dropped"
    ]


def test_replaced_file_goes_on_being_served(make_image: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = make_image(2 * BLOCK)
    data = path.read_bytes()
    image = Images().add(path)
    make_image(2 * BLOCK, "new", seed=2).rename(path)
    for _ in range(2):
        image.update(image.examine())
    assert image.read(0, 2 * BLOCK) == data != path.read_bytes()
    assert [record.message for record in caplog.records] == [
        f"image {path} is no longer at its path: the file that was opened goes on being served"
    ]


def test_truncated_image_fails_beyond_its_end(
    make_image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = make_image(8 * BLOCK)
    data = path.read_bytes()
    image = Images().add(path)
    os.truncate(path, 3 * BLOCK + 5)
    assert image.size == 8 * BLOCK
    assert image.read(0, 3 * BLOCK) == data[: 3 * BLOCK]
    for offset in (3 * BLOCK, 2 * BLOCK, 6 * BLOCK):
        assert not image.read_cached(memoryview(bytearray(2 * BLOCK)), offset)
        with pytest.raises(OSError, match="ends early") as caught:
            image.read(offset, 2 * BLOCK)
        assert caught.value.errno == errno.EIO
    image.update(image.examine())
    assert any("was cut short" in record.message for record in caplog.records)


def test_block_device(make_image: Callable[..., Path], lacking: Callable[[str], None]) -> None:
    path = make_image(64 * BLOCK)
    made = subprocess.run(["losetup", "--find", "--show", "--read-only", path], capture_output=True, text=True)
    if made.returncode != 0:
        lacking(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        image: Image = Images().add(Path(device), "loop.raw")
        assert image.size == 64 * BLOCK
        assert image.read(5 * BLOCK, 2 * BLOCK) == path.read_bytes()[5 * BLOCK : 7 * BLOCK]
        image.update(image.examine())
        assert image.generation == 0
        image.close()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
