"""Turns the engine's status into tables; the words are those of ``udedup status --json``."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_PAGES = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "zero_pages",
    "pages_scanned",
    "pages_skipped",
    "full_scans",
    "pages_to_scan",
)
_WORK = (
    "hints",
    "merges",
    "breaks",
    "blocks",
    "lead_time_seconds",
    "cpu_seconds",
    "pressure",
    "agents_total",
    "refused",
)
_AGENT_COLUMNS = ("pid", "uid", "domain", "pages_sharing", "zero_pages", "runs", "vmas", "merging", "command")
_IMAGE_COLUMNS = ("name", "format", "size", "path")
_WORDS = frozenset({"domain", "command", "name", "format", "path"})


def report(status: Mapping[str, Any]) -> RenderableType:
    """Returns all tables."""
    agents, images = status["agents"], status["images"]
    parts: list[RenderableType] = [
        f"engine at {status['socket']}, policy {status['policy']}",
        _memory(status),
        _pages(status),
        _work(status),
        _rows("agents", _AGENT_COLUMNS, agents),
    ]
    parts += [f"  {agent['pid']} does not merge: {agent['reason']}" for agent in agents if agent["reason"]]
    if images:
        parts.append(_rows(f"images in {status['mount']}", _IMAGE_COLUMNS, images))
    return Group(*parts)


def size(count: int) -> str:
    """Returns a number of bytes for people: ``1.5 MiB``."""
    value, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        if abs(value) < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def titled(title: str, *, header: bool) -> Table:
    """An empty table."""
    return Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=header
    )


def pairs(title: str, values: Mapping[str, str]) -> Table:
    """A table of names and values."""
    table = titled(title, header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for row in values.items():
        table.add_row(*row)
    return table


def _memory(status: Mapping[str, Any]) -> Table:
    """What is saved, by the engine's account and by the kernel's."""
    store, memory, kernel = status["store"], status["memory"], status["kernel"]
    return pairs(
        "memory",
        {
            "bytes_saved, by the engine's account": size(status["bytes_saved"]),
            "bytes saved, by the kernel's account, without zero pages": size(kernel["saved_bytes"]),
            "general_profit (after udedup's own memory)": size(status["general_profit"]),
            "sum of Pss, programs and engine": size(kernel["pss_bytes"]),
            "store, in use": size(store["live_bytes"]),
            f"store, in {store['segments']} segments": size(store["bytes"]),
            "engine": size(memory["engine"]),
            "agents": size(memory["agents"]),
        },
    )


def _pages(status: Mapping[str, Any]) -> Table:
    return pairs("pages", {name: str(status[name]) for name in _PAGES})


def _work(status: Mapping[str, Any]) -> Table:
    table = titled("work", header=False)
    for name in _WORK:
        table.add_row(name, "  ".join(f"{key} {_cell(key, value)}" for key, value in status[name].items()))
    return table


def _rows(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = titled(f"{title}: {len(rows)}", header=True)
    for name in columns:
        words = name in _WORDS
        table.add_column(name, justify="left" if words else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in columns))
    return table


def _cell(name: str, value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case None:
            return "-"
        case float():
            return f"{value:.3f}"
        case int() if name == "size":
            return size(value)
    return str(value)
