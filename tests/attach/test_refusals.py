"""What can't be attached to is left as it is, and one line says why."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attach.conftest import PROGRAMS, detach, end_in_order
from support.engine import Engine, udedup
from support.users import as_nobody

from udedup.attach.session import Held
from udedup.errors import UdedupError

READY = "import sys; print('ready', flush=True); sys.stdin.read()"

pytestmark = pytest.mark.require("gcc", "userfaultfd-move", "root")

Start = Callable[..., "subprocess.Popen[str]"]
Attach = Callable[..., Held]


def refusal(attach: Attach, pid: int) -> str:
    """What attaching to it is refused with, in one line, without the words that name the process."""
    with pytest.raises(UdedupError) as caught:
        attach(pid)
    text = str(caught.value)
    assert "\n" not in text
    return text.partition(") ")[2] or text


def python(*lines: str) -> list[str]:
    """A program in Python that does this before it is ready."""
    return [sys.executable, "-c", "\n".join([*lines, READY])]


def test_no_process(attach: Attach) -> None:
    assert refusal(attach, (1 << 22) - 1) == f"there is no process {(1 << 22) - 1}"


def test_this_process(attach: Attach) -> None:
    assert refusal(attach, os.getpid()) == "is this command itself"


def test_a_thread_of_the_kernel(attach: Attach) -> None:
    assert refusal(attach, 2) == "is a thread of the kernel"


def test_one_that_has_ended(attach: Attach) -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert refusal(attach, child.pid).startswith("has ended")
    child.wait()


def test_one_that_is_stopped(start: Start, attach: Attach) -> None:
    program = start(*python())
    program.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
    assert refusal(attach, program.pid) == f"is stopped: let it go on first (kill -CONT {program.pid})"
    program.send_signal(signal.SIGCONT)
    end_in_order(program)


@pytest.mark.require("strace")
def test_one_that_is_debugged(start: Start, attach: Attach) -> None:
    tracer = start("strace", "-f", "-o", "/dev/null", "-e", "trace=none", *python())
    (child,) = Path(f"/proc/{tracer.pid}/task/{tracer.pid}/children").read_text().split()
    assert refusal(attach, int(child)) == f"is being debugged by process {tracer.pid}: end that first"
    end_in_order(tracer)


def test_a_thread(start: Start, attach: Attach) -> None:
    lines = ["import threading", "threading.Thread(target=threading.Event().wait, daemon=True).start()"]
    program = start(*python(*lines))
    (thread,) = {int(task.name) for task in Path(f"/proc/{program.pid}/task").iterdir()} - {program.pid}
    assert refusal(attach, thread) == f"is a thread of process {program.pid}: attach to that"
    end_in_order(program)


def test_a_static_program(compile_c: Callable[..., Path], start: Start, attach: Attach) -> None:
    program = start(compile_c(PROGRAMS / "ready.c", "-static"))
    assert refusal(attach, program.pid) == "is statically linked: the agent cannot enter it"
    end_in_order(program)


def test_more_rights_than_its_starter(start: Start, attach: Attach) -> None:
    program = start(*python("import os", "os.setresuid(65534, 0, 0)"))
    assert refusal(attach, program.pid).startswith("has more rights than who started it")
    end_in_order(program)


def test_without_free_descriptors(start: Start, attach: Attach) -> None:
    few = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16)),)
    lines = ["import os", "try:", "    while True: os.dup(0)", "except OSError: pass"]
    program = start(*python(*lines), preexec_fn=few[0])
    assert refusal(attach, program.pid).startswith("has 16 of 16 descriptors open, and needs 2 for a moment")
    end_in_order(program)


@pytest.mark.parametrize(("number", "name"), [(257, "openat"), (56, "clone"), (10, "mprotect"), (15, "rt_sigreturn")])
def test_a_filter(compile_c: Callable[..., Path], start: Start, attach: Attach, number: int, name: str) -> None:
    """It would kill the program."""
    program = start(compile_c(PROGRAMS / "ready.c"), str(number))
    assert refusal(attach, program.pid).startswith(f"has a seccomp filter that forbids {name}, ")
    end_in_order(program)


def test_a_filter_that_does_not_matter(compile_c: Callable[..., Path], start: Start, attach: Attach) -> None:
    program = start(compile_c(PROGRAMS / "ready.c"), "170")  # sethostname
    attach(program.pid)
    detach(program.pid)
    end_in_order(program)


def test_a_filter_for_what_the_agent_does_later(compile_c: Callable[..., Path], start: Start, attach: Attach) -> None:
    """It tries that out in a process of its own."""
    program = start(compile_c(PROGRAMS / "ready.c"), "25")  # mremap
    assert refusal(attach, program.pid).endswith("a seccomp filter forbids what the agent does")
    end_in_order(program)


def test_limited_memory(start: Start, attach: Attach) -> None:
    few = (lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)),)
    program = start(*python(), preexec_fn=few[0])
    assert "its memory is limited (RLIMIT_AS, RLIMIT_DATA)" in refusal(attach, program.pid)
    end_in_order(program)


def test_a_file_system_of_its_own(start: Start, attach: Attach, attached_engine: Engine, tmp_path: Path) -> None:
    """Where the library is not, or not the engine's socket."""
    library = Path(__file__).parents[2] / "udedup"
    hide = f"mount -t tmpfs none {library} && exec {sys.executable} -c {READY!r}"
    program = start("unshare", "-m", "sh", "-c", hide, cwd="/")
    assert "because it has a file system of its own: install udedup in there too" in refusal(attach, program.pid)
    end_in_order(program)
    hide = f"mount -t tmpfs none {attached_engine.socket.parent} && exec {sys.executable} -c {READY!r}"
    program = start("unshare", "-m", "sh", "-c", hide, cwd="/")
    assert f"does not see the engine's socket {attached_engine.socket}" in refusal(attach, program.pid)
    end_in_order(program)


def test_another_users(start: Start, attached_engine: Engine) -> None:
    program = start(*python())
    command = [*as_nobody(), sys.executable, "-m", "udedup", "attach", "--socket", attached_engine.socket, program.pid]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "is of another user (uid 0): do it as that user or as root\n" in done.stderr
    end_in_order(program)


def test_no_engine(start: Start, tmp_path: Path) -> None:
    program = start(*python())
    done = udedup("attach", "--socket", tmp_path / "nobody", program.pid)
    assert done.returncode == 1
    assert "no engine listens at" in done.stderr
    assert "libudedup" not in Path(f"/proc/{program.pid}/maps").read_text()
    done = udedup("detach", program.pid)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("does not share its memory\n")
    end_in_order(program)


def test_a_label_that_is_not_allowed(start: Start, attach: Attach) -> None:
    """The engine says so to the agent; the program is then as before, and can be attached to without."""
    program = start(*as_nobody(), *python())
    with pytest.raises(UdedupError, match=r"can't join the engine: .*nobodys"):
        attach(program.pid, label="nobodys")
    attach(program.pid)
    end_in_order(program)


@pytest.fixture
def yama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel's rule is said to be."""
    rule = tmp_path / "ptrace_scope"
    monkeypatch.setattr("udedup.attach.refusal._YAMA", rule)
    return rule


@pytest.mark.parametrize(("rule", "advice"), [(1, "do it as root"), (2, "do it as root"), (3, "until the next boot")])
def test_yama(
    yama: Path, monkeypatch: pytest.MonkeyPatch, start: Start, attach: Attach, rule: int, advice: str
) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(path, flags)

    yama.write_text(f"{rule}\n")
    program = start(*python())
    monkeypatch.setattr("udedup.attach.refusal.os.open", refuse)
    found = refusal(attach, program.pid)
    assert found.startswith(f"may not be entered: kernel.yama.ptrace_scope={rule} lets ")
    assert advice in found
    monkeypatch.undo()
    end_in_order(program)
