"""Finds the program a command line means, as a shell would, and tells whether the agent can enter it."""

import errno
import os
import signal
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from udedup.commands.elf import Elf, read_elf

_GLIBC_LOADER = "ld-linux-x86-64.so.2"
_SCRIPTS_NESTED_MAX = 5
"""How many `#!` interpreters deep the kernel follows a script (BINPRM recursion limit of fs/exec.c)."""

_FILE_CAPABILITIES = "security.capability"
_SHEBANG_MAX = 256
_NOT_FOUND, _CANNOT_EXECUTE = 127, 126


class ProgramError(Exception):
    """A command that cannot be started, with the exit status shells give: 127 not found, 126 not executable."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Program(NamedTuple):
    """A program file found for a command."""

    path: Path
    """The file to execute."""

    arguments: tuple[str, ...]
    """The whole argument vector, argv[0] included."""

    obstacle: str | None
    """Why the agent cannot enter it (static, setuid …), for people; None if it can."""


def find_program(command: list[str], environment: Mapping[str, str]) -> Program:
    """Returns the program that ``command`` starts. Raises ProgramError if there is none or it may not be executed."""
    path = _search(command[0], environment)
    if _is_executable_text(path):
        # No ELF file and no `#!`: execvp() and every shell hand such a file to /bin/sh.
        return Program(Path("/bin/sh"), ("/bin/sh", str(path), *command[1:]), _obstacle(Path("/bin/sh")))
    return Program(path, tuple(command), _obstacle(path))


def execute(program: Program, environment: Mapping[str, str]) -> int:
    """Replaces this process by the program; returns only, with the exit status, if the kernel refuses."""
    # Python ignores these two, and what is ignored stays so across execve().
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program.path, program.arguments, environment)
    except OSError as error:
        print(f"udedup: {program.path}: {error.strerror}", file=sys.stderr)
        return _CANNOT_EXECUTE


def _search(name: str, environment: Mapping[str, str]) -> Path:
    if not name:
        raise ProgramError("the command is empty: not found", _NOT_FOUND)
    if "/" in name:
        places = [Path(name)]
    else:
        places = [Path(folder or ".") / name for folder in environment.get("PATH", os.defpath).split(":")]
    refused: Path | None = None
    for place in places:
        try:
            mode = place.stat().st_mode
        except PermissionError:
            refused = refused or place
            continue
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
            continue
        if stat.S_ISREG(mode) and os.access(place, os.X_OK, effective_ids=True):
            return place
        if "/" in name or stat.S_ISREG(mode):
            refused = refused or place
    if refused is None:
        raise ProgramError(f"{name}: command not found", _NOT_FOUND)
    reason = "is a directory" if refused.is_dir() else "permission denied"
    raise ProgramError(f"{refused}: {reason}", _CANNOT_EXECUTE)


def _is_executable_text(path: Path) -> bool:
    """Whether execve() would answer ENOEXEC for what shells take for a script (no NUL in the first line, as bash)."""
    try:
        with path.open("rb") as file:
            head = file.read(_SHEBANG_MAX)
    except OSError:
        return False  # executable but not readable: for execve() to judge
    return not head.startswith((b"\x7fELF", b"#!")) and b"\0" not in head.split(b"\n", 1)[0]


def _obstacle(path: Path, depth: int = 0) -> str | None:
    """Returns why LD_PRELOAD has no effect on ``path``; follows scripts to their interpreter."""
    try:
        elf = read_elf(path)
        script = None if elf else _script_interpreter(path)
    except OSError:
        return None  # executable but not readable: nothing to look at, and the loader decides
    if script is not None and depth < _SCRIPTS_NESTED_MAX:
        return _obstacle(script, depth + 1)
    if elf is None:
        return None  # e.g. binfmt_misc: whatever runs it honours the preload itself
    return loader_obstacle(elf) or _privilege(path)


def loader_obstacle(elf: Elf) -> str | None:
    """Returns why nothing can be loaded into a program of this file, for people; None if it can."""
    if not elf.x86_64:
        return "is not an x86-64 program"
    if elf.interpreter is None:
        return "is statically linked"
    if Path(elf.interpreter).name != _GLIBC_LOADER:
        return f"does not run on glibc (its loader is {elf.interpreter})"
    return None


def _script_interpreter(path: Path) -> Path | None:
    with path.open("rb") as file:
        line = file.read(_SHEBANG_MAX).split(b"\n", 1)[0]
    words = line[2:].split(maxsplit=1)
    return Path(os.fsdecode(words[0])) if line.startswith(b"#!") and words else None


def _privilege(path: Path) -> str | None:
    """Returns what makes the loader ignore LD_PRELOAD for this file (secure execution, ld.so(8))."""
    mode = path.stat().st_mode
    if mode & stat.S_ISUID:
        return "is setuid"
    if mode & stat.S_ISGID and mode & stat.S_IXGRP:
        return "is setgid"
    try:
        os.getxattr(path, _FILE_CAPABILITIES)
    except OSError:
        return None  # ENODATA or a file system without attributes
    return "has file capabilities"
