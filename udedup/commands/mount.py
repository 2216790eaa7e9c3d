"""Show more disk images in the running engine's mount."""

import argparse

from udedup.commands.options import add_socket_option, image_argument


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup mount``."""
    add_socket_option(parser)
    parser.add_argument(
        "images",
        type=image_argument,
        nargs="+",
        metavar="[NAME=]IMAGE",
        help="a raw disk image; it appears, read-only, under NAME (default: its own name)",
    )


def run(args: argparse.Namespace) -> int:
    """Asks the engine to add the images and prints where each one is."""
    from udedup.engine.control import request

    images = [[name, str(path)] for name, path in args.images]
    for line in request(args.socket, {"op": "mount", "images": images}):
        print(line)
    return 0
