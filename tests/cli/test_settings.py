"""``udedup.toml``: what it may say, who may have written it, and one line for each mistake."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import Engine, udedup

from udedup.commands import settings
from udedup.commands.engine import prepare_parser
from udedup.commands.settings import Settings, load
from udedup.errors import UdedupError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "udedup.toml"


def read(file: Path, text: str) -> Settings:
    file.write_text(text)
    file.chmod(0o644)
    return load(file, prepare_parser)


def test_domains(file: Path) -> None:
    found = read(file, '[domains.web]\nusers = ["root", 1001]\n[domains.fleet]\nusers = [1, 2]\nshared = true\n')
    assert found.allowed == {(0, "web"), (1001, "web"), (1, "fleet"), (2, "fleet")}
    assert found.shared == {"fleet"}


def test_engine_options(file: Path) -> None:
    text = '[engine]\nmount = "/m"\nimage = ["a=/x", "/y"]\npages-to-scan = 7\nsmart-scan = false\nallow-other = true\n'
    assert read(file, text).words == (
        "--mount=/m",
        "--image=a=/x",
        "--image=/y",
        "--pages-to-scan=7",
        "--no-smart-scan",
        "--allow-other",
    )


def test_an_empty_file_says_nothing(file: Path) -> None:
    assert read(file, "") == Settings()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[engine", "is not TOML"),
        ("[motor]", "motor: is not known here: choose from domains, engine"),
        ("engine = 1", "engine: is not a table"),
        ("[engine]\nspeed = 1", "engine.speed: is not known here: choose from advisor-max-cpu, "),
        ("[engine]\nparent = 1", "engine.parent: is not known here"),
        ("[engine]\nconfig = 'x'", "engine.config: is not known here"),
        ("[engine]\npages-to-scan = 0", "engine.pages-to-scan: 0 is below the least value, 1"),
        ("[engine]\npages-to-scan = true", "engine.pages-to-scan: takes a value"),
        ("[engine]\npolicy = 'best'", "engine.policy: invalid choice: 'best' (choose from 'linear', 'xlh', 'eager')"),
        ("[engine]\npolicy = ['xlh']", "engine.policy: takes one value"),
        ("[engine]\nimage = [1]", "engine.image: 1 is no text"),
        ("[engine]\nsmart-scan = 'yes'", "engine.smart-scan: takes true or false"),
        ("[engine]\nmount = {a = 1}", "engine.mount: give a text, a number"),
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
        ("[domains.web]\nuser = ['root']", "domains.web.user: is not known here: choose from shared, users"),
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
