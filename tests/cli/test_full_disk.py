"""Where the engine writes there is no room left: it says so, and serves on."""

import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import Engine, start_engine
from support.ledger import Ledger
from support.tmpfs import mount_tmpfs

from udedup.engine import control
from udedup.vdi.keeping import RACY_NS

MIB = 1 << 20
IMAGE_BYTES = 8 * MIB
"""Its digests take 32 KiB."""
PATIENCE = 40.0

pytestmark = pytest.mark.require("root")


@pytest.fixture
def full(tmp_path: Path, ledger: Ledger) -> Path:
    """A directory on a file system with one page of room."""
    directory = mount_tmpfs(tmp_path / "full", "size=8K,mode=700", ledger)
    (directory / "filling").write_bytes(b"x" * 4096)
    return directory


def serves(engine: Engine, content: bytes) -> bool:
    """Whether all of the image can be read, and status is answered."""
    assert engine.mount is not None
    assert engine.status()["images"]
    return (engine.mount / "disk").read_bytes() == content


@pytest.mark.require("fuse")
def test_state_directory_without_room(full: Path, tmp_path: Path, engine_factory: Callable[..., Engine]) -> None:
    """Nothing is kept for the next engine, which finds nothing that it must not believe."""
    image, content = tmp_path / "disk", random.Random(5).randbytes(IMAGE_BYTES)
    image.write_bytes(content)
    # What was read of a file that had just been written to is not kept.
    time.sleep(1.1 * RACY_NS / 1e9)
    engine = engine_factory("--state-dir", str(full), images={"disk": image})
    assert serves(engine, content)
    deadline = time.monotonic() + PATIENCE
    while "No space left" not in engine.log.read_text():
        assert time.monotonic() < deadline, engine.log.read_text()
        time.sleep(0.1)
    assert serves(engine, content)
    assert engine.stop() == 0
    (line,) = engine.log.read_text().splitlines()
    assert "its digests are no longer kept" in line
    assert (full / "filling").read_bytes() == b"x" * 4096
    # The next one finds what was begun, and serves as well.
    engine = engine_factory("--state-dir", str(full), images={"disk": image})
    assert serves(engine, content)
    assert engine.stop() == 0


def test_log_without_room(tmp_path: Path, ledger: Ledger) -> None:
    """Lines that nobody can write are lost; the engine is not."""
    (tmp_path / "engine.log").symlink_to("/dev/full")
    engine = start_engine(tmp_path, ledger, mount=False)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(engine.socket))
            client.send(os.urandom(100))  # which is worth a warning
            assert client.recv(1000)
    assert control.request(engine.socket, {"op": "status", "kernel": False})["agents"] == []
    assert engine.stop() == 0
