"""Manual pages (man(7)) from the parsers: the same words as ``--help``."""

import argparse
import re
from collections.abc import Iterator, Mapping

from udedup.commands.arguments import subcommands


def pages(parser: argparse.ArgumentParser, version: str, topics: Mapping[str, str]) -> dict[str, str]:
    """Returns the pages by file name: one of the program, one of each command. ``topics``: what is told elsewhere."""
    commands = subcommands(parser)
    related = [f"udedup-{name}" for name in commands]
    found = {"udedup.1": "\n".join([*_page(parser, version), *_topics(topics), *_related(related)]) + "\n"}
    for name, command in commands.items():
        found[f"udedup-{name}.1"] = "\n".join([*_page(command, version), *_related(["udedup"])]) + "\n"
    return found


def escaped(text: str) -> str:
    """Text as roff takes it: nothing in it is a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\`").replace("'", "\\(aq")
    return "\n".join(f"\\&{line}" if line[:1] == "." else line for line in text.split("\n"))


def _page(parser: argparse.ArgumentParser, version: str) -> Iterator[str]:
    title = parser.prog.replace(" ", "-")
    summary, _, rest = (parser.description or "").partition("\n")
    yield f'.TH "{escaped(title.upper())}" "1" "" "udedup {escaped(version)}" "User Commands"'
    # Options are words: they are neither split nor stretched.
    yield ".nh"
    yield ".ad l"
    yield ".SH NAME"
    yield f"{escaped(title)} \\- {escaped(summary.rstrip('.'))}"
    yield ".SH SYNOPSIS"
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    program = escaped(parser.prog)
    yield f".B {program}"
    yield escaped(usage.removeprefix(parser.prog).strip())
    if rest.strip():
        yield ".SH DESCRIPTION"
        yield escaped(rest.strip())
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        if not actions:
            continue
        yield f'.SH "{escaped(str(group.title).upper())}"'
        if group.description:
            yield escaped(group.description)
        for action in actions:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action._choices_actions:
                    yield from _item(choice.dest, formatter._expand_help(choice))
                for command in action.choices.values() if parser.prog != "udedup" else ():
                    yield from _nested(command)
            else:
                yield from _item(formatter._format_action_invocation(action), _help(formatter, action))


def _help(formatter: argparse.HelpFormatter, action: argparse.Action) -> str:
    return formatter._expand_help(action) if action.help else ""


def _item(name: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield f".B {escaped(name)}"
    yield escaped(re.sub(r"\s+", " ", text)) or "\\&"


def _nested(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a command below a command."""
    formatter = parser._get_formatter()
    yield f'.SS "{escaped(" ".join(parser.format_usage().removeprefix("usage: ").split()))}"'
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS and action.dest != "help":
            yield from _item(formatter._format_action_invocation(action), _help(formatter, action))


def _topics(topics: Mapping[str, str]) -> Iterator[str]:
    yield ".SH TOPICS"
    yield escaped("Longer texts, shown by `udedup help TOPIC`:")
    for name, about in topics.items():
        yield from _item(name, about)


def _related(names: list[str]) -> Iterator[str]:
    yield '.SH "SEE ALSO"'
    yield ",\n".join(f".BR {escaped(name)} (1)" for name in names)
