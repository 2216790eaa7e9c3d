"""What a user sees of the command line without any engine: help, usage errors, and where engines are looked for."""

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from support.engine import udedup

from udedup import places
from udedup.commands import COMMANDS
from udedup.commands.options import allowed_domain, image_argument, ratio


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str) -> None:
    done = udedup(name, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(f"usage: udedup {name}")


def test_help_lists_all_commands() -> None:
    done = udedup("--help")
    assert done.returncode == 0
    assert all(re.search(rf"\n    {name}\s", done.stdout) for name in COMMANDS)


@pytest.mark.parametrize("name", ["status", "doctor"])
def test_tables_come_as_json_too(name: str) -> None:
    assert "--json" in udedup(name, "--help").stdout


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("nothing",),
        ("run",),
        ("run", "--"),
        ("run", "--unknown", "true"),
        ("run", "--domain", "", "true"),
        ("run", "--domain", "x" * 64, "true"),
        ("run", "--domain", "a\nb", "true"),
        ("engine", "--allow-domain", "1000:" + "ä" * 32),
        ("mount",),
        ("mount", "=disk"),
        ("mount", "name="),
        ("mount", "--image-format", "best", "disk"),
        ("umount",),
        ("unmerge", "zero"),
        ("unmerge", "0"),
        ("pause", "-1"),
        ("top", "--interval", "0"),
        ("top", "--sort", "size"),
        ("engine", "--policy", "best"),
        ("engine", "--pages-to-scan", "0"),
        ("engine", "--advisor-mode", "best"),
        ("engine", "--advisor-min-pages-to-scan", "0"),
        ("engine", "--pages-to-scan", "many"),
        ("engine", "--sleep-millisecs", "-1"),
        ("engine", "--hint-ratio", "1"),
        ("engine", "--hint-ratio", "0:0"),
        ("engine", "--hint-ratio", "-1:1"),
        ("engine", "--hint-ratio", "99999999999999999999:1"),
        ("engine", "--hint-ratio", "1:1001"),
        ("engine", "--hint-slots", "0"),
        ("engine", "--allow-domain", "label"),
        ("engine", "--allow-domain", "1000:"),
        ("engine", "--image", "/disk"),
        ("engine", "--metrics", "0.0.0.0:9105"),
        ("engine", "--metrics", "127.0.0.1"),
        ("engine", "--metrics-group", "no such group"),
    ],
)
def test_wrong_usage_ends_with_2_and_starts_nothing(argv: tuple[str, ...]) -> None:
    done = udedup(*argv, timeout=20)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("udedup")
    assert done.stderr.endswith("--help`\n")
    assert done.stderr.count("\n") == 1


def test_version() -> None:
    done = udedup("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"udedup {version('udedup')}\n", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/var/disk.img", (None, Path("/var/disk.img"))),
        ("web=/var/disk.img", ("web", Path("/var/disk.img"))),
        ("web=/var/a=b.img", ("web", Path("/var/a=b.img"))),
        ("/var/a=b.img", (None, Path("/var/a=b.img"))),
        ("./a=b.img", (None, Path.cwd() / "a=b.img")),
        ("disk.img", (None, Path.cwd() / "disk.img")),
    ],
)
def test_image_argument(text: str, expected: tuple[str | None, Path]) -> None:
    assert image_argument(text) == expected


def test_ratio_and_domain_arguments() -> None:
    assert ratio("0:1") == (0, 1)
    assert ratio("3:2") == (3, 2)
    assert ratio("0:1000") == (0, 1000)
    assert allowed_domain("1000:web:blue") == (1000, "web:blue")


def test_socket_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UDEDUP_SOCKET", str(tmp_path / "mine"))
    assert places.default_socket() == tmp_path / "mine"


@pytest.mark.parametrize(
    ("uid", "runtime", "expected"),
    [
        (0, "/run/user/0", "/run/udedup.sock"),
        (7, "/run/user/7", "/run/user/7/udedup.sock"),
        (7, "", "/tmp/udedup-7.sock"),
    ],
)
def test_socket_by_user(monkeypatch: pytest.MonkeyPatch, uid: int, runtime: str, expected: str) -> None:
    monkeypatch.delenv("UDEDUP_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert places.default_socket() == Path(expected)


def test_engine_of_root_is_found_by_users_without_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system, own = tmp_path / "system", tmp_path / "own"
    monkeypatch.setattr(places, "SYSTEM_SOCKET", system)
    monkeypatch.setenv("UDEDUP_SOCKET", str(own))
    assert places.engine_socket() == own
    system.touch()
    assert places.engine_socket() == system
    own.touch()
    assert places.engine_socket() == own


@pytest.mark.parametrize(
    "argv",
    [
        ("status",),
        ("top", "--once"),
        ("pause", "--resume"),
        ("unmerge",),
        ("unmerge", "1"),
        ("mount", "/disk"),
        ("umount", "disk"),
    ],
)
def test_no_engine_is_one_line(tmp_path: Path, argv: tuple[str, ...]) -> None:
    done = udedup(argv[0], "--socket", tmp_path / "nobody", *argv[1:])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"udedup: no engine listens at {tmp_path / 'nobody'}")
