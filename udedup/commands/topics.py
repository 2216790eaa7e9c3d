"""Explain a topic at length, or a command; without either, list them.

With --man DIR it writes the manual pages of all commands instead.
"""

import argparse
import sys
from pathlib import Path

TOPICS = {
    "safety": "why no byte of a program can change, and what is shared with whom",
    "domains": "who shares with whom, and what can be learnt through timing",
    "estimate": "what programs could share, and what the figures of an estimate mean",
    "tuning": "rates, hints, and where the CPU and the memory go",
    "qemu": "virtual machines, and disk images for them",
    "python": "workers of a server that load the same data, and the interface for programs",
    "metrics": "Prometheus and Grafana: what there is to see, where, and for whom",
    "limits": "what is left alone, and what a wrapped program may notice",
    "architecture": "the parts, how they work together, and why they are so",
}
"""Each is a text in udedup/topics, with what it is about."""

TEXTS = Path(__file__).parent.parent / "topics"

_WIDTH = 100
"""Columns of a text that does not go to a terminal."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup help``."""
    parser.add_argument("topic", nargs="?", metavar="TOPIC", help=f"one of {', '.join(TOPICS)}, or a command")
    parser.add_argument("--man", type=Path, metavar="DIR", help="write manual pages into DIR instead")


def run(args: argparse.Namespace) -> int:
    """Prints a text, a command's help, or what there is."""
    from udedup.cli import build_parser
    from udedup.commands.arguments import subcommands

    if args.man is not None:
        if args.topic is not None:
            args.subparser.error("give a topic or --man DIR")
        return _write_pages(build_parser(), args.man)
    if args.topic is None:
        _list()
    elif args.topic in TOPICS:
        _show((TEXTS / f"{args.topic}.md").read_text(encoding="utf-8"))
    elif (command := subcommands(build_parser()).get(args.topic)) is not None:
        command.print_help()
    else:
        import difflib

        near = difflib.get_close_matches(args.topic, [*TOPICS, *subcommands(build_parser())], n=1)
        advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(TOPICS)}, or a command"
        args.subparser.error(f"there is no topic {args.topic!r}: {advice}")
    return 0


def _list() -> None:
    width = max(map(len, TOPICS)) + 2
    print("topics, each shown by `udedup help TOPIC`:")
    for name, about in TOPICS.items():
        print(f"  {name:{width}}{about}")
    print("\n`udedup --help` lists the commands; `udedup help COMMAND` is `udedup COMMAND --help`.")


def _show(text: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(Markdown(text))


def _write_pages(parser: argparse.ArgumentParser, folder: Path) -> int:
    from importlib.metadata import version

    from udedup.commands.manual import pages
    from udedup.errors import UdedupError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, page in pages(parser, version("udedup"), TOPICS).items():
            (folder / name).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UdedupError(f"{error.filename}: can't be written: {error.strerror}") from None
    return 0
