"""Why a program can't be attached to, said before anything is done to it: one line each."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from udedup.attach.process import Process
from udedup.attach.seccomp import forbidden_call
from udedup.commands.elf import read_elf
from udedup.commands.program import loader_obstacle
from udedup.errors import UdedupError

_PF_KTHREAD = 0x00200000
_AT_SECURE = 23
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_YAMA_RULES = {
    1: "lets programs be entered by root and their parents only: do it as root, or sysctl kernel.yama.ptrace_scope=0",
    2: "lets programs be entered by root only: do it as root",
    3: "lets nobody enter a program until the next boot: start it with `udedup run` instead",
}
_DESCRIPTORS_NEEDED = 2
"""That the program must have free for a moment: the library's while it is loaded, and one more of the C library's."""


def require_attachable(process: Process, library: Path, socket: Path) -> None:
    """Raises UdedupError if ``library`` can't be loaded into it, or it could not reach the engine at ``socket``."""
    require_traceable(process)
    for check in (_privileges, _loader, _shadow_stack, _library(library), _socket(socket), _filter, _descriptors):
        for refusal in check(process):
            raise UdedupError(f"{process} {refusal}")


def require_traceable(process: Process) -> None:
    """Raises UdedupError if its threads can't be held and its memory not be read."""
    for check in (_life, _permission):
        for refusal in check(process):
            raise UdedupError(f"{process} {refusal}")


def _life(process: Process) -> Iterator[str]:
    state = process.status["State"][0]
    if process.pid == os.getpid():
        yield "is this command itself"
    if process.flags & _PF_KTHREAD:
        yield "is a thread of the kernel"
    if state in "ZX":
        yield "has ended: its parent has not asked for its status yet"
    tracer = process.status["TracerPid"]
    if tracer != "0":
        yield f"is being debugged by process {tracer}: end that first"
    if state in "Tt":
        yield f"is stopped: let it go on first (kill -CONT {process.pid})"
    if process.status["Tgid"] != process.status["Pid"]:
        yield f"is a thread of process {process.status['Tgid']}: attach to that"


def _permission(process: Process) -> Iterator[str]:
    try:
        descriptor = os.open(process.folder / "mem", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield "has ended"
    except PermissionError:
        owner = int(process.status["Uid"].split()[1])
        rule = _yama_rule()
        if os.geteuid() not in (0, owner):
            yield f"is of another user (uid {owner}): do it as that user or as root"
        if rule:
            yield f"may not be entered: kernel.yama.ptrace_scope={rule} {_YAMA_RULES[rule]}"
        yield "may not be entered: it has rights that you have not, or does not want to be traced (PR_SET_DUMPABLE)"
    else:
        os.close(descriptor)


def _yama_rule() -> int:
    try:
        return int(_YAMA.read_text())
    except FileNotFoundError:
        return 0


def _privileges(process: Process) -> Iterator[str]:
    uids, gids = process.status["Uid"].split()[:3], process.status["Gid"].split()[:3]
    if process.auxiliary().get(_AT_SECURE) or len(set(uids)) > 1 or len(set(gids)) > 1:
        yield "has more rights than who started it (setuid, setgid or file capabilities): such programs are left alone"


def _loader(process: Process) -> Iterator[str]:
    elf = read_elf(process.folder / "exe")
    obstacle = "has no program file" if elf is None else loader_obstacle(elf)
    if obstacle:
        yield f"{obstacle}: the agent cannot enter it"


def _shadow_stack(process: Process) -> Iterator[str]:
    if "shstk" in process.status.get("x86_Thread_features", ""):
        yield "has a shadow stack (GLIBC_TUNABLES glibc.cpu.x86_shstk): start it with `udedup run` instead"


def _library(library: Path) -> Callable[[Process], Iterator[str]]:
    def check(process: Process) -> Iterator[str]:
        seen = process.root(library)
        if not seen.is_file():
            yield f"does not see {library}, because it has a file system of its own: install udedup in there too"
        elif not seen.samefile(library) and seen.read_bytes() != library.read_bytes():
            yield f"sees another {library} in its file system than this one: install the same udedup in both"

    return check


def _socket(socket: Path) -> Callable[[Process], Iterator[str]]:
    def check(process: Process) -> Iterator[str]:
        seen = process.root(socket)
        if not seen.exists() or not seen.samefile(socket):
            yield f"does not see the engine's socket {socket}, because it has a file system of its own: mount it there"

    return check


def _filter(process: Process) -> Iterator[str]:
    forbidden = forbidden_call(process)
    if forbidden:
        yield f"{forbidden}: start it without that filter, or leave it alone"


def _descriptors(process: Process) -> Iterator[str]:
    limit = process.limit("Max open files")
    used = len(list((process.folder / "fd").iterdir()))
    if limit is not None and limit - used < _DESCRIPTORS_NEEDED:
        yield f"has {used} of {limit} descriptors open, and needs {_DESCRIPTORS_NEEDED} for a moment: prlimit --nofile"
