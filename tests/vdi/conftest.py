"""Mounts for tests: made in a temporary directory, swept if an earlier run left some, aborted if a test hangs."""

import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NoReturn

import attrs
import pytest
import trio
import xxhash

from udedup.errors import UdedupError
from udedup.vdi import mountpoint as mountpoints
from udedup.vdi.filesystem import serve
from udedup.vdi.images import Image, Images

CONNECTIONS = Path("/sys/fs/fuse/connections")
HANG_SECONDS = 60
# Arguments: seconds, directory, the control file system of FUSE.
WATCHDOG = """
sleep "$1"
grep -F " $2/" /proc/self/mountinfo | while read -r _ _ device _; do echo 1 > "$3/${device#*:}/abort"; done
"""
BLOCK = 4096
PREFIX = "udedup-vdi-"


@attrs.define
class Mounted:
    """A mount that is being served in the test's own loop."""

    directory: Path
    device: int
    images: Images
    hints: list[tuple[Image, int, int, int]]
    scope: trio.CancelScope
    ended: trio.Event

    async def end(self) -> None:
        """Cancels the server and waits until it has cleaned up."""
        self.scope.cancel()
        await self.ended.wait()


Mounter = Callable[..., Awaitable[Mounted]]


def give_up(reason: str) -> NoReturn:
    """Skips for a missing capability; under CI with root that is a failure."""
    if os.environ.get("CI") == "true" and os.geteuid() == 0:
        pytest.fail(f"not possible here, but should be in CI: {reason}")
    pytest.skip(reason)


def abort_mounts(below: Path) -> None:
    """Aborts the connections of our mounts below ``below`` (their readers get errors) and unmounts them."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        mount = mountpoints.parse_mount(line)
        if mount.ours and mount.directory.is_relative_to(below):
            abort = CONNECTIONS / str(os.minor(mount.device)) / "abort"
            if abort.parent.is_dir():
                abort.write_text("1", encoding="ascii")
            mountpoints.detach(mount.directory)


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    """Mounts of earlier runs whose process is gone are taken away before the first test.

    Only such: their directory, named after the process, tells.
    """
    if os.geteuid() == 0 and not CONNECTIONS.is_mount():
        subprocess.run(["mount", "-t", "fusectl", "none", str(CONNECTIONS)], check=True)
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = directory.name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{owner}").exists():
            abort_mounts(directory)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter (pytest's own are private)."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        # A process of its own: pyfuse3 reads requests with the GIL held, so a hung loop stops all threads of this one.
        command = ["/bin/sh", "-c", WATCHDOG, "watchdog", str(HANG_SECONDS), name, str(CONNECTIONS)]
        with subprocess.Popen(command, start_new_session=True) as watchdog:
            try:
                yield directory
            finally:
                os.killpg(watchdog.pid, signal.SIGKILL)
                abort_mounts(directory)


@pytest.fixture
def make_image(place: Path) -> Callable[..., Path]:
    """``make_image(size, name="disk.raw", seed=1)`` writes a file of random bytes and returns its path."""

    def make(size: int, name: str = "disk.raw", seed: int = 1) -> Path:
        path = place / name
        path.write_bytes(random.Random(seed).randbytes(size))
        return path

    return make


@pytest.fixture
def fuse() -> None:
    try:
        mountpoints.require_fuse(allow_other=False)
    except UdedupError as error:
        give_up(str(error))


@pytest.fixture
async def mounter(fuse: None, place: Path, nursery: trio.Nursery) -> Mounter:
    """``await mounter(images, directory=None, allow_other=False)`` serves images until the test ends."""

    async def start(images: Images, directory: Path | None = None, *, allow_other: bool = False) -> Mounted:
        if directory is None:
            directory = place / "mount"
            directory.mkdir()
        hints: list[tuple[Image, int, int, int]] = []
        scope, ended = trio.CancelScope(), trio.Event()

        async def run(task_status: trio.TaskStatus[int]) -> None:
            try:
                with scope:
                    await serve(
                        directory,
                        images,
                        lambda *hint: hints.append(hint),
                        allow_other=allow_other,
                        task_status=task_status,
                    )
            finally:
                ended.set()

        with trio.fail_after(20):
            device: int = await nursery.start(run)
        return Mounted(directory, device, images, hints, scope, ended)

    return start


@pytest.fixture
def expected_digests() -> Callable[[bytes], bytes]:
    """The digest table that belongs to some data, by Python's own xxhash."""

    def digests(data: bytes) -> bytes:
        table = b""
        for start in range(0, len(data) - len(data) % BLOCK, BLOCK):
            value = xxhash.xxh3_128_intdigest(data[start : start + BLOCK])
            table += value.to_bytes(16, "little")
        return table

    return digests


@pytest.fixture
def lacking() -> Callable[[str], NoReturn]:
    """Call it with a reason when the machine lacks what a test needs."""
    return give_up
