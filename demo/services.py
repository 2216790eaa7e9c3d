"""What the programs stand on: the engine with images in its mount, and a file system mounted on top."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

READY_SECONDS = 30.0
END_SECONDS = 20.0


@frozen
class Engine:
    """A serving engine."""

    pid: int
    """Its process."""

    socket: Path
    """Where it listens."""

    mount: Path
    """Where its images are."""


@contextmanager
def engine(run_folder: Path, images: Mapping[str, Path], options: Sequence[str]) -> Iterator[Engine]:
    """Runs an engine that shows raw images by the names given until the end of the block."""
    socket, mount = run_folder / "udedup.sock", run_folder / "images"
    mount.mkdir()
    command = [sys.executable, "-m", "udedup", "engine", "--socket", str(socket), "--mount", str(mount)]
    # PostgreSQL runs as a user of its own.
    command += ["--socket-mode", "666"]
    for name, image in images.items():
        command += ["--image", f"{name}={image}"]
    command += options
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], READY_SECONDS)[0]:
                raise RuntimeError(f"the engine is not ready after {READY_SECONDS:.0f} s")
            if not process.stdout.readline().startswith("ready"):
                raise RuntimeError("the engine did not start")
            yield Engine(pid=process.pid, socket=socket, mount=mount)
        finally:
            process.terminate()
            process.wait(END_SECONDS)


@contextmanager
def file_system(run_folder: Path, disk: Path) -> Iterator[Path]:
    """Mounts the ext4 file system in ``disk``, read-only and in user space, until the end of the block."""
    folder = run_folder / "files"
    folder.mkdir()
    # allow_other: PostgreSQL does not run as root.
    # In the foreground (-f) its end can be waited for. fakeroot: the files' owners are not this system's.
    command = ["fuse2fs", "-f", "-o", "ro,fakeroot,allow_other", str(disk), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + READY_SECONDS
        while not os.path.ismount(folder):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"fuse2fs did not mount {disk}")
            time.sleep(0.02)
        try:
            yield folder
        finally:
            subprocess.run(["fusermount3", "-u", str(folder)], check=True)
            process.wait(END_SECONDS)
