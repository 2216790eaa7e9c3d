"""The clones of a user: which there are, what each rests on, and where its overlay is. They outlive engines.

Each has a record, ``NAME.json``, in a directory of its own below the state directory, and an overlay, ``NAME.qcow2``
beside it or where the user wants it: a qcow2 file with a backing file, as QEMU makes it. An overlay fits the base it
was made on only as long as nobody writes that, so the record says what the base's files were like.

Everything here waits for disks: call it in a worker thread.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Final

import attrs
import msgspec

from udedup.errors import UdedupError
from udedup.vdi.clone import Clone
from udedup.vdi.formats.helper import environment, require_program, said
from udedup.vdi.formats.layer import same_file
from udedup.vdi.formats.probe import Opened, Opening, open_chain, open_overlay
from udedup.vdi.formats.writable import lock_file
from udedup.vdi.images import FileStamp, Images, check_name, examine_file
from udedup.vdi.paths import open_named

SUFFIX: Final = ".json"
SHOWN_SUFFIX: Final = ".raw"
NAME_BYTES_MAX: Final = 200
"""Leaves room for what is added to it."""
OPTIONS: Final = "extended_l2=on,cluster_size=128k"
"""Of new overlays: parts of 4 KiB, so that no write of a block has to copy what is around it."""
RECORD_BYTES_MAX: Final = 1 << 20


class FileRecord(msgspec.Struct, frozen=True):
    """One file of a base as it was when the clone was made."""

    path: str
    size: int
    """Bytes."""
    mtime_ns: int
    """Last change, nanoseconds since the epoch."""


class Record(msgspec.Struct, frozen=True):
    """One clone."""

    name: str
    overlay: str
    """Absolute path."""
    base: str
    """Absolute path."""
    format: str
    """Of the base, in QEMU's words."""
    secret: str | None
    """File with the passphrase of the base."""
    files: list[FileRecord]
    """Of the base, itself first."""
    mount: str | None = None
    """Directory of the mount that shows the clone whenever an engine has it; None: none does."""
    committing: bool = False
    """Whether the base may have parts of the clone: a commit has begun."""


@attrs.frozen
class CloneStore:
    """The clones below one state directory."""

    directory: Path
    allow_backing: tuple[Path, ...] = ()
    """Directories in which bases may have their backing files, besides their own."""

    def create(self, name: str, base: Path, opening: Opening, overlay: Path | None) -> Record:
        """Makes a clone of the image at ``base``, and its overlay (which must not exist). Raises UdedupError."""
        check_clone_name(name)
        overlay = overlay or self.directory / f"{name}.qcow2"
        with as_one_line(f"clone {name}"):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._path(name).exists():
                raise UdedupError(f"clone {name}: there is one of that name; see `udedup clone list`")
            opened = open_chain(base, opening)
            try:
                size = opened.layer.size
                files = [record_of(Path(file.path), examine_file(file)[0]) for file in opened.files]
            finally:
                opened.layer.close()
            secret = None if opening.secret is None else str(opening.secret)
            record = Record(name, str(overlay), str(base), opened.format, secret, files)
            make_overlay(record, size)
            try:
                self._write(record, new=True)
            except BaseException:
                overlay.unlink()
                raise
        return record

    def get(self, name: str) -> Record:
        """The record of a clone. Raises UdedupError if there is none or it can't be read."""
        check_clone_name(name)
        path = self._path(name)
        try:
            with path.open("rb") as file:
                record = msgspec.json.decode(file.read(RECORD_BYTES_MAX), type=Record)
        except FileNotFoundError:
            raise UdedupError(f"clone {name}: there is none of that name; see `udedup clone list`") from None
        except (OSError, msgspec.DecodeError) as error:
            raise UdedupError(f"clone {name}: its record {path} can't be read: {error}") from error
        return record

    def names(self) -> list[str]:
        """Of all clones."""
        with as_one_line("clones"):
            if not self.directory.exists():
                return []
            return sorted(path.stem for path in self.directory.glob(f"*{SUFFIX}") if not path.name.startswith("."))

    def records(self) -> Iterator[Record]:
        """All whose records can be read."""
        for name in self.names():
            yield self.get(name)

    def show(self, record: Record, images: Images, mount: Path) -> Clone:
        """Shows a clone in the mount, there for the next engine too. Raises UdedupError."""
        clone = self.open(record, images)
        self.save(msgspec.structs.replace(record, mount=str(mount)))
        return clone

    def open(self, record: Record, images: Images) -> Clone:
        """Opens a clone and adds it to ``images``. Raises UdedupError."""
        subject = f"clone {record.name}"
        if record.committing:
            raise UdedupError(
                f"{subject}: its commit was interrupted; end it with `udedup clone commit {record.name}` first"
            )
        path = Path(record.overlay)
        with as_one_line(subject):
            opened = open_overlay(path, self._opening(record))
            try:
                check_base(record, opened)
                return images.admit(shown_name(record.name), path, opened, Clone)
            except BaseException:
                opened.layer.close()
                raise

    def save(self, record: Record) -> None:
        """Replaces the record of a clone. Raises UdedupError."""
        with as_one_line(f"clone {record.name}"):
            self._write(record, new=False)

    def commit(self, record: Record) -> None:
        """Writes what the clone has into its base and ends the clone. Nobody may have either open; see :meth:`users`.

        Raises UdedupError; the clone is there then, and the commit can be tried again.
        """
        subject = f"clone {record.name}"
        others = [other.name for other in self.users(record)]
        if others:
            raise UdedupError(f"{subject}: its base {record.base} is that of {', '.join(others)} too; end these first")
        if not record.committing:
            with as_one_line(subject):
                opened = open_overlay(Path(record.overlay), self._opening(record))
                try:
                    check_base(record, opened)
                finally:
                    opened.layer.close()
            self.save(msgspec.structs.replace(record, committing=True, mount=None))
        run_qemu_img(["commit", "-q", "-d", "-f", "qcow2", record.overlay], subject)
        with as_one_line(subject):
            sync_file(Path(record.base))
        self.discard(record)

    def users(self, record: Record) -> list[Record]:
        """Other clones that rest on the base of this one, or on this one."""
        found = []
        for other in self.records():
            paths = {file.path for file in other.files}
            if other.name != record.name and (
                paths & {record.overlay} or any(same_path(p, record.base) for p in paths)
            ):
                found.append(other)
        return found

    def discard(self, record: Record) -> None:
        """Removes a clone that nobody has open. Raises UdedupError if somebody has, or it can't be removed."""
        subject, path = f"clone {record.name}", Path(record.overlay)
        with as_one_line(subject):
            if path.exists():
                descriptor = open_named(path)
                try:
                    lock_file(descriptor, subject, write=False)
                finally:
                    os.close(descriptor)
                path.unlink()
            self._path(record.name).unlink()
            sync_directory(self.directory)

    def _opening(self, record: Record) -> Opening:
        places = (*self.allow_backing, Path(record.base).parent)
        return Opening(allow_backing=places, secret=None if record.secret is None else Path(record.secret))

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{SUFFIX}"

    def _write(self, record: Record, *, new: bool) -> None:
        path = self._path(record.name)
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record)))
            file.flush()
            os.fsync(file.fileno())
            if new:
                # Fails if another engine was faster.
                os.link(file.name, path)
            else:
                replacement = self.directory / f".{record.name}.new"
                replacement.unlink(missing_ok=True)
                os.link(file.name, replacement)
                replacement.replace(path)
        sync_directory(self.directory)


def check_clone_name(name: str) -> None:
    """Raises UdedupError for what can't be the name of a clone."""
    check_name(shown_name(name), Path(name))
    if name.startswith(".") or len(os.fsencode(name)) > NAME_BYTES_MAX:
        raise UdedupError(f"clone {name}: its name must not begin with a dot nor have more than {NAME_BYTES_MAX} bytes")


def shown_name(name: str) -> str:
    """What the mount calls a clone."""
    return name if name.endswith(SHOWN_SUFFIX) else name + SHOWN_SUFFIX


def record_of(path: Path, stamp: FileStamp) -> FileRecord:
    """A file of a base for the record."""
    return FileRecord(str(path), stamp.size, stamp.mtime_ns)


def check_base(record: Record, opened: Opened) -> None:
    """Raises UdedupError if the base below an overlay is not what it was when the clone was made."""
    found = [record_of(Path(file.path), examine_file(file)[0]) for file in opened.files[1:]]
    for before, now in zip_longest(record.files, found):
        if before is None or now is None or before.path != now.path:
            path = (now or before).path
            raise UdedupError(f"clone {record.name}: rests on other files than those it was made on: {path}")
        if before != now:
            raise UdedupError(
                f"clone {record.name}: its base has changed since the clone was made ({now.path}), so its blocks fit no"
                " longer; put the base back as it was, modification time included, or discard the clone"
            )


def make_overlay(record: Record, size: int) -> None:
    """Makes the overlay of a clone whose base has ``size`` bytes. Raises OSError or UdedupError."""
    subject, path = f"clone {record.name}", Path(record.overlay)
    if path.exists():
        raise UdedupError(f"{subject}: {path} exists already; choose another place for the overlay")
    # Complete before it has its name.
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    command = ["create", "-q", "-f", "qcow2", "-o", OPTIONS, "-u"]
    command += ["-b", record.base, "-F", record.format, str(fresh), str(size)]
    try:
        run_qemu_img(command, subject)
        fresh.chmod(0o600)
        sync_file(fresh)
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def run_qemu_img(arguments: list[str], subject: str) -> None:
    """Waits for it to succeed. Raises UdedupError, which begins with ``subject``, with what it says."""
    done = subprocess.run(
        [require_program("qemu-img", subject), *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=environment(),
        close_fds=False,
    )
    if done.returncode:
        raise UdedupError(f"{subject}: {said(done.stderr) or 'qemu-img failed without a word'}")


def same_path(one: str, other: str) -> bool:
    """Whether two paths lead to one file; paths that lead nowhere are compared as they are."""
    try:
        return same_file(Path(one).stat(), Path(other).stat())
    except OSError:
        return one == other


def sync_file(path: Path) -> None:
    """Returns once a file's content is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_directory = sync_file
"""The same for the names in a directory."""


@contextmanager
def as_one_line(subject: str) -> Iterator[None]:
    """Turns an OSError of the body into a UdedupError, which begins with ``subject``."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise UdedupError(f"{subject}{where}: {error.strerror}") from error
