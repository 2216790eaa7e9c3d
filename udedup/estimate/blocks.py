"""The digests of a disk image's blocks, for who looks for them in memory."""

from collections.abc import Iterator
from pathlib import Path

from udedup.errors import UdedupError
from udedup.vdi.digests import BLOCK_BYTES, EMPTY_PAGE
from udedup.vdi.images import Image
from udedup.vdi.indexing import PIECE_BYTES, index_piece
from udedup.vdi.sidecar import BusyError, DamagedError, Sidecar, UnfitError


def digests(image: Image, state: Path) -> Iterator[tuple[int, bytes]]:
    """Goes over an image; yields (byte of the disk that it has come to, digests of some blocks), as of DigestTable.

    What ``udedup index`` or an engine has kept in the directory ``state`` is not read again; nothing is kept. Waits
    for the disk. Raises UdedupError.
    """
    sidecar = _kept(image, state)
    end = image.size - image.size % BLOCK_BYTES
    image.read_once()
    try:
        position = 0
        while (position := image.data_from(position)) < end:
            number = position // PIECE_BYTES
            piece_end = min((number + 1) * PIECE_BYTES, end)
            kept = sidecar.read(number, 1)[0] if sidecar is not None else None
            page, _ = index_piece(image, number, position, piece_end, kept or EMPTY_PAGE)
            position = piece_end
            yield position, page
    except (DamagedError, BusyError) as error:
        raise UdedupError(f"image {image.path}: the digests kept in {state} can't be used: try again") from error
    except OSError as error:
        raise UdedupError(f"image {image.path}: can't be read: {error.strerror}") from error
    finally:
        if sidecar is not None:
            sidecar.close()


def _kept(image: Image, state: Path) -> Sidecar | None:
    """What is kept of an image as it is now, None if there is nothing that this user may see."""
    identity = image.identity
    if identity is None:
        return None
    try:
        return Sidecar.open(state / identity.name, identity)
    except (OSError, UnfitError):
        return None
