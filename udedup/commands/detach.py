"""Take a program out that shares its memory: give it private memory back and leave it alone.

It may have been attached to, or started by `udedup run`. The library stays loaded and does nothing; `udedup attach`
lets the program share its memory again.
"""

import argparse

from udedup.commands.host import agent_library
from udedup.commands.options import count


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup detach``."""
    parser.add_argument("pid", type=count(1), metavar="PID", help="the program's process")


def run(args: argparse.Namespace) -> int:
    """Detaches and prints for how long the program did not run."""
    from udedup.attach.session import detach

    held, clean = detach(args.pid, agent_library())
    rest = (
        f"all {held.threads} for {held.all * 1e3:.1f} ms" if clean else "and some of it stays in mappings of the store"
    )
    print(f"process {args.pid} has its memory for itself. One thread was held for {held.one * 1e3:.1f} ms, {rest}")
    return 0
