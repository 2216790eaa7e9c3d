"""What an estimate comes to, in pages of 4096 bytes. Where memory was sampled, what concerns content is an estimate."""

from collections.abc import Iterable

import msgspec


class Figures(msgspec.Struct, frozen=True):
    """A process, the mappings of one name, or all that was looked at.

    A page frame that several have mapped is counted with the first of them; for the others it is shared already.
    """

    pages: int = 0
    """Present; the kernel's zero page is none of them."""

    already: int = 0
    """Of them: on a page frame that is counted elsewhere.

    Without root all that is mapped more than once: the kernel doesn't tell with whom then.
    """

    already_file: int = 0
    """Of these: of files (the page cache), or shared memory, udedup's store apart."""

    already_udedup: int = 0
    """Of these: merged by udedup."""

    already_ksm: int = 0
    """Of these: merged by KSM. What is left of them was inherited by fork."""

    file: int = 0
    """Of the pages that are not shared already: of files (the page cache), or shared memory."""

    zero: float = 0
    """Of the pages that are not shared already: all zero."""

    zero_file: float = 0
    """Of these: of files, or shared memory."""

    within: float = 0
    """Pages saved, besides the zero ones, if equal pages of one process were one."""

    between: float = 0
    """Saved besides, if equal pages of different processes were one; each process has an equal part in that."""

    known: float = 0
    """Pages with the content of a block of an image, zero ones left out."""

    unreadable: float = 0
    """Of the pages that are not shared already: those that could not be read."""

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


class LeftOut(msgspec.Struct, frozen=True):
    """A process that was not looked at, or not to its end."""

    pid: int
    command: str
    reason: str


class Estimate(msgspec.Struct, frozen=True):
    """All of it."""

    page_bytes: int
    total: Figures
    saved: float
    """Pages of ``total`` that sharing would save: zero, within and between."""

    saved_least: float
    """The truth is not below that, with a probability of ``confidence``."""

    saved_most: float
    """Nor above that. Both are ``saved`` if all was read."""

    confidence: float
    """That of the bounds; 1 if all was read."""

    kinds: Kinds
    processes: list[Process]
    """Most saved first."""

    names: dict[str, Figures]
    """By file or name of the mapping; most saved first."""

    images: dict[str, int]
    """Images whose blocks were known, and how many of each were: those that are all zero are left out."""

    sample: float
    """Part of the memory that was to be read; 1: all of it."""

    sampled: int
    """Page frames that were."""

    page_frames: bool
    """Whether the kernel showed page frames; if not, what is shared already is taken for more than it is."""

    left_out: list[LeftOut]


def add(parts: Iterable[Figures]) -> Figures:
    """The sum of some figures."""
    totals = dict.fromkeys(Figures.__struct_fields__, 0)
    for part in parts:
        for name in totals:
            totals[name] += getattr(part, name)
    return Figures(**totals)
