import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from udedup.errors import UdedupError
from udedup.vdi import mountpoint
from udedup.vdi.mountpoint import Mount, parse_mount, prepare


def refused(path: Path) -> str:
    """The one line that mounting on this path is refused with."""
    with pytest.raises(UdedupError) as caught:
        prepare(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"mount point {path}: ")
    return text


def test_missing(place: Path) -> None:
    assert "create it" in refused(place / "none")


def test_file(place: Path) -> None:
    (place / "file").touch()
    assert "not a directory" in refused(place / "file")


def test_not_empty(place: Path) -> None:
    (place / "file").touch()
    assert "not empty" in refused(place)


def test_link_is_followed(place: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    assert prepare(place / "link") == place / "real"


def test_relative(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "real").mkdir()
    monkeypatch.chdir(place)
    assert prepare(Path("real")) == place / "real"


@pytest.fixture
def tmpfs(place: Path, lacking: Callable[[str], None]) -> Iterator[Path]:
    """An empty tmpfs in a directory with a blank in its name."""
    directory = place / "other mount"
    directory.mkdir()
    if os.geteuid() != 0:
        lacking("mounting a tmpfs needs root")
    subprocess.run(["mount", "-t", "tmpfs", "some source", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=False)


def test_in_use_names_the_mount(tmpfs: Path) -> None:
    text = refused(tmpfs)
    assert "in use: some source (tmpfs)" in text


def test_detach(tmpfs: Path) -> None:
    with (tmpfs / "file").open("w"):
        mountpoint.detach(tmpfs)
    assert mountpoint.mount_at(tmpfs) is None
    with pytest.raises(UdedupError, match="can't be unmounted") as caught:
        mountpoint.detach(tmpfs)
    assert "\n" not in str(caught.value)


def test_parse_mount() -> None:
    line = r"42 27 0:39 / /tmp/a\040b\134c ro,nosuid shared:1 master:2 - fuse.udedup udedup ro,user_id=0"
    assert parse_mount(line) == Mount(os.makedev(0, 39), Path(r"/tmp/a b\c"), "fuse.udedup", "udedup")
    assert parse_mount(line).ours
    assert not parse_mount("22 1 8:1 / / rw - ext4 /dev/sda1 rw").ours


def test_no_fuse_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str, flags: int) -> int:
        raise FileNotFoundError(2, "No such file or directory", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", missing)
        with pytest.raises(UdedupError, match="load the kernel module fuse"):
            mountpoint.require_fuse(allow_other=False)


def test_no_fusermount(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    device = os.open(os.devnull, os.O_RDWR)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        patch.setattr(os, "open", lambda path, flags: device)
        patch.setenv("PATH", str(place))
        with pytest.raises(UdedupError, match="install the package fuse3"):
            mountpoint.require_fuse(allow_other=False)
