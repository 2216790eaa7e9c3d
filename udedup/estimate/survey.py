"""Looks at the memory of processes, several threads at a time: C behind cffi, in pieces with the GIL released."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import attrs
import trio

from udedup.engine.native import CData, ffi, lib
from udedup.errors import UdedupError
from udedup.estimate import processes
from udedup.estimate.bounds import CONFIDENCE, Bounds, Sample, bound
from udedup.estimate.figures import Estimate, Figures, Kinds, LeftOut, Process, add
from udedup.estimate.processes import ForbiddenError, GoneError, Mapping

PAGE: Final[int] = lib.UDD_PAGE_SIZE
DIGEST_BYTES: Final = 16
PIECE_PAGES: Final = 16384
"""Looked at in one go: a twentieth of a second."""

JOB_PAGES: Final = 1 << 20
JOB_RANGES: Final = 4096
"""Addresses that one thread goes over before it takes others, and how many mappings at most."""

ENDED: Final = "has ended meanwhile"
FORBIDDEN: Final = "its memory is not for this user to read (root may)"


@attrs.frozen
class _Subject:
    """A process that is looked at."""

    pid: int
    command: str
    places: dict[str, int]
    """Numbers of what is counted, by the name of the mappings."""


@attrs.frozen
class _Job:
    """A part of a process."""

    subject: _Subject
    ranges: list[tuple[int, int, int]]
    """First page, page behind the last, number of the place."""


class Survey:
    """One look. ``part``: how much of the memory is to be read, 1 for all of it, else a sample, chosen by ``seed``."""

    def __init__(self, pids: Sequence[int], part: float = 1.0, seed: int | None = None) -> None:
        self._pids = list(dict.fromkeys(pids))
        self._part = part
        self._left_out: dict[int, LeftOut] = {}
        self._subjects: list[_Subject] = []
        self._images: dict[str, int] = {}
        chosen = secrets.randbits(64) if seed is None else seed
        self._native: CData = ffi.gc(lib.udd_estimate_create(part, chosen), lib.udd_estimate_destroy)
        if self._native == ffi.NULL:
            raise MemoryError

    def expected(self) -> int:
        """About how many pages :meth:`look` will go over."""
        return sum(map(processes.present_pages, self._pids))

    async def look(self, threads: int, on_looked: Callable[[int], None]) -> None:
        """Looks at all processes, so many threads at a time; once.

        ``on_looked`` is told, again and again, how many pages more it has gone over. Raises UdedupError if the kernel
        can't tell what is in memory.
        """
        count = min(threads, lib.UDD_ESTIMATE_READERS)
        readers = [lib.udd_reader_create(self._native) for _ in range(count)]
        if ffi.NULL in readers:
            raise MemoryError
        jobs = self._jobs()
        limiter = trio.CapacityLimiter(count)
        errors: list[int] = []
        async with trio.open_nursery() as nursery:
            for reader in readers:
                nursery.start_soon(self._work, reader, jobs, limiter, on_looked, errors)
        for error in errors:
            _check(error)
        async with trio.open_nursery() as nursery:
            for reader in readers:
                nursery.start_soon(partial(trio.to_thread.run_sync, lib.udd_reader_sort, reader, limiter=limiter))

    def know(self, image: str, digests: bytes) -> None:
        """Makes blocks of an image known, after the look. ``digests``: 16 bytes for each, zero for those that aren't.

        ``image``: its name.
        """
        self._images.setdefault(image, 0)
        self._images[image] += lib.udd_estimate_know(
            self._native, ffi.from_buffer("uint64_t[]", digests), len(digests) // DIGEST_BYTES
        )

    def judge(self) -> Estimate:
        """What was found. Once, at the end; takes a while. Raises UdedupError if no process could be looked at."""
        self._subjects = [subject for subject in self._subjects if self._seen(subject)]
        if not self._subjects:
            raise UdedupError(_nothing(list(self._left_out.values())))
        contents = ffi.new("struct udd_contents *")
        _check(lib.udd_estimate_count(self._native, contents))
        raw = self._total()
        frames = raw["pages"] - raw["already"]
        # How many frames one that was to be read stands for.
        weight = frames / raw["sampled"] if raw["sampled"] else 1.0
        bounds = self._bounds(contents, raw, frames)
        saved = ffi.new("struct udd_saved *")
        _check(lib.udd_estimate_judge(self._native, self._shares(bounds, weight, raw, contents), weight, saved))
        kinds = Kinds(saved.anonymous, saved.file, saved.mixed)
        return self._estimate(weight, bounds, kinds, raw["sampled"] - raw["unreadable"])

    # ---- looking ----

    def _jobs(self) -> Iterator[_Job]:
        """Parts of all processes; looks at what each has mapped when it comes to it."""
        for number, pid in enumerate(self._pids):
            found: list[Mapping] = []
            with self._excused(pid):
                found = processes.mappings(pid)
            if not found:
                continue
            subject = _Subject(pid, processes.command(pid), {})
            self._subjects.append(subject)
            ranges: list[tuple[int, int, int]] = []
            room = JOB_PAGES
            for mapping in found:
                if mapping.name not in subject.places:
                    subject.places[mapping.name] = _check(lib.udd_estimate_add_place(self._native, number))
                first, end = mapping.start // PAGE, mapping.end // PAGE
                while first < end:
                    stop = min(end, first + room)
                    ranges.append((first, stop, subject.places[mapping.name]))
                    room -= stop - first
                    first = stop
                    if not room or len(ranges) == JOB_RANGES:
                        yield _Job(subject, ranges)
                        ranges, room = [], JOB_PAGES
            if ranges:
                yield _Job(subject, ranges)

    async def _work(
        self,
        reader: CData,
        jobs: Iterator[_Job],
        limiter: trio.CapacityLimiter,
        on_looked: Callable[[int], None],
        errors: list[int],
    ) -> None:
        """Does jobs until there are none; several at a time share ``jobs``. A negative errno in ``errors`` ends it."""
        for job in jobs:
            ranges = ffi.new("struct udd_mapped[]", job.ranges)
            position = ffi.new("struct udd_position *")
            with self._excused(job.subject.pid), processes.opened(job.subject.pid) as descriptors:
                arguments = (reader, *descriptors, ranges, len(ranges), PIECE_PAGES, position)
                while position.range < len(ranges):
                    looked = await trio.to_thread.run_sync(lib.udd_reader_look, *arguments, limiter=limiter)
                    if looked < 0:
                        errors.append(looked)
                        return
                    on_looked(looked)

    @contextmanager
    def _excused(self, pid: int) -> Iterator[None]:
        """Ends a block where a process can't be looked at, and notes why."""
        try:
            yield
        except GoneError:
            self._left_out.setdefault(pid, LeftOut(pid, self._command(pid), ENDED))
        except ForbiddenError:
            self._left_out.setdefault(pid, LeftOut(pid, self._command(pid), FORBIDDEN))

    def _command(self, pid: int) -> str:
        """As it was when it was seen, if it was."""
        return next((each.command for each in self._subjects if each.pid == pid), processes.command(pid))

    # ---- judging ----

    def _seen(self, subject: _Subject) -> bool:
        """Whether there is something to tell of a process."""
        places = [lib.udd_estimate_place(self._native, number) for number in subject.places.values()]
        return subject.pid not in self._left_out or any(place.pages for place in places)

    def _total(self) -> dict[str, int]:
        names = ("pages", "already", "sampled", "unreadable", "zero")
        numbers = [number for subject in self._subjects for number in subject.places.values()]
        places = [lib.udd_estimate_place(self._native, number) for number in numbers]
        return {name: sum(getattr(place, name) for place in places) for name in names}

    def _bounds(self, contents: CData, raw: dict[str, int], frames: int) -> Bounds | None:
        """None if all was to be read."""
        if self._part >= 1:
            return None
        seen = list(contents.seen)
        # What can't be read can't be shared: as if there was nothing like it.
        seen[1] += raw["unreadable"]
        return bound(Sample(self._part, frames, raw["zero"], raw["sampled"] - raw["zero"], seen))

    def _shares(self, bounds: Bounds | None, weight: float, raw: dict[str, int], contents: CData) -> list[float]:
        """See udd_estimate_judge: such that all that is saved is what is in the middle between the bounds."""
        times: int = lib.UDD_ESTIMATE_TIMES
        if bounds is None:
            return [0.0, *(1 - 1 / each for each in range(1, times))]
        # Found often: see udd_estimate_judge.
        often = contents.pages - sum(each * contents.seen[each] for each in range(1, times))
        certain = (raw["zero"] + often) * weight - contents.seen[times]
        wanted = (bounds.least + bounds.most) / 2 - certain
        given = weight * sum(each * contents.seen[each] * bounds.shares[each] for each in range(1, times))
        factor = max(wanted, 0.0) / given if given else 0.0
        return [share * factor for share in bounds.shares[:times]]

    def _estimate(self, weight: float, bounds: Bounds | None, kinds: Kinds, sampled: int) -> Estimate:
        by_name: dict[str, list[Figures]] = {}
        results = []
        for subject in self._subjects:
            parts = {name: self._figures(place, name, weight) for name, place in subject.places.items()}
            for name, part in parts.items():
                by_name.setdefault(name, []).append(part)
            results.append(Process(subject.pid, subject.command, add(parts.values())))
        names = {name: add(parts) for name, parts in by_name.items()}
        total = add(process.figures for process in results)
        saved = total.saved if bounds is None else min(max(total.saved, bounds.least), bounds.most)
        return Estimate(
            page_bytes=PAGE,
            total=total,
            saved=saved,
            saved_least=saved if bounds is None else bounds.least,
            saved_most=saved if bounds is None else bounds.most,
            confidence=1.0 if bounds is None else CONFIDENCE,
            kinds=kinds,
            processes=sorted(results, key=lambda process: process.figures.saved, reverse=True),
            names=dict(sorted(names.items(), key=lambda item: item[1].saved, reverse=True)),
            images=self._images,
            sample=self._part,
            sampled=sampled,
            page_frames=bool(lib.udd_estimate_has_frames(self._native)),
            left_out=sorted(self._left_out.values(), key=lambda left: left.pid),
        )

    def _figures(self, number: int, name: str, weight: float) -> Figures:
        place = lib.udd_estimate_place(self._native, number)
        store = name == processes.STORE
        return Figures(
            pages=place.pages,
            already=place.already,
            already_file=0 if store else place.already_file,
            already_udedup=place.already_file if store else 0,
            already_ksm=place.already_ksm,
            file=place.file,
            zero=_rounded(place.zero * weight),
            zero_file=_rounded(place.zero_file * weight),
            within=_rounded(place.within),
            between=_rounded(place.between),
            known=_rounded(place.known * weight),
            unreadable=_rounded(place.unreadable * weight),
        )


def _rounded(pages: float) -> float:
    """Without what only comes of the way that sums were made."""
    return round(pages, 3)


def _check(result: int) -> int:
    """The result of a C function. Raises MemoryError, UdedupError, or OSError."""
    if result == -errno.ENOMEM:
        raise MemoryError
    if result == -errno.ENOTTY:
        raise UdedupError("this kernel doesn't tell which pages are in memory: estimating takes Linux 6.7 or later")
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _nothing(left_out: list[LeftOut]) -> str:
    """The error if there is nothing to tell of."""
    if not left_out:
        return "there are no processes to look at"
    first = left_out[0]
    others = f", and {len(left_out) - 1} more can't be looked at" if len(left_out) > 1 else ""
    return f"process {first.pid} ({first.command}): {first.reason}{others}"
