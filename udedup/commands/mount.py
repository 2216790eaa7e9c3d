"""Show more disk images in the running engine's mount."""

import argparse

from udedup.commands.options import add_image_options, add_socket_option, image_argument


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup mount``."""
    add_socket_option(parser)
    add_image_options(parser)
    parser.add_argument(
        "images",
        type=image_argument,
        nargs="+",
        metavar="[NAME=]IMAGE",
        help="a disk image of any format; it appears as a raw one, read-only, under NAME (default: its own name, which"
        " ends in .raw unless the image is raw itself)",
    )


def run(args: argparse.Namespace) -> int:
    """Asks the engine to add the images and prints where each one is."""
    from udedup.engine.control import request

    secret = None if args.secret_file is None else str(args.secret_file.absolute())
    # One at a time: there may be hundreds, and what is in the mount already is printed when one fails.
    for name, path in args.images:
        message = {"op": "mount", "images": [[name, str(path)]], "format": args.image_format, "secret": secret}
        for line in request(args.socket, message):
            print(line)
    return 0
