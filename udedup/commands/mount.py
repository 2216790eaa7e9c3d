"""Show more disk images, or a writable clone of one, in the running engine's mount."""

import argparse
from pathlib import Path

from udedup.commands.options import add_image_options, add_socket_option, image_argument


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup mount``."""
    add_socket_option(parser)
    add_image_options(parser)
    parser.add_argument(
        "images",
        type=image_argument,
        nargs="*",
        metavar="[NAME=]IMAGE",
        help="a disk image of any format; it appears as a raw one, read-only, under NAME (default: its own name, which"
        " ends in .raw unless the image is raw itself)",
    )
    parser.add_argument(
        "--image",
        type=image_argument,
        action="append",
        default=[],
        metavar="[NAME=]IMAGE",
        help="one more image, said as `udedup engine` has it",
    )
    parser.add_argument(
        "--clone",
        type=Path,
        metavar="BASE",
        help="make a disk that can be written, which shares what is in the disk image BASE; nobody may write BASE from"
        " then on",
    )
    parser.add_argument("--to", metavar="NAME", help="the clone's name; it appears as NAME.raw")
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="FILE",
        help="a new qcow2 file for what is written to the clone (default: in the engine's state directory)",
    )


def run(args: argparse.Namespace) -> int:
    """Asks the engine to add the images, or to make the clone, and prints where each one is."""
    from udedup.engine.control import request

    if (args.clone is None) != (args.to is None) or (args.overlay is not None and args.clone is None):
        args.subparser.error("a clone takes --clone BASE and --to NAME")
    images = args.images + args.image
    if bool(images) == (args.clone is not None):
        args.subparser.error("give images or --clone BASE")
    secret = None if args.secret_file is None else str(args.secret_file.absolute())
    if args.clone is not None:
        overlay = None if args.overlay is None else str(args.overlay.absolute())
        message = {"op": "clone", "name": args.to, "base": str(args.clone.absolute()), "overlay": overlay}
        print(request(args.socket, message | {"format": args.image_format, "secret": secret}))
        return 0
    # One at a time: there may be hundreds, and what is in the mount already is printed when one fails.
    for name, path in images:
        message = {"op": "mount", "images": [[name, str(path)]], "format": args.image_format, "secret": secret}
        for line in request(args.socket, message):
            print(line)
    return 0
