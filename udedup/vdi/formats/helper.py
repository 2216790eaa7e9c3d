"""What only QEMU can decode, read by a qemu-nbd of our own: compressed and encrypted qcow2, VMDK, VHD, VHDX.

The process is started by the first read, gets the file as an open descriptor, and opens nothing an image might name:
its backing file is switched off. Its one connection exists before it does, and it ends when that is closed: so it ends
with the engine, whatever happens to that. If it ends before, the next read starts another one, with back-off.
"""

import errno
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final

import attrs
import trio

from udedup.errors import UdedupError
from udedup.vdi.formats.layer import Extent, Layer
from udedup.vdi.formats.nbd import NbdClient, NbdError
from udedup.vdi.formats.raw import RawFile

log = logging.getLogger(__name__)

PACKAGES: Final = {"qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils"}
"""Of Debian, by program."""
START_SECONDS: Final = 10.0
# systemd's socket activation: the listening socket is descriptor 3, given as the standard output. Popen itself hands on
# standard descriptors only: for others it would have the child close all the rest one by one, while this process
# stands still; and closing a file of our own mount takes an answer from this process.
ACTIVATE: Final = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@" 3<&1 >/dev/null'
INFO_SECONDS: Final = 30.0
END_SECONDS: Final = 1.0
BACKOFF_SECONDS_MIN: Final = 0.5
BACKOFF_SECONDS_MAX: Final = 60.0
REPORT_SECONDS: Final = 60.0


def require_program(name: str, subject: str) -> str:
    """The path of a program this takes. Raises UdedupError, which begins with ``subject``."""
    found = shutil.which(name)
    if found is None:
        raise UdedupError(f"{subject}: reading it takes {name}, which is missing; install the package {PACKAGES[name]}")
    return found


def environment() -> dict[str, str]:
    """For QEMU's programs: nothing of ours (such as a library to preload), messages in English."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


@attrs.frozen
class Recipe:
    """How QEMU is to open a file."""

    driver: str
    """QEMU's name of the format."""
    file: RawFile
    encryption: str | None = None
    """How it is encrypted, in QEMU's words."""
    secret: Path | None = None
    """File with the passphrase, for then."""

    def image(self) -> str:
        """What to give QEMU as the name of the image, which is its standard input.

        Without QEMU's locks: it is a reader like any other.
        """
        kind = "host_device" if stat.S_ISBLK(self.file.status.st_mode) else "file"
        node: dict[str, object] = {
            "driver": self.driver,
            "backing": None,
            "file": {"driver": kind, "filename": "/proc/self/fd/0", "locking": "off"},
        }
        if self.encryption is not None:
            node["encrypt"] = {"format": self.encryption, "key-secret": "passphrase"}
        return "json:" + json.dumps(node)

    def options(self) -> list[str]:
        """Options that go before the image."""
        if self.secret is None:
            return []
        return ["--object", json.dumps({"qom-type": "secret", "id": "passphrase", "file": str(self.secret)})]


def virtual_size(recipe: Recipe, subject: str) -> int:
    """Bytes of the disk, as qemu-img tells; waits for it. Raises UdedupError, which begins with ``subject``."""
    command = [require_program("qemu-img", subject), "info", "--output=json", recipe.image()]
    try:
        done = subprocess.run(
            command,
            stdin=recipe.file.descriptor,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=INFO_SECONDS,
            check=False,
            env=environment(),
            close_fds=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UdedupError(f"{subject}: qemu-img failed: {error}") from error
    if done.returncode:
        raise UdedupError(f"{subject}: {said(done.stderr) or 'qemu-img failed without a word'}")
    info = json.loads(done.stdout)
    if "backing-filename" in info:
        raise UdedupError(f"{subject}: has a parent, which is supported for qcow2 and VDI only; convert it to qcow2")
    size = info["virtual-size"]
    if not 0 < size < 1 << 62:
        raise UdedupError(f"{subject}: gives a disk of {size} bytes, which can't be served")
    return int(size)


def launch(recipe: Recipe, errors: IO[bytes]) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Starts a qemu-nbd for ``recipe`` and returns it with a connection to it; ``errors`` is where it complains.

    Waits for the process to be made, so this is for a worker thread. Raises OSError or UdedupError.
    """
    command = ["/bin/sh", "-c", ACTIVATE, require_program("qemu-nbd", "the image"), "--read-only"]
    with (
        tempfile.TemporaryDirectory(prefix="udedup-nbd-") as directory,
        socket.socket(socket.AF_UNIX) as listener,
        ExitStack() as stack,
    ):
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{directory}/socket")
        listener.listen(1)
        client.connect(f"{directory}/socket")
        client.setblocking(False)
        process = subprocess.Popen(
            [*command, *recipe.options(), recipe.image()],
            stdin=recipe.file.descriptor,
            stdout=listener.fileno(),
            stderr=errors,
            env=environment(),
            close_fds=False,
        )
        stack.pop_all()
    return process, client


def said(text: str) -> str:
    """The last line of what a program of QEMU's said, without the name it was given for the image; fit for a log."""
    lines = text.strip().splitlines() or [""]
    last = lines[-1].rpartition("}}': ")[2].removeprefix("qemu-img: ")
    return "".join(character if character.isprintable() else "?" for character in last)


class Helper:
    """The source of what one qemu-nbd serves; the offset is that on the disk of its image."""

    def __init__(self, recipe: Recipe, size: int) -> None:
        self.recipe = recipe
        self.size = size
        """Bytes that the export must have."""
        self._lock = trio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._client: NbdClient | None = None
        self._backoff = 0.0
        self._not_before = 0.0
        self._silent_until = 0.0
        self._stale = False

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._process is None else self._process.pid

    def read_cached(self, view: memoryview, offset: int) -> bool:
        return False

    def read_into(self, view: memoryview, offset: int) -> None:
        """For threads that trio has started (trio.to_thread)."""
        trio.from_thread.run(self.fetch, view, offset)

    def data_at(self, offset: int, length: int) -> tuple[bool, int]:
        return True, length

    async def fetch(self, view: memoryview, offset: int) -> None:
        """Fills ``view``, one call at a time. Raises OSError if the process can't read it or can't be had."""
        async with self._lock:
            if self._stale:
                self.close()
            if self._client is not None:
                try:
                    return await self._read(self._client, view, offset)
                except NbdError as error:
                    self._report(f"qemu-nbd has ended ({error}); it is started again")
            return await self._read_anew(view, offset)

    def forget(self) -> None:
        """The process would go by what it has read before: the next read starts another one."""
        self._stale = True

    async def _read_anew(self, view: memoryview, offset: int) -> None:
        """Starts a process first, unless that has failed just before."""
        if trio.current_time() < self._not_before:
            raise OSError(errno.EIO, "qemu-nbd has failed and is not started again yet")
        try:
            self._stale = False
            await self._read(await self._start(), view, offset)
        except (NbdError, UdedupError) as error:
            self._backoff = min(max(2 * self._backoff, BACKOFF_SECONDS_MIN), BACKOFF_SECONDS_MAX)
            self._not_before = trio.current_time() + self._backoff
            raise OSError(errno.EIO, f"qemu-nbd failed: {error}") from error

    async def _read(self, client: NbdClient, view: memoryview, offset: int) -> None:
        usable = False
        try:
            await client.read_into(view, offset)
            self._backoff, usable = 0.0, True
        except OSError:
            usable = True
            raise
        finally:
            # A read that was cancelled, too, leaves a connection on which nobody knows what comes next.
            if not usable:
                self.close()

    def _report(self, text: str) -> None:
        """Logs a warning, at most one a minute."""
        if trio.current_time() >= self._silent_until:
            self._silent_until = trio.current_time() + REPORT_SECONDS
            log.warning("image %s: %s", self.recipe.file.path, text)

    async def _start(self) -> NbdClient:
        """Starts the process and agrees with it. Raises NbdError or UdedupError; nothing is left running then."""
        with tempfile.TemporaryFile() as errors:
            agreed = False
            try:
                # Not to be abandoned: somebody has to own what it starts.
                self._process, client = await trio.to_thread.run_sync(launch, self.recipe, errors)
                self._client = NbdClient(trio.SocketStream(trio.socket.from_stdlib_socket(client)))
                with trio.fail_after(START_SECONDS):
                    await self._client.negotiate()
                self._check_size(self._client)
                agreed = True
            except trio.TooSlowError:
                raise NbdError(f"it is not ready after {START_SECONDS:g} s") from None
            except OSError as error:
                raise NbdError(f"it can't be started: {error.strerror}") from error
            except NbdError as error:
                self.close()
                errors.seek(0)
                # What it said before it went is the better reason.
                raise NbdError(said(errors.read().decode("utf-8", "replace")) or str(error)) from error
            finally:
                if not agreed:
                    self.close()
            return self._client

    def _check_size(self, client: NbdClient) -> None:
        if client.size < self.size:
            raise NbdError(f"it serves {client.size} bytes instead of {self.size}")

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is not None:
            self._process.kill()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("qemu-nbd (process %d) waits for a disk and ends when that answers", self._process.pid)
            self._process = None


class HelperImage(Layer):
    """An image that is read by its helper from end to end."""

    def __init__(self, helper: Helper) -> None:
        self.size = helper.size
        self.helper = helper

    def lookup(self, offset: int, length: int, *, wait: bool) -> Extent:
        return Extent(self.helper, offset, length)

    def forget(self) -> None:
        self.helper.forget()

    def close(self) -> None:
        self.helper.close()
        self.helper.recipe.file.close()
