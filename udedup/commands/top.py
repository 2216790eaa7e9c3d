"""Watch what is shared, live: processes, images, rates, and what it costs.

Keys: up and down select a process, p pauses or resumes it, u gives it its private memory back, < and > choose the
column to sort by, r reverses, q quits. `udedup status` has more figures.
"""

import argparse
import os
import sys

from udedup.commands.options import add_socket_option, seconds
from udedup.errors import UdedupError

COLUMNS = ("pid", "uid", "domain", "shared", "zero", "breaks", "vmas", "cpu", "command", "state")
"""Those of ``udedup.top.columns.AGENTS``, without its imports."""

INTERVAL_SECONDS = 2.0


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup top``."""
    add_socket_option(parser)
    parser.add_argument(
        "--interval",
        type=seconds,
        default=INTERVAL_SECONDS,
        metavar="SECONDS",
        help="between two looks (default: %(default)g)",
    )
    parser.add_argument(
        "--sort", choices=COLUMNS, default="shared", help="the column to sort by at first (default: %(default)s)"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="print everything as plain text after one interval, over which the rates are, and end; needs no terminal",
    )


def run(args: argparse.Namespace) -> int:
    """Shows the screen until it is enough, or prints it once."""
    if not args.once and not (sys.stdin.isatty() and sys.stdout.isatty() and _draws()):
        raise UdedupError("no terminal to draw on: use `udedup top --once`, or `udedup status`")

    import trio

    from udedup.top.view import View

    view = View(sort=args.sort)
    # A name may have a character that the output's encoding has not.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if args.once:
        from udedup.top.live import look

        print(*trio.run(look, args.socket, view, args.interval), sep="\n")
        return 0

    from rich.console import Console

    from udedup.top.live import watch
    from udedup.top.terminal import Terminal

    terminal = Terminal(sys.stdin.fileno(), Console(force_terminal=True, highlight=False, markup=False))
    return trio.run(watch, args.socket, terminal, view, args.interval)


def _draws() -> bool:
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
