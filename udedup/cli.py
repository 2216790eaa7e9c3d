"""The command line: finds the subcommand, runs it, and turns what a user can cause into one line on stderr.

Exit statuses: 2 for wrong usage, 1 for a failure, else what the subcommand says.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from udedup.commands import COMMANDS
from udedup.errors import UdedupError

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells have it."""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line; each subcommand adds its own options."""
    parser = argparse.ArgumentParser(
        prog="udedup",
        description="Makes processes with equal memory share it, copy-on-write, guided by their I/O.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        command.prepare_parser(subparser)
        subparser.set_defaults(run=command.run, subparser=subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    args.words = words[1:]
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except UdedupError as error:
        print(f"udedup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`udedup status | head`); keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
