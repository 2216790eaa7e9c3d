"""What a program's seccomp filters would do to the system calls that it takes to load the agent.

The filters are read by ptrace, which only root may do, and run here. What the agent's own threads call it tries out by
itself, in a process of its own (``native/agent/sandbox.c``).
"""

import errno
import mmap
import struct

from udedup.attach.process import Process
from udedup.engine.native import ffi, lib

_INSTRUCTIONS_MOST = 4096  # BPF_MAXINSNS
_INSTRUCTION = struct.Struct("=HBBI")
_DATA = struct.Struct("=iIQ6Q")
_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64
_WORD = 0xFFFFFFFF

_ALLOWED = {0x7FFF0000, 0x7FFC0000}
"""SECCOMP_RET_ALLOW and SECCOMP_RET_LOG."""

_MODE_NONE, _MODE_FILTER = "0", "2"
_CLONE_THREAD = 0xD0D00  # VM, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS
_AT_FDCWD = (1 << 64) - 100
_PRIVATE, _ANONYMOUS, _FIXED = mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS, 0x10

_CALLS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("openat", 257, (_AT_FDCWD, 1, 0o2000000)),
    ("read", 0, (3, 1, 832)),
    ("pread64", 17, (3, 1, 832)),
    ("fstat", 5, (3, 1)),
    ("newfstatat", 262, (3, 1, 1, 0x1000)),
    ("mmap", 9, (0, 4096, mmap.PROT_READ, _PRIVATE, 3)),
    ("mmap", 9, (4096, 4096, mmap.PROT_READ | mmap.PROT_EXEC, _PRIVATE | _FIXED, 3)),
    ("mmap", 9, (4096, 4096, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE | _ANONYMOUS | _FIXED, _WORD)),
    ("mprotect", 10, (4096, 4096, mmap.PROT_READ)),
    ("mprotect", 10, (4096, 4096, mmap.PROT_READ | mmap.PROT_EXEC)),
    ("munmap", 11, (4096, 4096)),
    ("madvise", 28, (4096, 4096, 18)),
    ("brk", 12, (0,)),
    ("close", 3, (3,)),
    ("prlimit64", 302, (0, 9, 0, 1)),
    ("prctl", 157, (21,)),
    ("rt_sigprocmask", 14, (2, 1, 1, 8)),
    ("rt_sigreturn", 15, ()),
    ("restart_syscall", 219, ()),
    ("futex", 202, (1, 128)),
    ("clone", 56, (_CLONE_THREAD, 1)),
)
"""Name, number and arguments of what the loader and the agent do on the program's thread, and then in its hooks."""


def forbidden_call(process: Process) -> str | None:
    """Returns what is in the way, in some words behind the program's name; None if nothing is."""
    seen = {mode for task in process.tasks() if (mode := _mode(task.name, process))}
    if seen <= {(_MODE_NONE, "0")}:
        return None
    if len(seen) > 1 or {mode for mode, _ in seen} != {_MODE_FILTER}:
        return "has a seccomp filter, not the same in all its threads"
    for index in range(max(int(number) for _, number in seen)):
        try:
            program = _read_filter(process.pid, index)
        except OSError:
            return "has a seccomp filter, and only root can know whether that lets the agent in"
        for name, number, arguments in _CALLS:
            if run(program, number, arguments) & 0xFFFF0000 not in _ALLOWED:
                return f"has a seccomp filter that forbids {name}, which the agent cannot do without"
    return None


def _mode(task: str, process: Process) -> tuple[str, str] | None:
    """Mode and number of filters of a thread; None if it has ended."""
    try:
        lines = (process.folder / "task" / task / "status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return fields.get("Seccomp", _MODE_NONE).strip(), fields.get("Seccomp_filters", "0").strip()


def _read_filter(tid: int, index: int) -> list[tuple[int, int, int, int]]:
    array = ffi.new("uint64_t[]", _INSTRUCTIONS_MOST)
    count = lib.udd_attach_filter(tid, index, array, _INSTRUCTIONS_MOST)
    if not 0 <= count <= _INSTRUCTIONS_MOST:
        raise OSError(-count if count < 0 else errno.E2BIG, "no filter")
    return list(_INSTRUCTION.iter_unpack(bytes(ffi.buffer(array, count * _INSTRUCTION.size))))


def run(program: list[tuple[int, int, int, int]], number: int, arguments: tuple[int, ...]) -> int:
    """Runs a filter (code, jt, jf, k of each instruction) on a system call and returns what it does with it.

    The kernel has checked it: jumps go forward and stay inside, and it ends with a return (net/core/filter.c).
    """
    data = _DATA.pack(number, _ARCHITECTURE, 0, *arguments, *(0,) * (6 - len(arguments)))
    accumulator, index, at = 0, 0, 0
    memory = [0] * 16
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        kind, operand = code & 7, index if code & 8 else constant
        if kind in (0, 1):  # BPF_LD, BPF_LDX
            loaded = _load(code, constant, data, memory)
            accumulator, index = (loaded, index) if kind == 0 else (accumulator, loaded)
        elif kind in (2, 3):  # BPF_ST, BPF_STX
            memory[constant] = accumulator if kind == 2 else index
        elif kind == 4:  # BPF_ALU
            accumulator = _compute(code & 0xF0, accumulator, operand)
        elif kind == 5 and code & 0xF0 == 0:  # BPF_JA
            at += constant
        elif kind == 5:  # BPF_JMP
            at += if_true if _holds(code & 0xF0, accumulator, operand) else if_false
        elif kind == 6:  # BPF_RET
            return accumulator if code & 0x18 == 0x10 else constant
        else:  # BPF_MISC: BPF_TXA, BPF_TAX
            accumulator, index = (index, index) if code & 0x80 else (accumulator, accumulator)


def _load(code: int, constant: int, data: bytes, memory: list[int]) -> int:
    match code & 0xE0:
        case 0x00:  # BPF_IMM
            return constant
        case 0x20:  # BPF_ABS
            return int.from_bytes(data[constant : constant + 4], "little")
        case 0x60:  # BPF_MEM
            return memory[constant]
        case _:  # BPF_LEN
            return len(data)


def _compute(operation: int, left: int, right: int) -> int:
    match operation:
        case 0x00:
            return (left + right) & _WORD
        case 0x10:
            return (left - right) & _WORD
        case 0x20:
            return (left * right) & _WORD
        case 0x30:
            return left // right if right else 0
        case 0x40:
            return left | right
        case 0x50:
            return left & right
        case 0x60:
            return (left << (right & 31)) & _WORD
        case 0x70:
            return left >> (right & 31)
        case 0xA0:
            return left ^ right
        case _:  # BPF_NEG
            return -left & _WORD


def _holds(condition: int, left: int, right: int) -> bool:
    match condition:
        case 0x10:
            return left == right
        case 0x20:
            return left > right
        case 0x30:
            return left >= right
        case _:  # BPF_JSET
            return bool(left & right)
