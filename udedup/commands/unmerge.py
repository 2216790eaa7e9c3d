"""Give programs their private memory back, in one process or everywhere, and share no more of it."""

import argparse

from udedup.commands.options import add_socket_option, count


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup unmerge``."""
    add_socket_option(parser)
    parser.add_argument(
        "pid", type=count(1), nargs="?", metavar="PID", help="only in this process (default: in every one)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="the contrary: let the merging go on that this command stopped"
    )


def run(args: argparse.Namespace) -> int:
    """Asks the engine and prints how many pages are private again, or how many programs may merge again."""
    from udedup.engine.control import request

    if args.resume:
        print(f"{request(args.socket, {'op': 'merge', 'pid': args.pid})} programs may share memory again")
    else:
        print(f"{request(args.socket, {'op': 'unmerge', 'pid': args.pid})} pages are private again")
    return 0
