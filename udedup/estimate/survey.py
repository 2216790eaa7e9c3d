"""Looks at the memory of processes, one after the other: C behind cffi, in pieces with the GIL released."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import attrs

from udedup.engine.native import CData, ffi, lib
from udedup.estimate import processes
from udedup.estimate.figures import Estimate, Figures, Kinds, Process, add
from udedup.estimate.processes import ForbiddenError, GoneError

PAGE: Final[int] = lib.UDD_PAGE_SIZE
PIECE_PAGES: Final = 16384
"""Looked at in one go: a tenth of a second at worst."""

ENDED: Final = "ended meanwhile"
FORBIDDEN: Final = "not permitted"
Found = TypeVar("Found")


@attrs.define
class _Subject:
    """A process while it is looked at."""

    pid: int
    command: str
    places: dict[str, int]
    """Numbers of what is counted, by the name of the mappings."""

    ranges: list[tuple[int, int, int]]
    """First page, page behind the last, number of the place."""


class Survey:
    """One look. ``part``: how much of the memory is sampled, 1 for all of it. Use from one thread at a time."""

    def __init__(self, pids: Sequence[int], part: float = 1.0) -> None:
        self._pids = list(dict.fromkeys(pids))
        self._part = part
        self.left_out: dict[str, list[int]] = {}
        """Processes that could not be looked at, by the reason."""
        self.expected = sum(map(processes.present_pages, self._pids)) * self.passes
        """About how many pages :meth:`look` goes over."""
        self._subjects: list[_Subject] = []
        self._blocks = 0
        self._native: CData = ffi.gc(lib.udd_estimate_create(part, self.expected), lib.udd_estimate_destroy)
        if self._native == ffi.NULL:
            raise MemoryError

    @property
    def passes(self) -> int:
        """Over the memory: a sample takes one more."""
        return 1 if self._part >= 1 else 2

    def know(self, digests: Any) -> None:
        """Makes the blocks of an image known.

        ``digests``: a buffer, 16 bytes for each block, zero for those that aren't.
        """
        words = ffi.from_buffer("uint64_t[]", digests)
        if lib.udd_estimate_know(self._native, words, len(words) // 2):
            raise MemoryError
        self._blocks += sum(1 for low, high in zip(words[0::2], words[1::2], strict=True) if low or high)

    def look(self) -> Iterator[int]:
        """Looks at all processes; yields, again and again, how many pages it went over."""
        self._subjects = [subject for number, pid in enumerate(self._pids) if (subject := self._prepare(number, pid))]
        for remaining in reversed(range(self.passes)):
            for subject in list(self._subjects):
                yield from self._go_over(subject)
            if remaining:
                lib.udd_estimate_next_pass(self._native)

    def judge(self) -> Estimate:
        """What was found. Once, at the end."""
        total = ffi.new("struct udd_estimate_total *")
        lib.udd_estimate_judge(self._native, total)
        by_name: dict[str, list[Figures]] = {}
        results = []
        for subject in self._subjects:
            parts = {name: self._figures(place) for name, place in subject.places.items()}
            for name, part in parts.items():
                by_name.setdefault(name, []).append(part)
            results.append(Process(subject.pid, subject.command, add(parts.values())))
        names = {name: add(parts) for name, parts in by_name.items()}
        return Estimate(
            page_bytes=PAGE,
            total=add(process.figures for process in results),
            processes=results,
            names=dict(sorted(names.items(), key=lambda item: item[1].saved, reverse=True)),
            kinds=Kinds(total.anonymous, total.file, total.mixed),
            image_blocks=self._blocks,
            sample=self._part,
            sampled=total.sampled,
            page_frames=bool(lib.udd_estimate_has_frames(self._native)),
            left_out=self.left_out,
        )

    def _prepare(self, number: int, pid: int) -> _Subject | None:
        found = self._unless_impossible(pid, lambda: processes.mappings(pid))
        if not found:
            return None
        subject = _Subject(pid, processes.command(pid), {}, [])
        for mapping in found:
            if mapping.name not in subject.places:
                subject.places[mapping.name] = self._add_place(number)
            subject.ranges.append((mapping.start // PAGE, mapping.end // PAGE, subject.places[mapping.name]))
        return subject

    def _add_place(self, process: int) -> int:
        place: int = lib.udd_estimate_add_place(self._native, process)
        if place < 0:
            raise MemoryError
        return place

    def _go_over(self, subject: _Subject) -> Iterator[int]:
        descriptor = self._unless_impossible(subject.pid, lambda: processes.open_pagemap(subject.pid))
        if descriptor is None:
            self._subjects.remove(subject)
            return
        ranges = ffi.new("struct udd_mapped[]", subject.ranges)
        position = ffi.new("struct udd_position *")
        try:
            while position.range < len(ranges):
                looked: int = lib.udd_estimate_look(
                    self._native, subject.pid, descriptor, ranges, len(ranges), PIECE_PAGES, position
                )
                if looked < 0:
                    raise OSError(-looked, os.strerror(-looked))
                yield looked
        finally:
            os.close(descriptor)

    def _unless_impossible(self, pid: int, find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except GoneError:
            self.left_out.setdefault(ENDED, []).append(pid)
        except ForbiddenError:
            self.left_out.setdefault(FORBIDDEN, []).append(pid)
        return None

    def _figures(self, place: int) -> Figures:
        found = lib.udd_estimate_place(self._native, place)
        return Figures(**{name: getattr(found, name) for name in Figures.__struct_fields__})
