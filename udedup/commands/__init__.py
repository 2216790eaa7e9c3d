"""The subcommands, one module each with ``prepare_parser`` and ``run``.

A module's docstring is its help, the first line of it the summary. Heavy imports happen inside ``run``, so that
``udedup run`` starts fast.
"""

import argparse
from typing import Protocol

from udedup.commands import (
    attach,
    clone,
    comparison,
    completion,
    config,
    dashboard,
    detach,
    doctor,
    engine,
    estimate,
    index,
    mount,
    pause,
    run,
    status,
    top,
    topics,
    umount,
    unmerge,
)


class Command(Protocol):
    """What a subcommand's module offers."""

    __doc__: str | None

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Adds the subcommand's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Does the work and returns the exit status; raises UdedupError for what the user can mend."""


COMMANDS: dict[str, Command] = {
    "engine": engine,
    "run": run,
    "mount": mount,
    "umount": umount,
    "clone": clone,
    "index": index,
    "estimate": estimate,
    "attach": attach,
    "detach": detach,
    "status": status,
    "top": top,
    "pause": pause,
    "unmerge": unmerge,
    "report": comparison,
    "doctor": doctor,
    "dashboard": dashboard,
    "config": config,
    "completion": completion,
    "help": topics,
}
