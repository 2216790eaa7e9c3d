"""``demo/run``: the main job, or by its name a scenario of the paper."""

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from demo import main_job
from demo.scenarios import SCENARIOS
from demo.scenarios.play import add_options, play
from udedup.errors import UdedupError


def main() -> int:
    """Returns the exit status."""
    names = "".join(f"\n  {name:8}{kind.summary}" for name, kind in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        prog="demo/run",
        description="Without NAME: the main job; programs and guests share memory, and every byte is checked.\n"
        f"With NAME: a scenario with udedup, beside the kernel's KSM:{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, metavar="NAME", help="what to play")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    add_options(parser)
    args = parser.parse_args()
    # Whoever ends us wants guests, engine and mount gone, too: trio takes everything down for SIGINT only, and only
    # where that is not ignored, as it is in a shell's background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    status = 1
    try:
        status = play(args, Console()) if args.scenario else main_job.play(Console(), args.json)
    except* UdedupError as group:
        # Those of tasks that ran beside each other come together.
        for error in _leaves(group):
            print(f"demo/run: {error}", file=sys.stderr)
    except* KeyboardInterrupt:
        print("demo/run: interrupted", file=sys.stderr)
    return status


def _leaves(group: BaseExceptionGroup[UdedupError]) -> Iterator[UdedupError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
