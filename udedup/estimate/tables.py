"""An estimate for people: what could be saved first, then of what kind, then where."""

from collections.abc import Iterator, Mapping
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from udedup.commands.report import pairs, size, titled
from udedup.estimate.figures import Estimate, Figures

_ALL: Final = 1.0


def tables(estimate: Estimate, rows: int) -> RenderableType:
    """Returns all tables, with so many processes and mappings at most."""
    parts: list[RenderableType] = [*headline(estimate)]
    for title, values in kinds(estimate).items():
        parts.append(pairs(title, {name: size(round(value)) for name, value in values.items()}))
    if rows:
        parts.append(_processes(estimate, rows))
        parts.append(_names(estimate, rows))
    return Group(*parts)


def headline(estimate: Estimate) -> Iterator[str]:
    """What it comes to, in a few lines."""
    total, page = estimate.total, estimate.page_bytes
    frames = total.frames * page
    share = f" ({estimate.saved * page / frames:.1%})" if frames else ""
    count = len(estimate.processes)
    whose = "1 process" if count == 1 else f"{count} processes"
    yield f"could be saved now: {size(round(estimate.saved * page))} of {size(frames)}{share}, the memory of {whose}"
    if estimate.sample < _ALL:
        least, most = (size(round(pages * page)) for pages in (estimate.saved_least, estimate.saved_most))
        yield (
            f"between {least} and {most} with {estimate.confidence:.0%} confidence, whatever the memory is like:"
            f" {size(estimate.sampled * page)} were read"
        )
    if not estimate.page_frames:
        yield (
            "only root sees which pages are one in memory: those mapped more than once are taken as shared already,"
            " so that it may be more"
        )


def kinds(estimate: Estimate) -> Mapping[str, Mapping[str, float]]:
    """What there is to save and what is shared, bytes, by title and kind."""
    total, by_kind, page = estimate.total, estimate.kinds, estimate.page_bytes
    forked = total.already - total.already_file - total.already_udedup - total.already_ksm
    found: dict[str, dict[str, float]] = {
        "could be saved": {
            "pages that are all zero": total.zero,
            "equal pages within a process": total.within,
            "equal pages of different processes": total.between,
        },
        "of the equal pages, by the kind of memory": {
            "anonymous": by_kind.anonymous,
            "files (page cache) and shared memory": by_kind.file,
            "one kind with the other": by_kind.mixed,
        },
        "shared already, and in none of these": {
            "files (page cache) and shared memory": total.already_file,
            "by udedup": total.already_udedup,
            "by KSM": total.already_ksm,
            "by fork": forked,
        },
    }
    if not estimate.page_frames:
        found["shared already, and in none of these"] = {"mapped more than once": total.already}
    if estimate.images:
        found["equal to blocks of images"] = {"whether it could be saved or not": total.known}
    if total.unreadable:
        found["not known"] = {"could not be read": total.unreadable}
    return {title: {name: pages * page for name, pages in values.items()} for title, values in found.items()}


def _processes(estimate: Estimate, rows: int) -> Table:
    shown = estimate.processes[:rows]
    table = _figures(f"processes: {len(shown)} of {len(estimate.processes)}", "pid", estimate)
    table.add_column("command")
    for process in shown:
        table.add_row(str(process.pid), *cells(process.figures, estimate), _cut(process.command))
    return table


def _names(estimate: Estimate, rows: int) -> Table:
    shown = dict(list(estimate.names.items())[:rows])
    table = _figures(f"mappings by name: {len(shown)} of {len(estimate.names)}", None, estimate)
    table.add_column("name")
    for name, figures in shown.items():
        table.add_row(*cells(figures, estimate), _cut(name))
    return table


def _cut(text: str) -> Text:
    """A text that gives way to the figures, in a column that says nothing of wrapping: those are made narrow first."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def columns(estimate: Estimate) -> list[str]:
    """Headings of :func:`cells`."""
    return ["memory", "saved", "zero", "within", "between", *(["of images"] if estimate.images else []), "shared"]


def cells(figures: Figures, estimate: Estimate) -> list[str]:
    """The figures of a process or name."""
    known = [figures.known] if estimate.images else []
    pages = [figures.frames, figures.saved, figures.zero, figures.within, figures.between, *known, figures.already]
    return [size(round(count * estimate.page_bytes)) for count in pages]


def _figures(title: str, first: str | None, estimate: Estimate) -> Table:
    table = titled(title, header=True)
    for name in [*([first] if first else []), *columns(estimate)]:
        table.add_column(name, justify="right", no_wrap=True)
    return table
