"""Topics and manual pages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.engine import udedup

from udedup.cli import build_parser
from udedup.commands import COMMANDS
from udedup.commands.arguments import options, subcommands
from udedup.commands.manual import escaped
from udedup.commands.topics import TEXTS, TOPICS


@pytest.mark.parametrize("topic", TOPICS)
def test_topics(topic: str) -> None:
    done = udedup("help", topic)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 20
    title = (TEXTS / f"{topic}.md").read_text().splitlines()[0].removeprefix("# ")
    assert title in done.stdout


def test_each_text_is_a_topic() -> None:
    assert {path.stem for path in TEXTS.glob("*.md")} == set(TOPICS)


@pytest.mark.parametrize("topic", TOPICS)
def test_texts_speak_of_commands_and_options_there_are(topic: str) -> None:
    parser = build_parser()
    commands = subcommands(parser)
    text = (TEXTS / f"{topic}.md").read_text()
    assert set(re.findall(r"`udedup ([a-z]+)", text)) <= commands.keys()
    actions = [option.action for command in commands.values() for option in options(command)]
    known = {flag for action in actions for flag in action.option_strings}
    assert set(re.findall(r"`(?:udedup [a-z]+ )?(--[a-z-]+)", text)) <= known


def test_help_lists_topics_and_explains_commands() -> None:
    assert all(f"  {topic} " in udedup("help").stdout for topic in TOPICS)
    assert udedup("help", "status").stdout == udedup("status", "--help").stdout


@pytest.mark.parametrize(("argv", "reason"), [(("safty",), "did you mean safety?"), (("qqq",), "choose from safety, ")])
def test_unknown_topics(argv: tuple[str, ...], reason: str) -> None:
    done = udedup("help", *argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert reason in done.stderr


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man") / "man1"
    done = udedup("help", "--man", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_there_is_a_page_of_each_command(pages: Path) -> None:
    assert {page.name for page in pages.iterdir()} == {"udedup.1", *(f"udedup-{name}.1" for name in COMMANDS)}


@pytest.mark.require("mandoc")
def test_manual_pages_are_right(pages: Path) -> None:
    command = ["mandoc", "-T", "lint", "-W", "warning", *map(str, sorted(pages.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []


@pytest.mark.require("mandoc")
@pytest.mark.parametrize("name", COMMANDS)
def test_manual_pages_say_what_help_says(pages: Path, name: str) -> None:
    command = ["mandoc", "-T", "utf8", "-O", "width=1000", str(pages / f"udedup-{name}.1")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Bold is overstruck.
    shown = " ".join(re.sub(".\b", "", shown).split())
    parser = subcommands(build_parser())[name]
    for option in options(parser):
        if not option.hidden:
            assert f"--{option.name}" in shown
            text = parser._get_formatter()._expand_help(option.action)
            assert " ".join(text.split()) in shown


def test_nothing_in_a_text_is_a_request() -> None:
    assert escaped(".SH x\n'y\\fB -z") == "\\&.SH x\n\\(aqy\\efB \\-z"


def test_pages_where_none_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = udedup("help", "--man", tmp_path / "file")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"udedup: {tmp_path / 'file'}: can't be written: ")


@pytest.mark.parametrize(
    ("argv", "needless"),
    [
        (("--help",), {"attrs", "msgspec", "trio", "rich", "shtab", "tomllib", "udedup._native"}),
        (("status", "--socket", "/nobody"), {"trio", "rich", "shtab", "tomllib", "udedup._native"}),
    ],
)
def test_commands_import_nothing_that_takes_long(argv: tuple[str, ...], needless: set[str]) -> None:
    """How fast they start is measured by tests/bench/start.py."""
    program = "import sys, udedup.cli\ntry: udedup.cli.main(sys.argv[1:])\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & needless == set()
