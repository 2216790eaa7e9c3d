"""What becomes of requests where pyfuse3 is not what we know. What fallocate does is in tests/cli/test_clone.py."""

import errno
import os

import pyfuse3
import pytest

from udedup import _native
from udedup._native import lib  # type: ignore[import-not-found, unused-ignore]
from udedup.vdi import requests


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
