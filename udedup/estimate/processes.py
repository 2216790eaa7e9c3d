"""Which processes there are, and what they have mapped, by /proc."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import attrs

from udedup.errors import UdedupError

PROC: Final = Path("/proc")
GROUPS: Final = Path("/sys/fs/cgroup")
ANONYMOUS: Final = "anonymous"
"""Name of mappings that have none."""

STORE: Final = "/memfd:udedup-store"
"""What udedup has merged is called by names that begin so, a number for each segment; here it is all one."""

STORE_VIEW: Final = "udedup's view of its store"
"""Name of where agents and engines see it besides."""

# Pages that belong to the kernel, and devices: to read their memory may do something.
_KERNELS: Final = ("[v", "/dev/", "/sys/", "/proc/", "anon_inode:")
_MEMORY: Final = ("/dev/shm/", "/dev/zero", "/dev/hugepages/", "/dev/mqueue/")
"""Of these, what is memory nevertheless."""

_FIELDS: Final = 5
"""Words of a line of maps before the name."""


class GoneError(Exception):
    """The process has ended."""


class ForbiddenError(Exception):
    """Its memory is none of ours."""


@attrs.frozen
class Mapping:
    """A range of addresses."""

    name: str
    """Path of the file, "[heap]" and the like, or :data:`ANONYMOUS`."""

    start: int
    """Address."""

    end: int
    """Address behind it."""


def everybody() -> list[int]:
    """All processes but this one, by their ids."""
    return sorted(
        int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid()
    )


def of_cgroup(path: Path) -> list[int]:
    """All processes of a control group and those below it, but this one. Raises UdedupError.

    ``path`` may leave out /sys/fs/cgroup.
    """
    folder = path if path.is_relative_to(GROUPS) else GROUPS / str(path).lstrip("/")
    if not (folder / "cgroup.procs").exists():
        raise UdedupError(f"no control group {folder}: give its directory below {GROUPS}")
    try:
        texts = [file.read_text() for file in folder.glob("**/cgroup.procs")]
    except OSError as error:
        raise UdedupError(f"control group {folder}: its processes can't be listed: {error.strerror}") from error
    # 0: a process that this one's pid namespace doesn't have.
    return sorted({int(pid) for text in texts for pid in text.split()} - {0, os.getpid()})


def mappings(pid: int) -> list[Mapping]:
    """What a process has mapped; nothing if it is a thread of the kernel. Raises GoneError or ForbiddenError.

    What programs use comes first: page frames count where they are found first.
    """
    with _explained():
        text = (PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="backslashreplace")
    found = [
        mapping
        for mapping in _parse(text.split("\n"))
        if not mapping.name.startswith(_KERNELS) or mapping.name.startswith(_MEMORY)
    ]
    return sorted(found, key=lambda mapping: mapping.name == STORE_VIEW)


def present_pages(pid: int) -> int:
    """About how many pages of it are in memory; 0 if it is gone."""
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def command(pid: int) -> str:
    """Its command line for people, in one line; its name in brackets if it has none, "?" if it is gone."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="backslashreplace").split("\0")
        name = (PROC / str(pid) / "comm").read_text(errors="backslashreplace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "?"
    return (
        "".join(character if character.isprintable() else " " for character in " ".join(words)).strip() or f"[{name}]"
    )


@contextmanager
def opened(pid: int) -> Iterator[tuple[int, int]]:
    """Descriptors of its memory and its pagemap. Raises GoneError or ForbiddenError."""
    with ExitStack() as stack:
        descriptors = []
        for name in ("mem", "pagemap"):
            with _explained():
                descriptors.append(os.open(PROC / str(pid) / name, os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, descriptors[-1])
        yield descriptors[0], descriptors[1]


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what /proc says into GoneError and ForbiddenError."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GoneError from error
    except PermissionError as error:
        raise ForbiddenError from error


def _parse(lines: Iterable[str]) -> Iterator[Mapping]:
    for line in lines:
        words = line.split(maxsplit=_FIELDS)
        if len(words) >= _FIELDS:
            start, end = (int(address, 16) for address in words[0].split("-"))
            yield Mapping(_name(words), start, end)


def _name(words: list[str]) -> str:
    """Of the words of a line."""
    if len(words) <= _FIELDS:
        return ANONYMOUS
    name = words[_FIELDS].removesuffix(" (deleted)")
    if name.startswith(STORE):
        return STORE_VIEW if words[1].endswith("s") else STORE
    return name
