"""Completion scripts, in the shells themselves."""

import subprocess
from pathlib import Path

import pytest
from support.engine import udedup

from udedup.commands import COMMANDS
from udedup.commands.completion import SHELLS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        done = udedup("completion", shell)
        assert (done.returncode, done.stderr) == (0, "")
        (folder / shell).write_text(done.stdout)
    return folder


def in_bash(scripts: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    script = """
    source "$1"; shift
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
    read -r _ _ function _ <<<"$(complete -p udedup | sed 's/.*-F/x x/')"
    "$function" udedup "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    command = ["bash", "--norc", "-c", script, "bash", str(scripts / "bash"), "udedup", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return {line.strip() for line in done.stdout.splitlines() if line.strip()}


def in_fish(scripts: Path, line: str) -> set[str]:
    """What fish offers at the end of a line."""
    script = f"source {scripts / 'fish'}; complete --do-complete $argv[1]"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script, line], capture_output=True, text=True, check=True, timeout=20
    )
    return {line.partition("\t")[0] for line in done.stdout.splitlines()}


@pytest.mark.require("bash")
def test_bash(scripts: Path, tmp_path: Path) -> None:
    assert in_bash(scripts, "") >= set(COMMANDS)
    assert in_bash(scripts, "un") == {"unmerge"}
    assert in_bash(scripts, "engine", "--pol") == {"--policy"}
    assert in_bash(scripts, "engine", "--policy", "") == {"linear", "xlh", "eager"}
    assert "--parent" not in in_bash(scripts, "engine", "--")
    (tmp_path / "disk.img").touch()
    assert in_bash(scripts, "engine", "--config", f"{tmp_path}/di") == {f"{tmp_path}/disk.img"}
    assert "sleep" in in_bash(scripts, "run", "slee")


@pytest.mark.require("fish")
def test_fish(scripts: Path) -> None:
    assert in_fish(scripts, "udedup ") >= set(COMMANDS)
    assert in_fish(scripts, "udedup un") == {"unmerge"}
    assert in_fish(scripts, "udedup engine --pol") >= {"--policy"}
    assert in_fish(scripts, "udedup engine --policy ") >= {"linear", "xlh", "eager"}
    assert "--parent" not in in_fish(scripts, "udedup engine --")


IN_ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "autoload -Uz compinit && compinit -D -u; source $1; compdef _shtab_udedup udedup; PS1=; print re''ady"
zpty -r -m shell line '*ready*'
zpty -w -n shell "udedup $2"$'\t'
zpty -r -m shell line "*udedup $3*" && print completed
zpty -d shell
"""


@pytest.mark.require("zsh")
def test_zsh(scripts: Path) -> None:
    """It reads the script, and completes a command in a terminal of its own."""
    subprocess.run(["zsh", "-n", str(scripts / "zsh")], check=True, timeout=20)
    command = ["zsh", "-f", "-c", IN_ZSH, "zsh", str(scripts / "zsh"), "unm", "unmerge"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "completed\n", done.stdout + done.stderr


def test_other_shells_are_wrong_usage() -> None:
    done = udedup("completion", "ksh")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
