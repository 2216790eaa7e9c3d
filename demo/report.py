"""What the demonstration shows: the live table, and the result."""

from collections.abc import Sequence
from typing import Any

from attrs import frozen
from rich.console import Group
from rich.table import Table

from demo.programs import Program
from udedup.record.kernel import process_memory

MIB = 1 << 20


@frozen
class Result:
    """The figures at the end. Bytes and seconds."""

    programs: int
    """How many programs ran at once."""

    items_verified: int
    """Contents compared with their checksums, over all programs and both passes."""

    wrong: tuple[str, ...]
    """A line for each content that was not as it must be."""

    pss_without: int
    """Sum of the programs' Pss when they ran without udedup."""

    pss_with: int
    """Sum of the programs' and the engine's Pss, merged."""

    pss_engine: int
    """The engine's part of ``pss_with``."""

    saved_kernel: int
    """``pss_without - pss_with``."""

    saved_engine: int
    """The engine's own ``bytes_saved`` at the same moment."""

    general_profit: int
    """The engine's ``bytes_saved`` less its own and the agents' memory."""

    seconds_to_merged: float
    """From the start of the first wrapped program until nothing more was found to share."""

    lead_time_seconds: dict[str, float | None]
    """From content in place to merged: p50, p90, p99; None if nothing was merged on a hint."""

    cpu_seconds: dict[str, float]
    """CPU spent by the engine, and by all agents inside the programs."""

    breaks: int
    """Shared pages that programs wrote to and got back as their own."""


def live(status: dict[str, Any], programs: Sequence[Program], phase: str, seconds: float) -> Group:
    """One picture of the table."""
    agents = {agent["pid"]: agent for agent in status["agents"]}
    table = Table(title=f"{phase}, {seconds:.0f} s", title_justify="left")
    table.add_column("program")
    table.add_column("kind")
    for heading in ("pid", "Rss MiB", "Pss MiB", "shared MiB", "zero MiB", "runs"):
        table.add_column(heading, justify="right")
    for program in programs:
        memory, agent = process_memory(program.pid), agents.get(program.pid, {})
        shared, zero = (f"{agent.get(key, 0) * 4096 / MIB:.1f}" for key in ("pages_sharing", "zero_pages"))
        table.add_row(
            program.name,
            program.kind,
            str(program.pid),
            f"{memory.rss / MIB:.1f}",
            f"{memory.pss / MIB:.1f}",
            shared,
            zero,
            str(agent.get("runs", 0)),
        )
    return Group(table, line(status))


def line(status: dict[str, Any]) -> str:
    """The engine's figures in one line."""
    return (
        f"saved {status['bytes_saved'] / MIB:.1f} MiB   pages_shared {status['pages_shared']}   "
        f"pages_sharing {status['pages_sharing']}   merged on a hint {status['hints']['merged']}   "
        f"breaks {status['breaks']['pages']}   "
        f"cpu engine {status['cpu_seconds']['engine']:.1f} s, agents {status['cpu_seconds']['agents']:.1f} s"
    )


def summary(result: Result) -> Table:
    """The result as a table."""
    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    share = result.saved_kernel / result.pss_without
    lead = result.lead_time_seconds
    rows = (
        ("programs", str(result.programs)),
        ("contents verified", f"{result.items_verified}, {len(result.wrong)} wrong"),
        ("memory without udedup (sum of Pss)", f"{result.pss_without / MIB:.1f} MiB"),
        ("memory with udedup (sum of Pss, with the engine)", f"{result.pss_with / MIB:.1f} MiB"),
        ("of it the engine", f"{result.pss_engine / MIB:.1f} MiB"),
        ("saved, by the kernel's account", f"{result.saved_kernel / MIB:.1f} MiB ({share:.0%})"),
        ("saved, by the engine's account", f"{result.saved_engine / MIB:.1f} MiB"),
        ("after udedup's own memory (general_profit)", f"{result.general_profit / MIB:.1f} MiB"),
        ("time to merged", f"{result.seconds_to_merged:.1f} s"),
        (
            "content in place to merged, p50 / p90 / p99",
            " / ".join("-" if lead[key] is None else f"{lead[key]:.3f} s" for key in ("p50", "p90", "p99")),
        ),
        ("CPU of the engine", f"{result.cpu_seconds['engine']:.1f} s"),
        ("CPU of the agents", f"{result.cpu_seconds['agents']:.1f} s"),
        ("shared pages written to", str(result.breaks)),
    )
    for row in rows:
        table.add_row(*row)
    return table
