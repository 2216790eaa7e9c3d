"""What is really merged in some processes: the independent observer, C behind cffi."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from udedup.engine.native import ffi, lib
from udedup.errors import UdedupError

PAGE: int = lib.UDD_PAGE_SIZE


class Sample(msgspec.Struct, frozen=True):
    """One look: pages, and numbers of events since the sampler was made (native/engine/sample.c)."""

    present: int
    """Private pages, anonymous or merged."""

    zero_pages: int
    """Of them: all zero. These are in none of the following."""

    zero_shared: int
    """All-zero pages on a page frame with others."""

    opportunity: int
    """Pages that would be saved if all equal ones were merged."""

    sharing: int
    """Pages that are saved."""

    shared: int
    """Page frames that several pages are on."""

    opportunities: int
    """Times that a page came to hold what another one holds."""

    merges: int
    """Times that such a page came to be on one frame with another."""

    merges_at_once: int
    """Of them: seen in the first sample that saw the opportunity."""

    known_opportunities: int
    """Opportunities with the content of an image block."""

    known_merges: int
    known_merges_at_once: int


class Sampler:
    """Keeps what each page held at the last sample. Use from one thread at a time."""

    def __init__(self) -> None:
        self._sampler = ffi.gc(lib.udd_sampler_create(), lib.udd_sampler_destroy)
        if self._sampler == ffi.NULL:
            raise MemoryError

    def know(self, image: Path) -> None:
        """Makes the blocks of a raw image known: opportunities with their contents are counted apart, too."""
        with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            blocks = ffi.from_buffer(content)
            try:
                if lib.udd_sampler_know(self._sampler, blocks, len(content) // PAGE):
                    raise MemoryError
            finally:
                ffi.release(blocks)

    def take(self, pids: Sequence[int], seconds: float) -> Sample:
        """Looks at all pages of these processes; ``seconds``: the time now, 0 when the sampler was made.

        Takes about 0.3 s of CPU per GiB. Processes that are gone have no pages. Raises UdedupError without root.
        """
        sample = ffi.new("struct udd_sample *")
        result = lib.udd_sampler_take(self._sampler, list(pids), len(pids), seconds, sample)
        if result == -1:
            raise UdedupError("page frames can't be seen: recording takes root (CAP_SYS_ADMIN)")
        if result:
            raise MemoryError
        return Sample(*(getattr(sample, name) for name in Sample.__struct_fields__))

    def latencies(self) -> NDArray[np.float32]:
        """From opportunity to merge, s, of all merges so far."""
        values = ffi.new("float **")
        count = lib.udd_sampler_latencies(self._sampler, values)
        return np.frombuffer(ffi.buffer(values[0], count * 4), dtype=np.float32).copy() if count else np.empty(0, "f4")
