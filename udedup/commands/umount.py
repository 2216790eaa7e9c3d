"""Take disk images out of the running engine's mount."""

import argparse
from pathlib import Path

from udedup.commands.options import add_socket_option


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup umount``."""
    add_socket_option(parser)
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="its name in the mount, or its path there or where the image lies; refused while a program has it open",
    )
    parser.add_argument("--image", action="append", default=[], metavar="IMAGE", help="one more, said with an option")


def run(args: argparse.Namespace) -> int:
    """Asks the engine to let go of the images."""
    from udedup.engine.control import request

    images = args.images + args.image
    if not images:
        args.subparser.error("give images")
    for image in images:
        request(args.socket, {"op": "umount", "image": image, "path": str(Path(image).absolute())})
    return 0
