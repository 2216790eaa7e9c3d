"""What is read for others who cache it themselves does not stay in the page cache, and what was there before does."""

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from udedup.vdi.formats import raw
from udedup.vdi.formats.raw import RWF_DONTCACHE, RawFile

SIZE = 1 << 20
PAGE = 4096
CACHESTAT = 451


def cached_pages(descriptor: int) -> int:
    """By cachestat(2)."""
    span, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(CACHESTAT, descriptor, span, found, 0):
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(found[0])


@pytest.fixture
def file(tmp_path: Path) -> RawFile:
    """On the disk, and in no cache."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return RawFile(path, descriptor)


def read(file: RawFile) -> bytes:
    """As the mount does: from memory if that will do, else from the disk."""
    view = memoryview(bytearray(SIZE))
    if not file.read_cached(view, 0):
        file.read_into(view, 0)
    return bytes(view)


def require_passing(file: RawFile) -> None:
    """Skips where the kernel or the file system can't do it."""
    if cached_pages(file.descriptor):
        pytest.skip("this file system keeps all files in memory")
    try:
        os.preadv(file.descriptor, [bytearray(PAGE)], 0, RWF_DONTCACHE)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("no RWF_DONTCACHE: Linux 6.14 or a file system that has it")
    # What this has read ahead.
    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def test_what_was_read_does_not_stay(file: RawFile) -> None:
    require_passing(file)
    file.passing = True
    content = file.path.read_bytes()
    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert read(file) == content
    assert cached_pages(file.descriptor) == 0


def test_what_was_there_before_stays(file: RawFile) -> None:
    require_passing(file)
    file.passing = True
    content = file.path.read_bytes()
    before = cached_pages(file.descriptor)
    assert before == SIZE // PAGE
    assert read(file) == content
    assert cached_pages(file.descriptor) == before


def test_others_have_it_cached(file: RawFile) -> None:
    content = read(file)
    assert content == file.path.read_bytes()
    assert cached_pages(file.descriptor) == SIZE // PAGE


def test_where_it_cannot_be_had(file: RawFile, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file.path.read_bytes()
    flags_seen = []

    def refuse(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        if flags & RWF_DONTCACHE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return os.preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr(raw, "os", Os(refuse))
    file.passing = True
    assert read(file) == content
    assert read(file) == content
    assert sum(bool(flags & RWF_DONTCACHE) for flags in flags_seen) == 1


class Os:
    """The module os, but for one function."""

    def __init__(self, preadv: Any) -> None:
        self.preadv = preadv

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)
