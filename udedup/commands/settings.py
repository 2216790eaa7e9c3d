"""``udedup.toml``: what an engine is told by a file, and which users may use which trust domains.

```
[engine]                      # the options of `udedup engine`, by their names
mount = "/srv/disks"
socket-mode = "666"

[images]                      # names in the mount, and the files
web = "/var/lib/images/web.img"

[limits]                      # those options that `udedup engine --help` lists as limits
pages-to-scan = 2000

[domains.web]                 # a label, and who may use it; each user has a domain of its own
users = ["www-data", 1001]

[domains.fleet]
users = ["alice", "bob"]
shared = true                 # one domain for all of them
```

There is no list of options here: they are those of the command line, and all that a file says becomes words of one.
Every mistake is one line that names the file, the key and what is allowed.
"""

import argparse
import difflib
import os
import pwd
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from udedup.commands.arguments import Kind, Option, options
from udedup.commands.options import named_label
from udedup.errors import UdedupError

SYSTEM_FILE = Path("/etc/udedup.toml")
"""Of root's engine."""

UID_MAX = 0xFFFFFFFE
"""The highest; the one above means "no user"."""

NOT_IN_FILES = {"config", "parent"}
"""Options of the command line alone."""

LIMITS = "limits"
"""A table, and the title of the group of the options that may stand in it instead of in [engine]."""

TABLES = ("engine", "images", LIMITS, "domains")


def default_file() -> Path:
    """Returns where an engine of this user looks for its settings."""
    if os.geteuid() == 0:
        return SYSTEM_FILE
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path("~/.config").expanduser()) / "udedup" / "udedup.toml"


def words_of(path: Path | None, prepare: Callable[[argparse.ArgumentParser], None]) -> tuple[str, ...]:
    """As :func:`load`; None: the default file, if it is there."""
    if path is None and not default_file().exists():
        return ()
    return load(path or default_file(), prepare)


def load(path: Path, prepare: Callable[[argparse.ArgumentParser], None]) -> tuple[str, ...]:
    """Reads and checks a file, and returns it as words of the command line whose options ``prepare`` adds.

    Raises UdedupError.
    """
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            content = tomllib.load(file)
    except OSError as error:
        raise UdedupError(f"{path}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UdedupError(f"{path}: is not TOML: {error}") from None
    _check_keys(path, content, TABLES, "")
    parser = _Parser(add_help=False, allow_abbrev=False)
    prepare(parser)
    known = {option.name: option for option in options(parser) if option.name not in NOT_IN_FILES}
    limits = {name: option for name, option in known.items() if option.group == LIMITS}
    engine, limited = _table(path, content, "engine"), _table(path, content, LIMITS)
    for key in engine.keys() & limited.keys():
        raise UdedupError(f"{path}: {LIMITS}.{key}: is in [engine] as well: give it once")
    return (
        *_option_words(path, "engine", engine, known, parser),
        *_option_words(path, LIMITS, limited, limits, parser),
        *_image_words(path, _table(path, content, "images"), parser),
        *_domain_words(path, _table(path, content, "domains")),
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


def _check_keys(path: Path, table: Mapping[str, object], allowed: Collection[str], place: str) -> None:
    for key in table:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(allowed))}"
            raise UdedupError(f"{path}: {place}{_shown(key)}: is not known here: {advice}")


def _shown(key: str) -> str:
    return key if key.isprintable() else repr(key)


# ---- options ----


class _Parser(argparse.ArgumentParser):
    """Raises what it would have printed."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentTypeError(message)


def _option_words(
    path: Path, place: str, table: Mapping[str, object], known: Mapping[str, Option], parser: _Parser
) -> Iterator[str]:
    _check_keys(path, table, known, f"{place}.")
    for key, value in table.items():
        yield from _checked(
            path, f"{place}.{key}", f"--{key}", _words(path, f"{place}.{key}", known[key], value), parser
        )


def _words(path: Path, place: str, option: Option, value: object) -> list[str]:
    """An option as on the command line: true and false are --KEY and --no-KEY, a list repeats the option."""
    if isinstance(value, list) and not option.repeated:
        raise UdedupError(f"{path}: {place}: takes one value, not a list")
    words = []
    for item in value if isinstance(value, list) else [value]:
        if not _is(item, option.kind):
            several = ", or a list of them" if option.repeated else ""
            raise UdedupError(f"{path}: {place}: is {_named(item)}: give {option.kind.value}{several}")
        if isinstance(item, bool):
            words.append(f"--{option.name}" if item else f"--no-{option.name}")
        else:
            words.append(f"--{option.name}={item}")
    return words


def _is(value: object, kind: Kind) -> bool:
    if isinstance(value, bool):
        return kind is Kind.SWITCH
    return isinstance(value, str) if kind is Kind.TEXT else kind is Kind.NUMBER and isinstance(value, int | float)


def _named(value: object) -> str:
    """A value for people, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "a table" if isinstance(value, dict) else repr(value)


def _checked(path: Path, place: str, flag: str, words: list[str], parser: _Parser) -> list[str]:
    try:
        parser.parse_args(words)
    except argparse.ArgumentTypeError as error:
        raise UdedupError(f"{path}: {place}: {str(error).removeprefix(f'argument {flag}: ')}") from None
    return words


# ---- [images] ----


def _image_words(path: Path, table: Mapping[str, object], parser: _Parser) -> Iterator[str]:
    for name, image in table.items():
        place = f"images.{_shown(name)}"
        if "/" in name or "=" in name:
            raise UdedupError(f"{path}: {place}: is no name for an image: it can't have / or =")
        if not isinstance(image, str):
            raise UdedupError(f"{path}: {place}: is {_named(image)}: give the image's path, a text")
        yield from _checked(path, place, "--image", [f"--image={name}={image}"], parser)


# ---- [domains] ----


def _domain_words(path: Path, table: Mapping[str, object]) -> Iterator[str]:
    for label, domain in table.items():
        place = f"domains.{_shown(label)}"
        try:
            named_label(label)
        except argparse.ArgumentTypeError as error:
            raise UdedupError(f"{path}: {place}: {error}") from None
        if not isinstance(domain, dict):
            raise UdedupError(f"{path}: {place}: is not a table: begin it with a line [{place}]")
        _check_keys(path, domain, ("users", "shared"), f"{place}.")
        users = domain.get("users")
        if not isinstance(users, list) or not users:
            raise UdedupError(f"{path}: {place}.users: names nobody: give a list of user names or uids")
        shared = domain.get("shared", False)
        if not isinstance(shared, bool):
            raise UdedupError(f"{path}: {place}.shared: is {shared!r}: give true (one domain for all users) or false")
        yield from (f"--allow-domain={_uid(path, f'{place}.users', user)}:{label}" for user in users)
        if shared:
            yield f"--shared-domain={label}"


def _uid(path: Path, place: str, user: object) -> int:
    if isinstance(user, str):
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            raise UdedupError(f"{path}: {place}: there is no user {user!r}: give names that exist, or uids") from None
    if isinstance(user, int) and not isinstance(user, bool) and 0 <= user <= UID_MAX:
        return user
    raise UdedupError(f"{path}: {place}: {user!r} is no user: give a name or a uid from 0 to {UID_MAX}")
