"""``udedup.toml``: what it may say, who may have written it, and one line for each mistake."""

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from support.engine import Engine, udedup

from udedup.commands import settings
from udedup.commands.arguments import Kind, Option, options
from udedup.commands.configuration import engine_config
from udedup.commands.engine import prepare_parser
from udedup.commands.settings import load
from udedup.engine.config import EngineConfig
from udedup.engine.reload import CHANGEABLE, differences
from udedup.engine.reload import option as name_of
from udedup.engine.service import Service
from udedup.errors import UdedupError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "udedup.toml"


def read(file: Path, text: str) -> tuple[str, ...]:
    file.write_text(text)
    file.chmod(0o644)
    return load(file, prepare_parser)


def test_domains(file: Path) -> None:
    found = read(file, '[domains.web]\nusers = ["root", 1001]\n[domains.fleet]\nusers = [1, 2]\nshared = true\n')
    assert found == (
        "--allow-domain=0:web",
        "--allow-domain=1001:web",
        "--allow-domain=1:fleet",
        "--allow-domain=2:fleet",
        "--shared-domain=fleet",
    )


def test_engine_options(file: Path) -> None:
    text = '[engine]\nmount = "/m"\nimage = ["a=/x", "/y"]\npages-to-scan = 7\nsmart-scan = false\nallow-other = true\n'
    assert read(file, text) == (
        "--mount=/m",
        "--image=a=/x",
        "--image=/y",
        "--pages-to-scan=7",
        "--no-smart-scan",
        "--allow-other",
    )


def test_an_empty_file_says_nothing(file: Path) -> None:
    assert read(file, "") == ()


def test_images_and_limits_have_tables_of_their_own(file: Path) -> None:
    text = '[images]\nweb = "/var/a=b.img"\n"two words" = "y"\n[limits]\nhint-slots = 7\nadvisor-max-cpu = 1.5\n'
    assert read(file, text) == (
        "--hint-slots=7",
        "--advisor-max-cpu=1.5",
        "--image=web=/var/a=b.img",
        "--image=two words=y",
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[engine", "is not TOML"),
        ("[motor]", "motor: is not known here: choose from domains, engine, images, limits"),
        ("[engnie]", "engnie: is not known here: did you mean engine?"),
        ("[domain.web]\nusers = [1]", "domain: is not known here: did you mean domains?"),
        ("engine = 1", "engine: is not a table"),
        ("[engine]\nxyz = 1", "engine.xyz: is not known here: choose from advisor-max-cpu, "),
        ("[engine]\npage-to-scan = 1", "engine.page-to-scan: is not known here: did you mean pages-to-scan?"),
        ("[engine]\nsleep_millisecs = 1", "engine.sleep_millisecs: is not known here: did you mean sleep-millisecs?"),
        ("[engine]\nsmart-scam = 1", "engine.smart-scam: is not known here: did you mean smart-scan?"),
        ("[limits]\nmount = '/m'", "limits.mount: is not known here: choose from advisor-max-cpu, "),
        ("[engine]\nhint-slots = 1\n[limits]\nhint-slots = 1", "limits.hint-slots: is in [engine] as well"),
        ("[limits]\nhint-slots = '7'", "limits.hint-slots: is '7': give a number"),
        ("[limits]\nhint-slots = 7.5", "limits.hint-slots: '7.5' is not a whole number"),
        ("[limits]\nanswer-seconds = 0", "limits.answer-seconds: 0 is no time to wait"),
        ("[limits]\nanswer-seconds = inf", "limits.answer-seconds: inf is no time to wait"),
        ("[images]\nweb = 1", "images.web: is 1: give the image's path, a text"),
        ("[images]\nweb = ''", "images.web: 'web=': no path"),
        ("[images]\n'' = '/x'", "images.: '=/x': the name before = is empty"),
        ("[images]\n'a/b' = '/x'", "images.a/b: is no name for an image"),
        ("images = '/x'", "images: is not a table"),
        ("[engine]\nmount = 5", "engine.mount: is 5: give a text"),
        ("[engine]\nparent = 1", "engine.parent: is not known here"),
        ("[engine]\nconfig = 'x'", "engine.config: is not known here"),
        ("[engine]\npages-to-scan = 0", "engine.pages-to-scan: 0 is below the least value, 1"),
        ("[engine]\npages-to-scan = true", "engine.pages-to-scan: is true: give a number"),
        ("[engine]\npolicy = 'best'", "engine.policy: invalid choice: 'best' (choose from 'linear', 'xlh', 'eager')"),
        ("[engine]\npolicy = ['xlh']", "engine.policy: takes one value"),
        ("[engine]\nimage = [1]", "engine.image: is 1: give a text, or a list of them"),
        ("[engine]\nsmart-scan = 'yes'", "engine.smart-scan: is 'yes': give true or false"),
        ("[engine]\nmount = {a = 1}", "engine.mount: is a table: give a text"),
        ("[engine]\nsocket-mode = '777'", "engine.socket-mode: '777' is no mode of a socket"),
        ("[engine]\nsocket-group = 'no such group'", "engine.socket-group: there is no group 'no such group'"),
        ("[domains]\nweb = 1", "domains.web: is not a table"),
        ("[domains.web]", "domains.web.users: names nobody"),
        ("[domains.web]\nusers = []", "domains.web.users: names nobody"),
        ("[domains.web]\nusers = 'root'", "domains.web.users: names nobody"),
        ("[domains.web]\nusers = ['no such user']", "domains.web.users: there is no user 'no such user'"),
        ("[domains.web]\nusers = [-1]", "domains.web.users: -1 is no user"),
        ("[domains.web]\nusers = [4294967295]", "domains.web.users: 4294967295 is no user"),
        ("[domains.web]\nusers = [true]", "domains.web.users: True is no user"),
        ("[domains.web]\nusers = ['root']\nshared = 1", "domains.web.shared: is 1: give true"),
        ("[domains.web]\nuser = ['root']", "domains.web.user: is not known here: did you mean users?"),
        ("[domains.private]\nusers = ['root']", "domains.private: 'private' has a meaning of its own"),
        ("[domains.off]\nusers = ['root']", "domains.off: 'off' has a meaning of its own"),
        (f"[domains.{'x' * 64}]\nusers = ['root']", "is longer than 63 bytes"),
        ('[domains."a\\nb"]\nusers = ["root"]', "domains.'a\\\\nb': 'a\\\\nb' is no label"),
    ],
)
def test_mistakes_are_one_line(file: Path, text: str, error: str) -> None:
    with pytest.raises(UdedupError) as caught:
        read(file, text)
    assert str(caught.value).startswith(f"{file}: ")
    assert error.replace("\\\\", "\\") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_others_could_have_written(file: Path) -> None:
    file.write_text("")
    file.chmod(0o664)
    with pytest.raises(UdedupError, match="written by somebody else"):
        load(file, prepare_parser)
    file.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(file, 65534, 65534)
        with pytest.raises(UdedupError, match="written by somebody else"):
            load(file, prepare_parser)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_files_that_are_none(file: Path, kind: str) -> None:
    if kind == "folder":
        file.mkdir()
    elif kind == "binary":
        file.write_bytes(b"\xff\xfe\0")
    with pytest.raises(UdedupError, match="can't be read" if kind != "binary" else "is not TOML") as caught:
        load(file, prepare_parser)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uid", "home", "expected"),
    [(0, "/x", "/etc/udedup.toml"), (7, "/x", "/x/udedup/udedup.toml"), (7, "", "/home/me/.config/udedup/udedup.toml")],
)
def test_default_file(monkeypatch: pytest.MonkeyPatch, uid: int, home: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", home)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert settings.default_file() == Path(expected)


# ---- one list of options ----

OTHER = {
    "advisor-mode": "scan-time",
    "allow-domain": "1000:web",
    "hint-ratio": "3:2",
    "image": "web=/x",
    "image-format": "raw",
    "log-format": "json",
    "log-level": "debug",
    "metrics-group": "0",
    "policy": "eager",
    "pressure": "off",
    "shared-domain": "web",
    "socket-group": "0",
    "socket-mode": "666",
}
"""Another value than the default, of options that take texts but no paths; of numbers it is 7."""

INTERNAL = {"drop_privileges", "service", "part_left"}
"""Fields of EngineConfig that are no choice of a person's."""


def engine_options() -> list[Option]:
    parser = argparse.ArgumentParser()
    prepare_parser(parser)
    return [option for option in options(parser) if option.name not in settings.NOT_IN_FILES]


def config_by(*words: str) -> EngineConfig:
    parser = argparse.ArgumentParser()
    prepare_parser(parser)
    return engine_config(parser.parse_args(words), Service())


def other_value(option: Option) -> bool | int | str:
    if option.kind is Kind.SWITCH:
        return not option.action.default
    return 7 if option.kind is Kind.NUMBER else OTHER.get(option.name, "/x")


@pytest.mark.parametrize("option", engine_options(), ids=lambda option: option.name)
def test_each_option_says_the_same_in_the_file_and_on_the_command_line(file: Path, option: Option) -> None:
    value = other_value(option)
    text = str(value).lower() if isinstance(value, bool | int) else f'"{value}"'
    flag = f"--{option.name}" if value else f"--no-{option.name}"
    words = (flag,) if isinstance(value, bool) else (f"--{option.name}={value}",)
    assert read(file, f"[engine]\n{option.name} = {text}\n") == words
    tables = ["engine", *(["limits"] if option.group == "limits" else [])]
    for table in tables:
        assert read(file, f"[{table}]\n{option.name} = {text}\n") == words


def test_there_is_an_option_for_each_choice() -> None:
    advised = ("--advisor-mode=scan-time",)
    changed: set[str] = set()
    for option in engine_options():
        before = advised if option.name.startswith("advisor-") and option.name != "advisor-mode" else ()
        value = other_value(option)
        word = f"--{option.name}={value}"
        if isinstance(value, bool):
            word = f"--{option.name}" if value else f"--no-{option.name}"
        found = differences(config_by(*before), config_by(*before, word))
        assert found or option.name in ("log-format", "log-level"), f"--{option.name} changes nothing"
        changed |= found
    assert changed == {field.name for field in attrs.fields(EngineConfig)} - INTERNAL


def test_reload_names_options_by_their_names() -> None:
    known = {option.name for option in engine_options()} | {"advisor-*"}
    assert {name_of(field.name) for field in attrs.fields(EngineConfig)} - {"service", "part-left"} <= known | {
        "drop-privileges"
    }
    assert {field.name for field in attrs.fields(EngineConfig)} >= CHANGEABLE


# ---- udedup config ----

EVERYTHING = """
[engine]
mount = "/m"
smart-scan = false
allow-backing = ["/etc", "/usr"]
secret-file = "/a \\"b\\" \\u007f ä"
[images]
web = "/x"
[limits]
pages-to-scan = 7
[domains.web]
users = [1, 2]
shared = true
"""


def test_config_shows_what_an_engine_would_go_by(file: Path, tmp_path: Path) -> None:
    words = read(file, EVERYTHING)
    done = udedup("config", "--show", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pages-to-scan = 7\n" in done.stdout
    assert "sleep-millisecs = 20  # default\n" in done.stdout
    assert "# max-map-count: not set\n" in done.stdout
    shown = tmp_path / "shown.toml"
    assert config_by(*read(shown, done.stdout)) == config_by(*words)
    assert udedup("config", file).stdout == done.stdout
    again = udedup("config", "--show", shown)
    assert config_by(*read(shown, again.stdout)) == config_by(*words)


def test_config_checks(file: Path) -> None:
    read(file, EVERYTHING)
    done = udedup("config", "--check", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{file}: ok\n", "")
    file.write_text("[engine]\npage-to-scan = 1\n")
    done = udedup("config", "--check", file)
    reason = "engine.page-to-scan: is not known here: did you mean pages-to-scan?"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"udedup: {file}: {reason}\n")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("images = {web = '/x'}", "images are given but no mount directory"),
        ("[limits]\nadvisor-mode = 'scan-time'\nsleep-millisecs = 0", "the advisor sets a rate, but a sleep of 0 ms"),
        ("[limits]\nhint-slots = 1000000000", "hint slots is 1000000000: give 1 to 268435456"),
        ("[limits]\nagents-max = 2000000", "agents is at most 2000000: give 1 to 1048575"),
        ("[limits]\nholdoff-millisecs = 5000000000", "holdoff is 5000000000 ms: give 0 to 4294967295"),
        ("[engine]\nshared-domain = 'web'", "domain 'web' is shared, but no user may use it"),
    ],
)
def test_config_checks_what_does_not_go_together(file: Path, text: str, error: str) -> None:
    file.write_text(text)
    file.chmod(0o644)
    done = udedup("config", "--check", file)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"udedup: {file}: {error}")


@pytest.mark.require("root")
def test_config_without_a_file(tmp_path: Path) -> None:
    done = udedup("config", "--check", tmp_path / "none.toml")
    assert (done.returncode, done.stderr) == (
        1,
        f"udedup: {tmp_path / 'none.toml'}: can't be read: No such file or directory\n",
    )


# ---- the command ----


def test_missing_file_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    done = udedup("engine", "--socket", tmp_path / "socket", "--config", tmp_path / "none.toml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"udedup: {tmp_path / 'none.toml'}: can't be read: No such file or directory\n"


@pytest.mark.require("userfaultfd-move", "root")
def test_command_line_goes_before_the_file(engine_factory: Callable[..., Engine], file: Path) -> None:
    file.write_text('[engine]\npages-to-scan = 70\npolicy = "linear"\n')
    file.chmod(0o644)
    engine = engine_factory("--config", str(file), "--policy", "eager", mount=False)
    status = engine.status()
    assert (status["policy"], status["pages_to_scan"]) == ("eager", 70)


@pytest.mark.require("userfaultfd-move", "root")
def test_off_runs_the_program_as_it_is(engine: Engine) -> None:
    """Also inside a wrapped program; what else is preloaded stays."""
    script = "echo $LD_PRELOAD $UDEDUP_DOMAIN; exec grep -c libudedup /proc/self/maps"
    environment = {**os.environ, "LD_PRELOAD": "/a/libudedup.so /lib/x86_64-linux-gnu/libm.so.6", "UDEDUP_DOMAIN": "x"}
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    output, _ = engine.wrap("sh", "-c", script, domain="off", **options).communicate(timeout=20)
    assert output == "/lib/x86_64-linux-gnu/libm.so.6\n0\n"
