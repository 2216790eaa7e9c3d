"""Give programs their private memory back, in one process or everywhere, and share no more of it."""

import argparse

from udedup.commands.options import add_process_options, add_socket_option


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup unmerge``."""
    add_socket_option(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> int:
    """Asks the engine and prints how many pages are private again, or how many programs may merge again."""
    if args.resume:
        return resume(args)

    from udedup.engine.control import request

    print(f"{request(args.socket, {'op': 'unmerge', 'pid': args.pid})} pages are private again")
    return 0


def resume(args: argparse.Namespace) -> int:
    """Lets the merging go on that ``unmerge`` or ``pause`` stopped."""
    from udedup.engine.control import request

    print(f"{request(args.socket, {'op': 'merge', 'pid': args.pid})} programs may share memory again")
    return 0
