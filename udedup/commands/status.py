"""Show what is shared, what was done for it, and what it saves."""

import argparse
import sys

from udedup.commands.options import add_json_option, add_socket_option

_PIPE_COLUMNS = 200


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup status``."""
    add_socket_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Asks the engine and prints tables, or its answer unchanged as JSON."""
    from udedup.engine.control import request

    status = request(args.socket, {"op": "status"})
    if args.json:
        import json

        print(json.dumps(status, indent=2))
        return 0

    from rich.console import Console

    from udedup.commands.report import report

    # Into a pipe there is no width to keep to: nothing is cut off there.
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(report(status), highlight=False, markup=False)
    return 0
