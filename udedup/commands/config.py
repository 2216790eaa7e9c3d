"""Check a file of settings, and show what an engine would go by.

A mistake is one line that names the file, the key and what is allowed.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from udedup.commands import engine
from udedup.errors import UdedupError

if TYPE_CHECKING:
    from udedup.commands.arguments import Option


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup config``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--show", action="store_true", help="print all settings as a file: what FILE says, else the defaults (default)"
    )
    what.add_argument("--check", action="store_true", help="only say whether an engine would take the file")
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="default: what `udedup engine` reads, /etc/udedup.toml for root and "
        "$XDG_CONFIG_HOME/udedup/udedup.toml for others",
    )


def run(args: argparse.Namespace) -> int:
    """Reads the file as an engine would. Raises UdedupError for the first mistake."""
    from udedup.commands.settings import default_file, words_of

    file: Path = args.file or default_file()
    words = words_of(args.file, engine.prepare_parser)
    parser = argparse.ArgumentParser(add_help=False)
    engine.prepare_parser(parser)
    _check(file, parser.parse_args(words))
    if args.check:
        print(f"{file}: {'ok' if file.exists() else 'is not there: the defaults hold'}")
    else:
        print(*_lines(parser, words), sep="\n")
    return 0


def _check(file: Path, chosen: argparse.Namespace) -> None:
    """What is right by itself may not go together."""
    from udedup.commands.configuration import engine_config
    from udedup.engine.service import Service

    try:
        engine_config(chosen, Service()).check()
    except UdedupError as error:
        raise UdedupError(f"{file}: {error}") from None


def _lines(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Iterator[str]:
    """[engine] with everything; what has no value is a comment."""
    from udedup.commands.arguments import options
    from udedup.commands.settings import NOT_IN_FILES

    yield "[engine]"
    for option in options(parser):
        if option.name in NOT_IN_FILES:
            continue
        flags = option.action.option_strings
        given = [word for word in words if word.partition("=")[0] in flags]
        if given:
            yield f"{option.name} = {_value(option, [_said(option, word) for word in given])}"
        elif option.action.default is None:
            yield f"# {option.name}: not set"
        else:
            default = option.action.default
            yield f"{option.name} = {_value(option, default if option.repeated else [default])}  # default"


def _said(option: "Option", word: str) -> object:
    """What a word of the command line says."""
    name, equals, value = word.partition("=")
    return value if equals else name == f"--{option.name}"


def _value(option: "Option", said: list[object]) -> str:
    """What was said, in TOML."""
    written = [_written(option, value) for value in said]
    return f"[{', '.join(written)}]" if option.repeated else written[-1]


def _written(option: "Option", value: object) -> str:
    import json

    from udedup.commands.arguments import Kind

    if option.kind is not Kind.TEXT:
        return str(value).lower()
    # JSON's escapes are among TOML's.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
