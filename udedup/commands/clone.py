"""List the writable clones of disk images; show one again, write it into its base, or discard it."""

import argparse
import json

from udedup.commands.options import add_json_option, add_socket_option

_COLUMNS = ("clone", "shown at", "room", "base", "overlay", "note")
"""Words of a line, with tabs between them."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds what can be done with clones; `udedup mount --clone` makes them."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summary = "which there are, where, and how much room each takes"
    listing = actions.add_parser("list", help=summary, description=summary)
    add_socket_option(listing)
    add_json_option(listing)
    changes = {
        "show": "put a clone back into the mount (a new engine does so by itself with those that were there)",
        "commit": "write what a clone has into its base, and end the clone; refused while anybody uses either",
        "discard": "remove a clone and what was written to it; refused while a program has it open",
    }
    for name, summary in changes.items():
        action = actions.add_parser(name, help=summary, description=summary)
        add_socket_option(action)
        action.add_argument("names", nargs="+", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    """Asks the engine."""
    from udedup.engine.control import request

    if args.action == "list":
        _list(request(args.socket, {"op": "clones"}), as_json=args.json)
        return 0
    for name in args.names:
        # Copying a disk takes as long as it takes.
        result = request(args.socket, {"op": "clone_change", "name": name, "change": args.action}, seconds=None)
        if result:
            print(result)
    return 0


def _list(clones: list[dict[str, object]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(clones, indent=2))
        return
    if clones:
        print("\t".join(_COLUMNS))
    for clone in clones:
        room = clone["room"]
        size = "-" if not isinstance(room, int) else f"{room / (1 << 20):.1f} MiB"
        words = (clone["name"], clone["shown"] or "-", size, clone["base"], clone["overlay"], clone["note"])
        print("\t".join(str(word) for word in words).rstrip())
