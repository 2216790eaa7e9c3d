"""What only QEMU can decode, through a qemu-nbd of our own."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from udedup.errors import UdedupError
from udedup.vdi.formats.helper import Helper
from udedup.vdi.formats.probe import Opening
from udedup.vdi.images import Image

from .conftest import KIB, MIB, check, expected, opened, qemu_img, qemu_io, scribble

Disk = Callable[..., Path]


async def check_aside(image: Image, data: bytes) -> None:
    with trio.fail_after(60):
        await trio.to_thread.run_sync(check, image, data)


async def read(image: Image, offset: int, size: int) -> memoryview:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(image.read, offset, size)


def helper_of(image: Image, offset: int = 0) -> Helper:
    extent = image._layer.lookup(offset, 1, wait=True)
    assert extent is not None
    assert isinstance(extent.source, Helper)
    return extent.source


@pytest.fixture
def compressed(disk: Disk, tmp_path: Path) -> Path:
    """A compressed image, some of whose first clusters have been written to since; those from 4 to 7 MiB have not."""
    plain = disk("plain.qcow2")
    qemu_io(plain, f"write -P 3 4M {3 * MIB}", "write -P 4 5M 512", "write -P 5 6M 100k")
    path = tmp_path / "small.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", plain, path)
    scribble(path, 5, 4 * MIB)
    return path


@pytest.mark.parametrize("kind", ["vmdk", "vpc", "vhdx"])
@pytest.mark.parametrize("suffix", ["", ".img"])
async def test_whole_formats(tmp_path: Path, disk: Disk, kind: str, suffix: str) -> None:
    path = tmp_path / f"disk.{kind}{suffix}"
    qemu_img("convert", "-O", kind, disk("plain.raw", "raw"), path)
    image = opened(path)
    assert image.format == kind
    await check_aside(image, expected(path, kind))
    image.close()


async def test_fixed_vhd(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "disk.vhd"
    qemu_img("convert", "-O", "vpc", "-o", "subformat=fixed", disk("plain.raw", "raw"), path)
    image = opened(path)
    assert (image.format, image.name) == ("vpc", "disk.raw")
    await check_aside(image, expected(path, "vpc"))
    image.close()


async def test_stream_optimized_vmdk(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", disk("plain.raw", "raw"), path)
    image = opened(path)
    await check_aside(image, expected(path, "vmdk"))
    image.close()


@pytest.mark.parametrize("options", ["compression_type=zlib", "compression_type=zstd", "extended_l2=on"])
async def test_compressed_qcow2(tmp_path: Path, disk: Disk, options: str) -> None:
    path = tmp_path / "small.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, disk("plain.qcow2"), path)
    scribble(path, 5, 24 * MIB)
    image = opened(path)
    await check_aside(image, expected(path, "qcow2"))
    image.close()


async def test_overlay_over_compressed_base(tmp_path: Path, compressed: Path) -> None:
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", compressed.name, "-F", "qcow2", path)
    scribble(path, 6, 24 * MIB)
    image = opened(path)
    await check_aside(image, expected(path, "qcow2"))
    image.close()


async def test_compressed_overlay_shows_its_base(tmp_path: Path, disk: Disk) -> None:
    """The helper has no backing file: what the overlay lacks comes by the map."""
    base = disk("base.raw", "raw")
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", path)
    qemu_io(path, "write -c -P 7 64k 64k", "write -c -P 8 1M 64k", "write -P 9 2M 64k")
    image = opened(path)
    await check_aside(image, expected(path, "qcow2"))
    image.close()


def encrypt(plain: Path, path: Path, secret: Path, method: str) -> None:
    """Has QEMU make an encrypted image, which it refuses when it can't measure how fast the processor is just now."""
    escaped = str(secret).replace(",", ",,")
    options = f"encrypt.format={method},encrypt.key-secret=s" + ",encrypt.iter-time=10" * (method == "luks")
    for _ in range(10):
        done = subprocess.run(
            ["qemu-img", "convert", "--object", f"secret,id=s,file={escaped}", "-O", "qcow2", "-o", options,
             plain, path],
            capture_output=True, text=True,
        )  # fmt: skip
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["luks", "aes"])
async def test_encrypted_qcow2(tmp_path: Path, disk: Disk, method: str) -> None:
    secret, wrong = tmp_path / "secret, with a comma", tmp_path / "wrong"
    secret.write_text("open sesame")
    wrong.write_text("abracadabra")
    plain = disk("plain.raw", "raw", 4 * MIB)
    path = tmp_path / "disk.qcow2"
    encrypt(plain, path, secret, method)
    with pytest.raises(UdedupError, match="--secret-file"):
        opened(path)
    image = opened(path, Opening(secret=secret))
    await check_aside(image, plain.read_bytes())
    image.close()
    if method == "luks":
        # aes, of old, takes any passphrase.
        image = opened(path, Opening(secret=wrong))
        with pytest.raises(OSError, match="Invalid password") as caught:
            await read(image, 0, 2 * MIB)
        assert caught.value.errno == errno.EIO
        image.close()


async def test_started_by_the_first_read_only(compressed: Path) -> None:
    image = opened(compressed)
    helper = helper_of(image, 5 * MIB)
    assert helper.pid is None
    await read(image, 5 * MIB, 4 * KIB)
    assert helper.pid is not None
    image.close()


async def test_killed_helper_is_started_again(compressed: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = opened(compressed)
    data = expected(compressed, "qcow2")
    helper = helper_of(image, 5 * MIB)
    for _ in range(3):
        assert await read(image, 5 * MIB, 64 * KIB) == data[5 * MIB : 5 * MIB + 64 * KIB]
        assert helper.pid is not None
        os.kill(helper.pid, signal.SIGKILL)
    (record,) = caplog.records
    assert "it is started again" in record.message
    image.close()


async def test_helper_that_does_not_start(
    compressed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """EIO at once while it backs off, and another start after that."""
    image = opened(compressed)
    helper = helper_of(image, 5 * MIB)
    mock_clock.rate = 1
    starts = tmp_path / "starts"
    program = tmp_path / "qemu-nbd"
    program.write_text(f"#!/bin/sh\necho >> {starts}\necho 'qemu-nbd: no such luck' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    view = memoryview(bytearray(512))
    for attempt in (1, 2, 3):
        for expectation in ("no such luck", "not started again yet", "not started again yet"):
            with pytest.raises(OSError, match=expectation) as caught:
                await helper.fetch(view, 5 * MIB)
            assert caught.value.errno == errno.EIO
        assert len(starts.read_text().splitlines()) == attempt
        mock_clock.jump(100)
    monkeypatch.undo()
    await helper.fetch(view, 5 * MIB)
    image.close()


async def test_cancelled_read_does_not_mix_up_the_next(compressed: Path) -> None:
    image = opened(compressed)
    data = expected(compressed, "qcow2")
    helper = helper_of(image, 5 * MIB)
    for moment in range(40):
        with trio.move_on_after(moment / 2000):
            await helper.fetch(memoryview(bytearray(MIB)), 4 * MIB)
        view = memoryview(bytearray(64 * KIB))
        with trio.fail_after(10):
            await helper.fetch(view, 5 * MIB)
        assert view == data[5 * MIB : 5 * MIB + 64 * KIB]
    image.close()


@pytest.mark.parametrize("program", ["qemu-nbd", "qemu-img"])
async def test_missing_program_names_the_package(
    tmp_path: Path, disk: Disk, compressed: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmdk = tmp_path / "disk.vmdk"
    qemu_img("convert", "-O", "vmdk", disk("plain.raw", "raw"), vmdk)
    real = {name: Path(f"/usr/bin/{name}") for name in ("qemu-nbd", "qemu-img") if name != program}
    monkeypatch.setattr("shutil.which", lambda name: str(real[name]) if name in real else None)
    for path in (vmdk, compressed) if program == "qemu-nbd" else (vmdk,):
        with pytest.raises(UdedupError, match=f"{program}, which is missing; install the package qemu-utils") as caught:
            opened(path)
        assert "\n" not in str(caught.value)


DIES = """
import os, sys, trio
from pathlib import Path
from udedup.vdi.images import Images

async def main():
    image = Images().add(Path(sys.argv[1]))
    await trio.to_thread.run_sync(image.read, 5 << 20, 4096)
    extent = image._layer.lookup(5 << 20, 1, wait=True)
    # Longer than trio keeps an idle thread.
    await trio.sleep(12)
    await trio.to_thread.run_sync(image.read, 5 << 20, 4096)
    print(extent.source.pid, flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


def test_helper_ends_with_its_engine(compressed: Path) -> None:
    """Also when that is killed; and not when the thread that happened to read first ends."""
    with subprocess.Popen([sys.executable, "-c", DIES, compressed], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}/comm").read_text() == "qemu-nbd\n"
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


async def test_close_ends_it(compressed: Path) -> None:
    image = opened(compressed)
    helper = helper_of(image, 5 * MIB)
    await read(image, 5 * MIB, 512)
    pid = helper.pid
    image.close()
    assert not Path(f"/proc/{pid}").exists()


async def test_hidden_corruption_is_eio(compressed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with compressed.open("r+b") as file:
        file.seek(320 * KIB)
        file.write(b"\xff" * MIB)
    image = opened(compressed)
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match=r"qemu-nbd|corrupt") as caught:
        await read(image, 0, 24 * MIB)
    assert caught.value.errno == errno.EIO
    image.close()
