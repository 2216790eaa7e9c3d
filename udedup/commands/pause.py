"""Merge no more of programs' memory, in one process or everywhere; what is merged stays so, until it is written to."""

import argparse

from udedup.commands.options import add_process_options, add_socket_option
from udedup.commands.unmerge import ask, resume


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup pause``."""
    add_socket_option(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> int:
    """Asks the engine and prints how many programs are paused, or may merge again."""
    return resume(args) if args.resume else ask(args, "pause", "programs are paused")
