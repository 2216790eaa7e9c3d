"""Give programs their private memory back, in one process or everywhere, and share no more of it."""

import argparse

from udedup.commands.options import add_process_options, add_socket_option


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup unmerge``."""
    add_socket_option(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> int:
    """Asks the engine and prints how many pages are private again, or how many programs may merge again."""
    return resume(args) if args.resume else ask(args, "unmerge", "pages are private again")


def resume(args: argparse.Namespace) -> int:
    """Lets the merging go on that ``unmerge`` or ``pause`` stopped."""
    return ask(args, "merge", "programs may share memory again")


def ask(args: argparse.Namespace, op: str, done: str) -> int:
    """Has the engine do ``op`` to a process, or to all, and prints its answer: how many are ``done``."""
    from udedup.engine.control import request

    print(f"{request(args.socket, {'op': op, 'pid': args.pid})} {done}")
    return 0
