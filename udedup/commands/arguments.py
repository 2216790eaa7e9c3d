"""What a parser takes, read back from it: settings, manual pages and completions know the options from here alone.

argparse has no public way to ask; what is read here, Sphinx, shtab and others read as well.
"""

import argparse
from collections.abc import Iterator
from enum import Enum

from attrs import frozen

from udedup.commands.options import Count, seconds


class Kind(Enum):
    """What an option's value is."""

    SWITCH = "true or false"
    NUMBER = "a number"
    TEXT = "a text"


@frozen
class Option:
    """One option that takes part in the work; not ``--help`` and ``--version``."""

    name: str
    """Its long name, without the dashes."""

    kind: Kind

    repeated: bool
    """Whether it may be given several times."""

    group: str
    """Title of the group that it is listed in; empty: of those without."""

    hidden: bool
    """Whether help leaves it out."""

    action: argparse.Action
    """What argparse knows of it."""


def options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    """All options of ``parser``, in the order of its help."""
    usual = {parser._positionals.title, parser._optionals.title}
    for group in parser._action_groups:
        for action in group._group_actions:
            long = [flag for flag in action.option_strings if flag.startswith("--")]
            if not long or _speaks(action):
                continue
            yield Option(
                name=long[0].removeprefix("--"),
                kind=_kind(action),
                repeated=isinstance(action, argparse._AppendAction),
                group="" if group.title in usual else str(group.title),
                hidden=action.help is argparse.SUPPRESS,
                action=action,
            )


def positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What ``parser`` takes that is no option, subcommands apart."""
    return [action for action in parser._get_positional_actions() if not isinstance(action, argparse._SubParsersAction)]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the subcommands of ``parser``, by name; empty if it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _speaks(action: argparse.Action) -> bool:
    """Whether the option prints something and ends the program."""
    return action.nargs == 0 and action.dest in ("help", "version")


def _kind(action: argparse.Action) -> Kind:
    if action.nargs == 0:
        return Kind.SWITCH
    if action.type in (int, float, seconds) or isinstance(action.type, Count):
        return Kind.NUMBER
    return Kind.TEXT
