"""Finds out what a file is and opens it, with everything it rests on.

Only what a user names is ever guessed at, by its first bytes, and then not if it is called ``.raw`` or is a block
device: whoever may write to a raw disk, a guest for one, could write the header of another format there. A backing
file has the format that its image's header names. Without one the image is refused, since QEMU would guess, and a
guest whose raw disk is somebody's backing file could choose what is found: `qemu-img rebase -u` puts the name there.
"""

import logging
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from udedup.errors import UdedupError
from udedup.vdi.formats import FORMATS, qcow2, vdi
from udedup.vdi.formats.helper import Helper, HelperImage, Recipe, require_program, virtual_size
from udedup.vdi.formats.layer import DEPTH_MAX, Layer, same_file
from udedup.vdi.formats.overlay import Overlay, parse_counts
from udedup.vdi.formats.raw import RawFile
from udedup.vdi.formats.writable import lock_file, open_writable
from udedup.vdi.paths import Allowed, open_named, open_part

log = logging.getLogger(__name__)

KNOWN: Final = f"which is none of {', '.join(FORMATS)}"

PROBE_BYTES: Final = 512
HEADER_BYTES_MAX: Final = 2 << 20
"""Bytes of the largest qcow2 cluster, which holds the header with its extensions."""
VHD_FOOTER_BYTES: Final = 512
VHD_DIFFERENCING: Final = 4
SIBLINGS_MAX: Final = 10_000
"""Entries of a directory that are looked at for a parent."""


@attrs.frozen
class Opening:
    """How an image is to be opened."""

    format: str | None = None
    """One of FORMATS; None: find out."""
    allow_backing: tuple[Path, ...] = ()
    """Directories besides its own in which its backing files, data files and parents may be."""
    secret: Path | None = None
    """File with the passphrase of encrypted images."""


@attrs.frozen
class Opened:
    """An image with all it rests on."""

    format: str
    """One of FORMATS."""
    layer: Layer
    files: tuple[RawFile, ...]
    """Those it was opened from, itself first."""


def open_chain(path: Path, opening: Opening) -> Opened:
    """Opens the image at ``path`` and its backing files; waits for the disk.

    Raises UdedupError, one line, for whatever can't be served; nothing is left open then.
    """
    with _chain(path, opening) as chain:
        file = chain.take(path, open_named(path))
        kind = opening.format or detect(file)
        return Opened(kind, chain.open(file, kind), tuple(chain.files))


def open_overlay(path: Path, opening: Opening) -> Opened:
    """Opens the qcow2 file at ``path`` for writing, and what it rests on for reading; waits for the disk.

    Nobody else can write any of them from then on. Raises UdedupError as :func:`open_chain`.
    """
    with _chain(path, opening) as chain:
        layer = chain.open_overlay(path)
        for file in chain.files[1:]:
            lock_file(file.descriptor, f"image {file.path}", write=False)
        return Opened("qcow2", layer, tuple(chain.files))


@contextmanager
def _chain(path: Path, opening: Opening) -> "Iterator[_Chain]":
    """The chain of the image at ``path``, whose files are closed if the body fails."""
    chain = _Chain(opening, Allowed.of(path, opening.allow_backing))
    try:
        yield chain
    except BaseException as error:
        for file in chain.files:
            file.close()
        if isinstance(error, OSError):
            raise UdedupError(f"image {path}: can't be read: {error.strerror}") from error
        raise


def detect(file: RawFile) -> str:
    """What the file of a user seems to be, one of FORMATS. Raises OSError."""
    suffix = file.path.suffix.lower()
    if suffix == ".raw" or stat.S_ISBLK(file.status.st_mode):
        return "raw"
    head = os.pread(file.descriptor, PROBE_BYTES, 0)
    if head.startswith(qcow2.MAGIC):
        return "qcow2"
    if head[vdi.SIGNATURE_OFFSET :].startswith(vdi.SIGNATURE):
        return "vdi"
    if head.startswith((b"KDMV", b"COWD", b"# Disk DescriptorFile")):
        return "vmdk"
    if head.startswith(b"vhdxfile"):
        return "vhdx"
    if head.startswith(b"conectix"):
        return "vpc"
    # A fixed VHD says so only at its end, where any disk may have any bytes: the name must say it too.
    if suffix in (".vhd", ".vpc") and _vhd_footer(file).startswith(b"conectix"):
        return "vpc"
    return "raw"


def _vhd_footer(file: RawFile) -> bytes:
    return os.pread(file.descriptor, VHD_FOOTER_BYTES, max(file.size - VHD_FOOTER_BYTES, 0))


class _Chain:
    """The files of one image while it is being opened."""

    def __init__(self, opening: Opening, allowed: Allowed) -> None:
        self.files: list[RawFile] = []
        self._opening = opening
        self._allowed = allowed

    def take(self, path: Path, descriptor: int) -> RawFile:
        """Owns ``descriptor`` from now on. Raises UdedupError if the file is in the chain already."""
        file = RawFile(path, descriptor)
        self._add(file)
        return file

    def _add(self, file: RawFile) -> None:
        again = any(same_file(file.status, other.status) for other in self.files)
        self.files.append(file)
        if again:
            raise UdedupError(f"image {self.files[0].path}: rests on itself: {str(file.path)!r} is twice in its chain")
        if len(self.files) > DEPTH_MAX:
            raise UdedupError(f"image {self.files[0].path}: rests on more than {DEPTH_MAX} files")

    def open_overlay(self, path: Path) -> Overlay:
        """The file at ``path`` and those below, for writing."""
        subject = f"image {path}"
        file = open_writable(path, open_named(path), subject)
        self._add(file)
        head = os.pread(file.descriptor, HEADER_BYTES_MAX, 0)
        header = qcow2.parse_header(head, subject)
        counts = parse_counts(head, header, subject)
        layer = Overlay(
            header, counts, file, self._backing(file, header, subject), Helper(Recipe("qcow2", file), header.size)
        )
        layer.check_entries()
        return layer

    def open(self, file: RawFile, kind: str) -> Layer:
        """The layer of ``file``, which is of format ``kind``."""
        subject = f"image {file.path}"
        match kind:
            case "raw":
                return file
            case "qcow2":
                return self._open_qcow2(file, subject)
            case "vdi":
                return self._open_vdi(file, subject)
            case "vmdk":
                check_vmdk(os.pread(file.descriptor, PROBE_BYTES, 0), subject)
            case "vpc":
                check_vhd(_vhd_footer(file), subject)
            case "vhdx":
                pass
            case _:
                raise UdedupError(f"{subject}: can't be opened as {kind!r}, {KNOWN}")
        require_program("qemu-nbd", subject)
        recipe = Recipe(kind, file)
        return HelperImage(Helper(recipe, virtual_size(recipe, subject)))

    def _part(self, file: RawFile, what: str, name: bytes) -> RawFile:
        return self.take(*open_part(file.path, what, name, self._allowed))

    def _open_qcow2(self, file: RawFile, subject: str) -> Layer:
        header = qcow2.parse_header(os.pread(file.descriptor, HEADER_BYTES_MAX, 0), subject)
        data = file
        if header.has_data_file:
            if header.data_file is None:
                raise UdedupError(f"{subject}: has an external data file that it does not name")
            data = self._part(file, "data file", header.data_file)
        below = self._backing(file, header, subject)
        if header.encryption is None:
            helper = Helper(Recipe("qcow2", file), header.size)
            layer = qcow2.Qcow2(header, file, data, below, helper)
            if layer.compressed_within(qcow2.SAMPLED_TABLES):
                require_program("qemu-nbd", subject)
            return layer
        if header.has_data_file or self._opening.secret is None:
            why = "has a data file, which is not supported" if header.has_data_file else "needs --secret-file FILE"
            raise UdedupError(f"{subject}: is encrypted and {why}")
        require_program("qemu-nbd", subject)
        recipe = Recipe("qcow2", file, encryption=header.encryption, secret=self._opening.secret)
        return qcow2.Qcow2(header, file, data, below, Helper(recipe, header.size))

    def _backing(self, file: RawFile, header: qcow2.Header, subject: str) -> Layer | None:
        if header.backing_file is None:
            return None
        if header.backing_format is None:
            raise UdedupError(
                f"{subject}: does not say what format its backing file has; tell it with"
                " `qemu-img rebase -u -b BACKING -F FORMAT IMAGE`"
            )
        if header.backing_format not in FORMATS:
            raise UdedupError(f"{subject}: its backing file has a format {header.backing_format!r}, {KNOWN}")
        return self.open(self._part(file, "backing file", header.backing_file), header.backing_format)

    def _open_vdi(self, file: RawFile, subject: str) -> Layer:
        header = vdi.parse_header(os.pread(file.descriptor, vdi.HEADER_BYTES, 0), subject)
        below = self._parent(file, header, subject) if header.kind == vdi.DIFFERENCING else None
        return vdi.Vdi(header, file, below)

    def _parent(self, file: RawFile, header: vdi.Header, subject: str) -> Layer:
        """The VDI that has the identity the header names, among the files of the allowed directories."""
        for candidate in self._siblings():
            try:
                path, descriptor = open_part(file.path, "parent", os.fsencode(candidate), self._allowed)
            except UdedupError:
                # Not everything called .vdi has to be readable.
                continue
            head = os.pread(descriptor, vdi.HEADER_BYTES, 0)
            try:
                found = vdi.parse_header(head, subject)
            except UdedupError:
                os.close(descriptor)
                continue
            if found.identity != header.parent:
                os.close(descriptor)
                continue
            if found.modified != header.parent_modified:
                log.warning("%s: its parent %s has been changed since it was made", subject, path)
            return self.open(self.take(path, descriptor), "vdi")
        places = ", ".join(map(str, self._allowed.directories))
        raise UdedupError(f"{subject}: its parent, VDI {{{header.parent}}}, is in none of these directories: {places}")

    def _siblings(self) -> Iterator[Path]:
        for directory in self._allowed.directories:
            for count, path in enumerate(sorted(directory.iterdir())):
                if count >= SIBLINGS_MAX:
                    break
                if path.suffix.lower() == ".vdi":
                    yield path


def check_vmdk(head: bytes, subject: str) -> None:
    """Raises UdedupError for a VMDK that is more than one file: QEMU would open whatever its descriptor names."""
    if head.startswith(b"COWD"):
        return
    # <magic> version flags capacity …; without a capacity QEMU looks for a descriptor with extents.
    if not head.startswith(b"KDMV") or len(head) < 20 or not struct.unpack_from("<Q", head, 12)[0]:
        raise UdedupError(
            f"{subject}: is a VMDK descriptor of other files, which is not supported; convert it with"
            " `qemu-img convert -O qcow2`"
        )


def check_vhd(footer: bytes, subject: str) -> None:
    """Raises UdedupError for a VHD that has a parent, which QEMU would not look for."""
    if len(footer) < VHD_FOOTER_BYTES or not footer.startswith(b"conectix"):
        raise UdedupError(f"{subject}: has no VHD footer; it is cut off")
    if struct.unpack_from(">I", footer, 60)[0] == VHD_DIFFERENCING:
        raise UdedupError(f"{subject}: is a differencing VHD, which is not supported; convert it to qcow2")
