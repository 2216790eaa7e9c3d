"""The command line: finds the subcommand, runs it, and turns what a user can cause into one line on stderr.

Exit statuses: 2 for wrong usage, 1 for a failure, else what the subcommand says.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from udedup.commands import COMMANDS
from udedup.errors import UdedupError

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells have it."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


class ShowVersion(argparse.Action):
    """``--version``. Looks it up only when asked: `udedup run` must start fast."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print("udedup", version("udedup"))
        parser.exit()


def build_parser() -> Parser:
    """Returns the parser of the whole command line; each subcommand adds its own options."""
    parser = Parser(
        prog="udedup",
        description="Makes processes with equal memory share it, copy-on-write, guided by their I/O.",
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").strip()
        subparser = subparsers.add_parser(name, help=text.partition("\n")[0], description=text)
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
