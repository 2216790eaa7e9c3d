"""What an estimate comes to, in pages of 4096 bytes. Where memory was sampled, what concerns content is an estimate."""

import math
from collections.abc import Iterable

import msgspec

CONFIDENCE = 0.95
"""That an error bound holds with."""


class Figures(msgspec.Struct, frozen=True):
    """A process, the mappings of one name, or all that was looked at.

    A page frame that several have mapped is counted with the first of them; for the others it is shared already.
    """

    pages: int = 0
    """Present; the kernel's zero page is none of them."""

    already: int = 0
    """Of them: on a page frame that is counted elsewhere, by fork, page cache, KSM or udedup.

    Without root all that is mapped more than once: the kernel doesn't tell with whom then.
    """

    unreadable: int = 0
    """Of the other pages: what could not be read."""

    file: int = 0
    """Of the other pages: of files (the page cache), or shared memory."""

    zero: int = 0
    """Of the other pages: all zero."""

    zero_file: int = 0
    """Of these: of files, or shared memory."""

    within: float = 0.0
    """Pages saved, besides the zero ones, if equal pages of one process were one."""

    between: float = 0.0
    """Saved besides, if equal pages of different processes were one; each process has an equal part in that."""

    known: float = 0.0
    """Pages with the content of a block of an image, zero ones left out."""

    @property
    def frames(self) -> int:
        """Pages of memory that it takes."""
        return self.pages - self.already

    @property
    def saved(self) -> float:
        """Of :attr:`frames`: those that sharing would save, zero pages with them."""
        return self.zero + self.within + self.between


class Kinds(msgspec.Struct, frozen=True):
    """What is saved, besides zero pages, by the kind of memory; adds up to within and between."""

    anonymous: float
    """Anonymous pages with each other."""

    file: float
    """Pages of files and shared memory with each other."""

    mixed: float
    """One kind with the other."""


class Process(msgspec.Struct, frozen=True):
    """One of the processes."""

    pid: int
    command: str
    figures: Figures


class Estimate(msgspec.Struct, frozen=True):
    """All of it."""

    page_bytes: int
    total: Figures
    processes: list[Process]
    names: dict[str, Figures]
    """By file or name of the mapping; most saved first."""

    kinds: Kinds
    image_blocks: int
    """Blocks of images that were known, zero ones and such that hold equal content counted each."""

    sample: float
    """Part of the memory that was sampled; 1: all was read."""

    sampled: int
    """Pages that are the sample."""

    page_frames: bool
    """Whether the kernel showed page frames; if not, what is shared already is taken for more than it is."""

    left_out: dict[str, list[int]]
    """Processes that were not looked at, by the reason."""

    @property
    def udedup_saves(self) -> float:
        """Of what would be saved: what is anonymous memory, pages."""
        return self.total.zero - self.total.zero_file + self.kinds.anonymous

    @property
    def error(self) -> float:
        """How far what would be saved may be off, at :data:`CONFIDENCE`, pages; 0 if all was read.

        Hoeffding's bound on the mean of ``sampled`` values between 0 and 1, one for each page that is not zero. It
        holds for the total, whatever the memory; processes and mappings have fewer of the sample.
        """
        if self.sample >= 1:
            return 0.0
        pages = self.total.frames - self.total.unreadable - self.total.zero
        if not self.sampled:
            return float(pages)
        return min(1.0, math.sqrt(math.log(2 / (1 - CONFIDENCE)) / (2 * self.sampled))) * pages


def add(parts: Iterable[Figures]) -> Figures:
    """The sum of some figures."""
    totals = dict.fromkeys(Figures.__struct_fields__, 0)
    for part in parts:
        for name in totals:
            totals[name] += getattr(part, name)
    return Figures(**totals)
