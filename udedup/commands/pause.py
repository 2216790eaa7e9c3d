"""Merge no more of programs' memory, in one process or everywhere; what is merged stays so, until it is written to."""

import argparse

from udedup.commands.options import add_process_options, add_socket_option
from udedup.commands.unmerge import resume


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup pause``."""
    add_socket_option(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> int:
    """Asks the engine and prints how many programs are paused, or may merge again."""
    if args.resume:
        return resume(args)

    from udedup.engine.control import request

    print(f"{request(args.socket, {'op': 'pause', 'pid': args.pid})} programs are paused")
    return 0
