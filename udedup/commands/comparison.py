"""Show recorded runs beside each other, in one HTML page that needs no network.

It has the figures of the XLH paper (what was merged over time, and what could have been; lead times; visits per merge;
CPU; memory) and tables, with the first run as the yardstick. `demo/run NAME --record DIR` of the source records runs.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from udedup.commands.options import image_argument
from udedup.errors import UdedupError

if TYPE_CHECKING:
    from udedup.record.recording import Recording


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup report``."""
    parser.add_argument(
        "runs",
        type=image_argument,
        nargs="+",
        metavar="[LABEL=]RUN.parquet",
        help="a recording, and what to call it (default: its file's name)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--title", default="udedup: recorded runs", metavar="TEXT", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Reads all runs, then writes the page. Raises UdedupError."""
    from udedup.extras import needing

    with needing("record", "udedup report"):
        from udedup.record.page import write_html

    output: Path = args.output.absolute()
    recordings = _read(args.runs)
    if output in [path for _, path in args.runs]:
        raise UdedupError(f"{output}: is one of the recordings: give the page another name")
    try:
        write_html(recordings, args.title, output)
    except OSError as error:
        raise UdedupError(f"{output}: can't be written: {error.strerror}") from None
    return 0


def _read(runs: list[tuple[str | None, Path]]) -> "dict[str, Recording]":
    """The recordings by label; those without one have the shortest end of their path that no other has."""
    from udedup.record.recording import Recording

    recordings: dict[str, Recording] = {}
    for label, path in runs:
        label = label or _short(path, [other for name, other in runs if name is None])
        if label in recordings:
            raise UdedupError(f"two runs are called {label!r}: give one of them another name, LABEL={path}")
        recordings[label] = Recording.read(path)
    return recordings


def _short(path: Path, paths: list[Path]) -> str:
    parts = path.with_suffix("").parts
    others = [other.with_suffix("").parts for other in paths if other != path]
    for count in range(1, len(parts)):
        end = parts[-count:]
        if not any(other[-count:] == end for other in others):
            return "/".join(end)
    return str(path)
