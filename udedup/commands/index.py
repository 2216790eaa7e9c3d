"""Compute the digests of disk images now, and keep them for engines that mount them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from udedup.commands.options import add_backing_option, add_image_options, add_state_option

if TYPE_CHECKING:
    from rich.progress import Progress

    from udedup.vdi.formats.probe import Opening
    from udedup.vdi.indexing import Step
    from udedup.vdi.state import StateDirectory


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup index``."""
    add_image_options(parser)
    add_backing_option(parser)
    add_state_option(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="a disk image of any format")


def run(args: argparse.Namespace) -> int:
    """Indexes the images one after the other and prints a line for each. Ctrl-C ends it; the next run goes on there."""
    import logging

    import trio
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from udedup.vdi.formats.probe import Opening
    from udedup.vdi.state import StateDirectory

    logging.basicConfig(format="udedup: %(message)s")
    state = StateDirectory.open(args.state_dir.absolute())
    opening = Opening(args.image_format, tuple(path.absolute() for path in args.allow_backing), args.secret_file)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    # Progress is for people: what is printed is the same without a terminal.
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        for path in args.images:
            digested = trio.run(_index, path, state, opening, progress)
            print(f"{path}: {digested} blocks digested", flush=True)
    return 0


async def _index(path: Path, state: "StateDirectory", opening: "Opening", progress: "Progress") -> int:
    """Indexes one image; returns how many blocks had to be read."""
    from udedup.vdi.images import Images
    from udedup.vdi.indexing import index_image

    images = Images(state)
    try:
        image = images.add(path, opening=opening)
        task = progress.add_task(str(path), total=image.size)
        digested = 0

        def on_step(step: "Step") -> None:
            nonlocal digested
            digested += step.digested
            progress.update(task, completed=step.position)

        await index_image(images, image, on_step)
        return digested
    finally:
        images.close()
