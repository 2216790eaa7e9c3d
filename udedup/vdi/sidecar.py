"""The sidecar: one image's digests in a file, so that what has been digested once is known the next time.

The file has a header, which says of what image it is, and a record for each page of the digest table, at a fixed place
(so it is as sparse as what has been read of the image): the page and its checksum. Records are written over one
another without any care for crashes. That is safe because nothing in the file is taken on trust: a header or record
whose checksum is wrong, torn by a crash or damaged, makes the whole file worthless, and its owner drops it. Checksums
are seeded with a number the file was given when it was made, so that nothing an earlier file has left on the disk can
pass for a record of this one.

Several engines and ``udedup index`` may use one sidecar: they take turns by a lock on the file, and who writes a page
takes over what others have entered in it meanwhile.
"""

import errno
import fcntl
import os
import secrets
import stat
import struct
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from udedup.vdi.digests import PAGE_BYTES, merge_digests

MAGIC: Final = b"udedup digests 1"
HEADER_BYTES: Final = 8192
# Magic, seed of the checksums, length of the identity that follows; behind that its checksum.
HEADER: Final = struct.Struct("<16sQI")
CHECKSUM: Final = struct.Struct("<Q")
RECORD_BYTES: Final = PAGE_BYTES + CHECKSUM.size
NO_RECORD: Final = bytes(RECORD_BYTES)
RUN_RECORDS: Final = 64
"""Records read or written in one go."""
LOCK_SECONDS: Final = 2.0
LOCK_PAUSE: Final = 0.01
SUFFIX: Final = ".digests"


class FileIdentity(msgspec.Struct, frozen=True, array_like=True):
    """One file, and the content it has as far as its attributes can tell."""

    path: bytes
    """128-bit digest of its path."""
    device: int
    """st_dev."""
    inode: int
    """st_ino."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, nanoseconds since the epoch."""


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """What digests belong to: an image with all the files it rests on."""

    format: str
    size: int
    """Bytes of the disk."""
    files: tuple[FileIdentity, ...]
    """The image itself first."""

    @property
    def name(self) -> str:
        """File name of the sidecar: by format, path and place of the image, not by what it holds just now."""
        first = self.files[0]
        key = msgspec.msgpack.encode((self.format, first.path, first.device, first.inode))
        return xxhash.xxh3_128_hexdigest(key) + SUFFIX


class UnfitError(Exception):
    """A sidecar can't be used; the text says why, to go on with a sentence."""


class DamagedError(UnfitError):
    """A checksum is wrong."""


class StaleError(UnfitError):
    """It is of what the image was before."""


class BusyError(Exception):
    """Another process holds the lock all the time."""


def digest_of_path(path: Path) -> bytes:
    """What stands for a path in an identity."""
    return xxhash.xxh3_128_digest(os.fsencode(path))


def others_may_write(status: os.stat_result) -> bool:
    """Whether users besides this one and root could have written what has this status."""
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


class Sidecar:
    """An open sidecar; its methods wait for the disk, and for other processes up to LOCK_SECONDS (then BusyError).

    They raise OSError if the disk fails. Not for two threads at a time.
    """

    def __init__(self, path: Path, descriptor: int, seed: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._seed = seed

    @classmethod
    def open(cls, path: Path, identity: Identity) -> "Sidecar":
        """Opens what is at ``path``; FileNotFoundError if nothing is, UnfitError if it won't do for ``identity``."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            seed = check(descriptor, identity)
            # Shows those that tidy up that it is in use.
            os.utime(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, seed)

    @classmethod
    def create(cls, path: Path, identity: Identity) -> "Sidecar":
        """Puts an empty one at ``path``, in the place of what is there; never is half of one found there."""
        seed = secrets.randbits(64)
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=SUFFIX, dir=path.parent)
        try:
            os.pwrite(descriptor, header(seed, identity), 0)
            os.fsync(descriptor)
            Path(temporary).rename(path)
        except BaseException:
            os.close(descriptor)
            Path(temporary).unlink(missing_ok=True)
            raise
        return cls(path, descriptor, seed)

    @property
    def replaced(self) -> bool:
        """Whether another process has dropped it."""
        return not os.fstat(self._descriptor).st_nlink

    def read(self, first: int, count: int) -> list[bytes | None]:
        """Pages [first, first + count) of the table; None for those that were never written. Raises DamagedError."""
        with locked(self._descriptor, fcntl.LOCK_SH):
            return self._read(first, count)

    def write(self, pages: Mapping[int, bytes], *, overwrite: Collection[int] = ()) -> None:
        """Enters pages by their number.

        What is not known in them and is in the file stays, but not in those whose numbers are in ``overwrite``.
        Raises DamagedError.
        """
        with locked(self._descriptor, fcntl.LOCK_EX):
            # What was written before is on the disk by now, and not needed in memory.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for run in runs(sorted(pages)):
                found = self._read(run.start, len(run))
                records = []
                for number, before in zip(run, found, strict=True):
                    page = pages[number]
                    if before is not None and number not in overwrite:
                        page = merge_digests(page, before)
                    records.append(page + CHECKSUM.pack(self._checksum(number, page)))
                write_all(self._descriptor, b"".join(records), place_of(run.start))

    def settle(self) -> None:
        """Waits until what was written is on the disk, and has the kernel forget it: who keeps digests has them."""
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Nothing can be read or written any more."""
        os.close(self._descriptor)

    def _read(self, first: int, count: int) -> list[bytes | None]:
        raw = os.pread(self._descriptor, count * RECORD_BYTES, place_of(first))
        raw = raw.ljust(count * RECORD_BYTES, b"\0")
        found: list[bytes | None] = []
        for number in range(count):
            record = raw[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
            if record == NO_RECORD:
                found.append(None)
                continue
            page = record[:PAGE_BYTES]
            if CHECKSUM.unpack_from(record, PAGE_BYTES)[0] != self._checksum(first + number, page):
                raise DamagedError(f"is damaged: the checksum of record {first + number} is wrong")
            found.append(page)
        # They are in the table from now on.
        os.posix_fadvise(self._descriptor, place_of(first), count * RECORD_BYTES, os.POSIX_FADV_DONTNEED)
        return found

    def _checksum(self, number: int, page: bytes) -> int:
        return xxhash.xxh3_64_intdigest(page, (self._seed + number) % (1 << 64))


@contextmanager
def locked(descriptor: int, kind: int) -> Iterator[None]:
    """Holds a lock of flock(2) on a file. Raises BusyError: who holds it may have been stopped."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise BusyError from None
            time.sleep(LOCK_PAUSE)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def place_of(number: int) -> int:
    """Byte in the file where the record of a page starts."""
    return HEADER_BYTES + number * RECORD_BYTES


def header(seed: int, identity: Identity) -> bytes:
    """The first HEADER_BYTES of a sidecar."""
    text = msgspec.msgpack.encode(identity)
    body = HEADER.pack(MAGIC, seed, len(text)) + text
    raw = body + CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, seed))
    if len(raw) > HEADER_BYTES:
        raise OSError(errno.EFBIG, "the image rests on too many files")
    return raw.ljust(HEADER_BYTES, b"\0")


def check(descriptor: int, identity: Identity) -> int:
    """The seed of a sidecar that will do for ``identity``; raises UnfitError for others."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or others_may_write(status):
        raise UnfitError("could have been written by somebody else")
    seed, found = parse_header(os.pread(descriptor, HEADER_BYTES, 0))
    if found != msgspec.msgpack.encode(identity):
        raise StaleError("is of what the image was before")
    return seed


def parse_header(raw: bytes) -> tuple[int, bytes]:
    """The seed and the encoded identity; raises DamagedError."""
    if len(raw) == HEADER_BYTES:
        magic, seed, length = HEADER.unpack_from(raw)
        end = HEADER.size + length
        if (
            magic == MAGIC
            and end + CHECKSUM.size <= HEADER_BYTES
            and CHECKSUM.unpack_from(raw, end)[0] == xxhash.xxh3_64_intdigest(raw[:end], seed)
        ):
            return seed, raw[HEADER.size : end]
    raise DamagedError("is damaged: its header is wrong")


def runs(numbers: list[int]) -> Iterator[range]:
    """Ascending numbers as ranges of neighbours, of RUN_RECORDS at most."""
    start = 0
    for index in range(1, len(numbers) + 1):
        neighbours = index < len(numbers) and numbers[index] == numbers[index - 1] + 1
        if not neighbours or index - start == RUN_RECORDS:
            yield range(numbers[start], numbers[index - 1] + 1)
            start = index


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Writes all of ``data``. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)
