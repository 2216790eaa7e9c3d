"""Print what a shell needs to complete udedup's commands and options.

bash: eval "$(udedup completion bash)"; zsh: write it to a file _udedup on $fpath; fish: udedup completion fish | source
"""

import argparse

SHELLS = ("bash", "zsh", "fish")

DIRECTORIES = ("DIR",)
FILES = ("PATH", "FILE", "BASE", "[NAME=]PATH", "[NAME=]IMAGE")
"""What the value of an option is, by its metavar."""

COMMAND = {
    "bash": "_udedup_complete_command",
    "zsh": "_command_names -e",
    "fish": "(__fish_complete_command)",
}
"""Functions that complete the name of a program."""

PREAMBLE = {"bash": '_udedup_complete_command() { compgen -c -- "$1"; }\n'}


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup completion``."""
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    import shtab

    from udedup.cli import build_parser

    parser = build_parser()
    _tell_values(parser)
    print(shtab.complete(parser, args.shell, preamble=PREAMBLE.get(args.shell, "")))
    return 0


def _tell_values(parser: argparse.ArgumentParser) -> None:
    """Says for each value whether it is a file, a directory or a command."""
    import shtab

    from udedup.commands.arguments import options, positionals, subcommands

    for action in [*(option.action for option in options(parser)), *positionals(parser)]:
        kind: object = None
        if action.nargs == argparse.REMAINDER:
            kind = COMMAND
        elif action.metavar in DIRECTORIES:
            kind = shtab.DIRECTORY
        elif action.metavar in FILES:
            kind = shtab.FILE
        if kind is not None:
            action.complete = kind  # type: ignore[attr-defined]
    for command in subcommands(parser).values():
        _tell_values(command)
