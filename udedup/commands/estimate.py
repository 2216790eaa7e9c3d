"""Tell what processes could share, before any of them is wrapped.

Looks at the memory of processes that run, from outside: without stopping them, or bringing anything into memory. Give
process ids, or a control group, or --all. As root it sees the memory of all, and page frames, so that what is shared
already is counted once; others see their own processes. `udedup help estimate` explains the figures.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from udedup.commands.options import add_backing_option, add_image_options, add_json_option, add_state_option, count

if TYPE_CHECKING:
    from rich.progress import Progress

    from udedup.estimate.figures import Estimate
    from udedup.estimate.survey import Survey

_PIPE_COLUMNS = 200
_PERCENT = 100.0


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup estimate``."""
    parser.add_argument("pids", type=count(1), nargs="*", metavar="PID", help="a process to look at")
    parser.add_argument(
        "--cgroup", type=Path, metavar="DIR", help="all processes of a control group, such as system.slice, and below"
    )
    parser.add_argument("--all", action="store_true", help="all processes that this user may look at")
    parser.add_argument(
        "--sample",
        type=part,
        default=1.0,
        metavar="PERCENT",
        help="read only so much of the memory, chosen at random, and say between which bounds the truth is (5%%)",
    )
    parser.add_argument(
        "--jobs", type=count(0), default=1, metavar="N", help="processors to use; 0: all (default: %(default)s)"
    )
    parser.add_argument("--top", type=count(0), default=10, metavar="N", help="rows of a table (default: %(default)s)")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="IMAGE",
        help="tell how much of the memory is equal to blocks of this disk image, of any format; may be repeated",
    )
    add_image_options(parser)
    add_backing_option(parser)
    add_state_option(parser)
    add_json_option(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures into FILE, too")


def part(text: str) -> float:
    """Parses a part of the memory, ``5%`` or ``5``: above 0 and up to 100."""
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no part of the memory such as 5%") from None
    if not 0 < percent <= _PERCENT:
        raise argparse.ArgumentTypeError(f"{text}: a sample is more than 0% and at most 100%")
    return percent / _PERCENT


def run(args: argparse.Namespace) -> int:
    """Looks, and prints tables, or JSON. What could not be looked at is told on stderr."""
    if bool(args.pids) + (args.cgroup is not None) + args.all != 1:
        args.subparser.error("give either process ids, or --cgroup DIR, or --all")
    import trio

    try:
        estimate = trio.run(_estimate, args)
    except BaseExceptionGroup as group:
        interrupts, others = group.split(KeyboardInterrupt)
        if interrupts is None or others is not None:
            raise
        raise KeyboardInterrupt from None
    if args.html is not None:
        from udedup.errors import UdedupError
        from udedup.estimate.page import page

        try:
            args.html.write_text(page(estimate, args.top), encoding="utf-8")
        except OSError as error:
            raise UdedupError(f"{args.html}: can't be written: {error.strerror}") from None
    for left in estimate.left_out:
        print(f"udedup: process {left.pid} ({left.command}) is not in this: {left.reason}", file=sys.stderr)
    if args.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(estimate), indent=2).decode())
        return 0
    from rich.console import Console

    from udedup.estimate.tables import tables

    # Into a pipe there is no width to keep to: nothing is cut off there.
    console = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
    console.print(tables(estimate, args.top), highlight=False, markup=False)
    return 0


async def _estimate(args: argparse.Namespace) -> "Estimate":
    import os

    import trio
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from udedup.estimate import processes
    from udedup.estimate.survey import Survey

    if args.all:
        pids = processes.everybody()
    else:
        pids = processes.of_cgroup(args.cgroup) if args.cgroup is not None else args.pids
    survey = Survey(pids, args.sample)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()
    # Progress is for people: what is printed is the same without a terminal.
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        task = progress.add_task("memory", total=survey.expected())
        await survey.look(args.jobs or len(os.sched_getaffinity(0)), lambda pages: progress.update(task, advance=pages))
        await trio.to_thread.run_sync(_know, survey, args, progress)
        progress.add_task("comparison", total=None)
        return await trio.to_thread.run_sync(survey.judge)


def _know(survey: "Survey", args: argparse.Namespace, progress: "Progress") -> None:
    """Makes the images' blocks known."""
    if not args.image:
        return
    from udedup.estimate.blocks import digests
    from udedup.vdi.formats.probe import Opening
    from udedup.vdi.images import Images

    opening = Opening(args.image_format, tuple(path.absolute() for path in args.allow_backing), args.secret_file)
    for path in args.image:
        images = Images()
        try:
            image = images.add(path, opening=opening)
            task = progress.add_task(str(path), total=image.size)
            for position, page in digests(image, args.state_dir.absolute()):
                survey.know(str(path), page)
                progress.update(task, completed=position)
        finally:
            images.close()
