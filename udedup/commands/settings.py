"""``udedup.toml``: what an engine is told by a file, and which users may use which trust domains.

```
[engine]                      # the options of `udedup engine`, by their names
mount = "/srv/disks"
image = ["web=/var/lib/images/web.img"]

[domains.web]                 # a label, and who may use it; each user has a domain of its own
users = ["www-data", 1001]

[domains.fleet]
users = ["alice", "bob"]
shared = true                 # one domain for all of them
```

Every mistake is one line that names the file, the key and what is allowed.
"""

import argparse
import os
import pwd
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from attrs import frozen

from udedup.commands.options import named_label
from udedup.errors import UdedupError

SYSTEM_FILE = Path("/etc/udedup.toml")
"""Of root's engine."""

UID_MAX = 0xFFFFFFFE
"""The highest; the one above means "no user"."""

NOT_IN_FILES = {"config", "parent"}
"""Options of the command line alone."""


@frozen
class Settings:
    """What a file says; nothing without one."""

    words: tuple[str, ...] = ()
    """Of [engine], as command line words."""

    allowed: frozenset[tuple[int, str]] = frozenset()
    """(uid, label) pairs of [domains]."""

    shared: frozenset[str] = frozenset()
    """Labels under which all users share one domain."""


def default_file() -> Path:
    """Returns where an engine of this user looks for its settings."""
    if os.geteuid() == 0:
        return SYSTEM_FILE
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path("~/.config").expanduser()) / "udedup" / "udedup.toml"


def load(path: Path, prepare: Callable[[argparse.ArgumentParser], None]) -> Settings:
    """Reads and checks a file; ``prepare`` adds the options that [engine] may set. Raises UdedupError."""
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            content = tomllib.load(file)
    except OSError as error:
        raise UdedupError(f"{path}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UdedupError(f"{path}: is not TOML: {error}") from None
    _check_keys(path, content, {"engine", "domains"}, "")
    domains = dict(_domains(path, _table(path, content, "domains")))
    return Settings(
        words=tuple(_engine_words(path, _table(path, content, "engine"), prepare)),
        allowed=frozenset((uid, label) for label, (users, _) in domains.items() for uid in users),
        shared=frozenset(label for label, (_, shared) in domains.items() if shared),
    )


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Who can write the file decides whose memory is compared with whose."""
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UdedupError(
            f"{path}: could have been written by somebody else: it must belong to root or to the engine's user, and "
            "nobody else may write to it (chown, chmod go-w)"
        )


def _table(path: Path, content: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = content.get(name, {})
    if not isinstance(value, dict):
        raise UdedupError(f"{path}: {name}: is not a table: begin it with a line [{name}]")
    return value


def _check_keys(path: Path, table: Mapping[str, object], allowed: set[str], place: str) -> None:
    for key in table:
        if key not in allowed:
            raise UdedupError(f"{path}: {place}{key}: is not known here: choose from {', '.join(sorted(allowed))}")


# ---- [engine] ----


class _Parser(argparse.ArgumentParser):
    """Knows the options it has, and raises what it would have printed."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        """Options that may stand in a file, without the dashes."""
        self.repeated: set[str] = set()
        """Those of them that may be given several times."""
        self.switches: set[str] = set()
        """Those that are on or off."""
        super().__init__(add_help=False, allow_abbrev=False)

    def add_argument(self, *names: Any, **keywords: Any) -> argparse.Action:
        action = super().add_argument(*names, **keywords)
        name = names[0].removeprefix("--")
        self.names.add(name)
        if keywords.get("action") == "append":
            self.repeated.add(name)
        if isinstance(action, argparse.BooleanOptionalAction):
            self.switches.add(name)
        return action

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentTypeError(message)


def _engine_words(
    path: Path, table: Mapping[str, object], prepare: Callable[[argparse.ArgumentParser], None]
) -> Iterator[str]:
    parser = _Parser()
    prepare(parser)
    _check_keys(path, table, parser.names - NOT_IN_FILES, "engine.")
    for key, value in table.items():
        if isinstance(value, list) and key not in parser.repeated:
            raise UdedupError(f"{path}: engine.{key}: takes one value, not a list")
        if isinstance(value, bool) is not (key in parser.switches):
            wanted = "true or false" if key in parser.switches else "a value, not true or false"
            raise UdedupError(f"{path}: engine.{key}: takes {wanted}")
        words = list(_words(path, key, value))
        try:
            parser.parse_args(words)
        except argparse.ArgumentTypeError as error:
            reason = str(error).removeprefix(f"argument --{key}: ")
            raise UdedupError(f"{path}: engine.{key}: {reason}") from None
        yield from words


def _words(path: Path, key: str, value: object) -> Iterator[str]:
    """An option as on the command line: true and false are --KEY and --no-KEY, a list repeats the option."""
    if isinstance(value, bool):
        yield f"--{key}" if value else f"--no-{key}"
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, str):
                raise UdedupError(f"{path}: engine.{key}: {item!r} is no text: give a list of texts")
            yield f"--{key}={item}"
    elif isinstance(value, str | int | float):
        yield f"--{key}={value}"
    else:
        raise UdedupError(f"{path}: engine.{key}: give a text, a number, true or false, or a list of texts")


# ---- [domains] ----


def _domains(path: Path, table: Mapping[str, object]) -> Iterator[tuple[str, tuple[list[int], bool]]]:
    """(label, (uids, whether they share one domain))."""
    for label, domain in table.items():
        place = f"domains.{label!r}" if not label.isprintable() else f"domains.{label}"
        try:
            named_label(label)
        except argparse.ArgumentTypeError as error:
            raise UdedupError(f"{path}: {place}: {error}") from None
        if not isinstance(domain, dict):
            raise UdedupError(f"{path}: {place}: is not a table: begin it with a line [{place}]")
        _check_keys(path, domain, {"users", "shared"}, f"{place}.")
        users = domain.get("users")
        if not isinstance(users, list) or not users:
            raise UdedupError(f"{path}: {place}.users: names nobody: give a list of user names or uids")
        shared = domain.get("shared", False)
        if not isinstance(shared, bool):
            raise UdedupError(f"{path}: {place}.shared: is {shared!r}: give true (one domain for all users) or false")
        yield label, ([_uid(path, f"{place}.users", user) for user in users], shared)


def _uid(path: Path, place: str, user: object) -> int:
    if isinstance(user, str):
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            raise UdedupError(f"{path}: {place}: there is no user {user!r}: give names that exist, or uids") from None
    if isinstance(user, int) and not isinstance(user, bool) and 0 <= user <= UID_MAX:
        return user
    raise UdedupError(f"{path}: {place}: {user!r} is no user: give a name or a uid from 0 to {UID_MAX}")
