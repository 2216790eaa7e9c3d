"""Computes all digests of an image and keeps them, as ``udedup index`` does; what is kept already is passed over.

Holes are passed over, too, by the map of the image's format and by the file system's: whoever reads a hole digests it
in no time. An engine that has the image mounted finds the digests when they are wanted, and adds its own.
"""

import time
from collections.abc import Callable
from typing import Final

import attrs
import trio

from udedup.errors import UdedupError
from udedup.vdi.digests import BLOCK_BYTES, EMPTY_PAGE, PAGE_BLOCKS, DigestTable
from udedup.vdi.images import Image, Images, examine
from udedup.vdi.keeping import RACY_NS
from udedup.vdi.sidecar import BusyError, DamagedError, Identity, Sidecar

PIECE_BYTES: Final = PAGE_BLOCKS * BLOCK_BYTES
"""What a page of the table stands for: 1 MiB."""
STEP_PIECES: Final = 16
"""Read and kept in one go."""


@attrs.frozen
class Step:
    """What one step of indexing has done."""

    position: int
    """Bytes of the disk that are behind it."""
    digested: int
    """Blocks that have been read and digested."""


async def index_image(images: Images, image: Image, on_step: Callable[[Step], None]) -> None:
    """Computes and keeps what is missing of ``image``. Cancelled, it has kept what it had done till then.

    Raises UdedupError if the image's digests can't be kept, if it changes meanwhile, or if it can't be read.
    """
    state = images.state
    identity = image.identity
    assert state is not None
    if identity is None:
        raise UdedupError(
            f"image {image.path}: its digests can't be kept: it is encrypted, or on a block device, which doesn't show"
            " when it was changed"
        )
    # Then every later change shows.
    await trio.sleep(min(max(image.mtime_ns + RACY_NS - time.time_ns(), 0), RACY_NS) / 1e9)
    if not await examine(image) or image.identity != identity:
        raise changed(image)
    try:
        sidecar = await trio.to_thread.run_sync(state.find_or_create, image.path, identity)
        try:
            await _index(sidecar, image, identity, on_step)
        except DamagedError as error:
            state.drop(sidecar.path, image.path, error)
            raise UdedupError(f"image {image.path}: the file with its digests was damaged; try again") from error
        finally:
            sidecar.close()
    except BusyError as error:
        raise UdedupError(f"image {image.path}: its digests are locked by another process; try again") from error
    except OSError as error:
        raise UdedupError(f"image {image.path}: can't be indexed: {error.strerror}") from error


def changed(image: Image) -> UdedupError:
    """The error for an image that somebody writes to."""
    return UdedupError(f"image {image.path}: is being changed; index it when nobody writes to it")


async def _index(sidecar: Sidecar, image: Image, identity: Identity, on_step: Callable[[Step], None]) -> None:
    image.read_once()
    position = 0
    while position < image.size:
        # Not abandoned when cancelled: it is short, and what it has done is not to be lost.
        step = await trio.to_thread.run_sync(index_some, sidecar, image, position)
        if not await examine(image) or image.identity != identity:
            raise changed(image)
        if sidecar.replaced:
            raise UdedupError(f"image {image.path}: another process has dropped its digests; try again")
        on_step(step)
        position = step.position


def index_some(sidecar: Sidecar, image: Image, position: int) -> Step:
    """Indexes the next STEP_PIECES pieces that have data from byte ``position`` on; waits for the disk."""
    end = image.size - image.size % BLOCK_BYTES
    pages: dict[int, bytes] = {}
    digested = 0
    for _ in range(STEP_PIECES):
        position = image.data_from(position)
        if position >= end:
            position = image.size
            break
        number = position // PIECE_BYTES
        piece_end = min((number + 1) * PIECE_BYTES, end)
        (kept,) = sidecar.read(number, 1)
        page, computed = index_piece(image, number, position, piece_end, kept or EMPTY_PAGE)
        if computed:
            pages[number] = page
            digested += computed
        position = piece_end
    sidecar.write(pages)
    return Step(position, digested)


def index_piece(image: Image, number: int, position: int, end: int, kept: bytes) -> tuple[bytes, int]:
    """The page of piece ``number`` with digests of all its data from byte ``position`` to ``end``.

    ``kept`` has those that are known. Returns the number of those that were not, too.
    """
    table = DigestTable(PAGE_BLOCKS)
    table.fill(0, kept)
    origin = number * PIECE_BYTES
    computed = 0
    while position < end:
        start = position - position % BLOCK_BYTES
        stop = image.hole_from(position, end)
        stop = min(stop + -stop % BLOCK_BYTES, end)
        first, count = (start - origin) // BLOCK_BYTES, (stop - start) // BLOCK_BYTES
        if not table.known(first, count):
            table.compute(first, count, image.read(start, stop - start), 0)
            computed += count
        position = image.data_from(stop)
    return table.page(0), computed
