"""Requests past pyfuse3: errors end the mount and reach who asked, and without it all goes pyfuse3's way.

What fallocate does is in tests/cli/test_clone.py.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import pytest
import trio

from udedup import _native
from udedup._native import lib  # type: ignore[import-not-found, unused-ignore]
from udedup.vdi import requests

WITHOUT = """
import sys, trio, pyfuse3
from pathlib import Path
from udedup.fallocate import punch_hole
from udedup.vdi.filesystem import serve
from udedup.vdi.images import Images

async def main(mountpoint, image):
    images = Images()
    images.add(image)
    pyfuse3.__file__ = "/nowhere.so"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, mountpoint, images, lambda *hint: None)
        assert await trio.to_thread.run_sync((mountpoint / image.name).read_bytes) == image.read_bytes()
        nursery.cancel_scope.cancel()

trio.run(main, *map(Path, sys.argv[1:]))
"""


def test_objects_that_make_no_sessions_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert lib.udd_session_prepare(b"/nowhere.so") == -errno.ENOENT
    assert lib.udd_session_prepare(os.fsencode(str(_native.__file__))) == -errno.ENOSYS
    monkeypatch.setattr(pyfuse3, "__file__", "/nowhere.so")
    requests.prepare()
    assert [record.getMessage() for record in caplog.records] == [
        f"pyfuse3 {pyfuse3.__version__} can't be got round: No such file or directory"
    ]
    assert not lib.udd_session_ours()


@pytest.mark.usefixtures("fuse")
def test_without_it_reads_go_through_pyfuse3(make_image: Callable[..., Path], place: Path) -> None:
    image, mountpoint = make_image(3 << 20), place / "mount"
    mountpoint.mkdir()
    # In a process of its own: what has been changed in pyfuse3 stays.
    command = [sys.executable, "-c", WITHOUT, mountpoint, image]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"pyfuse3 {pyfuse3.__version__} can't be got round: No such file or directory",
        "reads through the mount are slower, and discards on clones will fail and free no room",
    ]


class Answers:
    """What the kernel is told, by request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[int] = []
        monkeypatch.setattr(requests, "lib", self)

    def udd_request_fail(self, request: object, error: int) -> int:
        self.errors.append(error)
        return 0

    def udd_request_reply(self, request: object, data: object, size: int) -> int:
        raise AssertionError("there is nothing to reply")


@pytest.mark.parametrize("error", [pyfuse3.FUSEError(errno.ENODATA), ValueError("unforeseen"), trio.Cancelled])
async def test_whoever_waits_is_told_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | type[BaseException]
) -> None:
    answers = Answers(monkeypatch)

    async def rest() -> bytes:
        if isinstance(error, BaseException):
            raise error
        scope.cancel()
        await trio.sleep_forever()
        raise AssertionError

    with trio.CancelScope() as scope:
        if isinstance(error, ValueError):
            with pytest.raises(ValueError, match="unforeseen"):
                await requests.answer_read(object(), rest)
        else:
            await requests.answer_read(object(), rest)
    assert answers.errors == [errno.ENODATA if isinstance(error, pyfuse3.FUSEError) else errno.EIO]
