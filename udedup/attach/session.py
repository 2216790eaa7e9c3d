"""Attaching to a program and detaching from it, step by step.

The agent is loaded into one thread, which is held for it, while the others run. Its functions are then put in the place
of the C library's while all threads are held, for as long as that takes; and joining the engine, which takes
longest, is up to the agent's own thread.
"""

import errno
import os
import time
from pathlib import Path

import attrs

from udedup.attach.process import Process
from udedup.attach.program import Library, Program, code_array, find_library
from udedup.attach.refusal import require_attachable, require_traceable
from udedup.commands.host import AGENT_NAME
from udedup.engine.native import CData, ffi, lib
from udedup.errors import UdedupError

_RTLD_NOW = 2
_JUMP_BYTES = 5
_PATIENCE_MS = 5000
"""For a thread at a place where it can be used, and for all threads to be outside of what is changed."""

_JOIN_SECONDS = 12.0
"""For the engine to let it in: as long as the agent waits for an answer, and a bit."""

_LEAVE_SECONDS = 330.0
"""For private copies of all that was shared."""

_LOOK_SECONDS = 0.002


@attrs.frozen
class Held:
    """For how long the program did not run."""

    one: float
    """One thread of it, while the others ran; the longest time in one piece, s."""

    all: float
    """All of them, s."""

    threads: int
    """How many."""


@attrs.define
class _Times:
    """Collects them."""

    one: float = 0.0
    all: float = 0.0
    threads: int = 0

    def freeze(self) -> Held:
        return Held(self.one, self.all, self.threads)


class Session:
    """One attaching or detaching."""

    def __init__(self, process: Process, library: Path) -> None:
        """Raises UdedupError if the program can't be entered."""
        self._process = process
        self._library = library
        self._program = Program.examine(process)
        self._times = _Times()

    # ---- calls ----

    def _call(self, address: int, data: bytes, second: int, doing: str) -> CData:
        outcome: CData = ffi.new("struct udd_attach_outcome *")
        description = self._program.description
        result = lib.udd_attach_call(description, address, data, len(data), second, _PATIENCE_MS, outcome)
        self._times.one = max(self._times.one, outcome.held_ns / 1e9)
        if result == 0:
            return outcome
        why = {
            -errno.EAGAIN: f"no thread came to a place where that is safe within {_PATIENCE_MS / 1000:g} s: try again",
            -errno.EINTR: f"the call was ended by signal {outcome.signal}, in the program: restart it",
            -errno.ETIMEDOUT: f"that takes longer than {_PATIENCE_MS / 1000:g} s: the thread goes on when it is done",
            -errno.ESRCH: "it has ended",
        }.get(result, f"error {-result}")
        raise UdedupError(f"{doing} {self._process} failed: {why}")

    def _load(self) -> Library:
        found = find_library(self._process, AGENT_NAME)
        if found:
            return found
        # The second slash tells the library who loads it.
        path = f"/{self._library}".encode() + b"\0"
        outcome = self._call(self._program.libc.address("dlopen"), path, _RTLD_NOW, "loading the agent into")
        found = find_library(self._process, AGENT_NAME)
        if found is None:
            raise UdedupError(f"loading the agent into {self._process} failed: {_failed_call(outcome)}")
        return found

    # ---- the agent's variable ----

    def _read_struct(self, name: str, address: int) -> CData:
        struct: CData = ffi.new(f"struct {name} *")
        ffi.buffer(struct)[:] = self._process.read(address, ffi.sizeof(f"struct {name}"))
        return struct

    def _attachment(self, library: Library) -> CData:
        attachment = self._read_struct("udd_attachment", library.address("udedup_attachment"))
        if (attachment.magic, attachment.version) != (lib.UDD_ATTACH_MAGIC, lib.UDD_ATTACH_VERSION):
            raise UdedupError(f"{self._process} has loaded an agent of another version: restart it")
        return attachment

    def _live(self, attachment: CData) -> CData:
        return self._read_struct("udd_attach_live", attachment.live)

    # ---- attaching ----

    def attach(self, socket: Path, label: str | None, flags: int) -> Held:
        """Raises UdedupError, and then the program is as before but for the library."""
        agent = self._load()
        request = ffi.new("struct udd_attach_request *")
        path = str(socket.absolute()).encode()
        if len(path) >= lib.UDD_ATTACH_SOCKET_MAX:
            raise UdedupError(f"{socket}: the path of a socket has less than {lib.UDD_ATTACH_SOCKET_MAX} bytes")
        request.socket, request.label, request.flags = path, (label or "").encode(), flags
        self._call(agent.address("udedup_attach"), bytes(ffi.buffer(request)), 0, "setting the agent up in")
        attachment = self._attachment(agent)
        if attachment.error == -errno.EALREADY:
            raise UdedupError(f"{self._process} shares its memory already: see `udedup status`")
        if attachment.error == -errno.EBUSY:
            raise UdedupError(f"{self._process} is being attached to by someone else: try again")
        if attachment.error:
            raise UdedupError(f"{self._process} can't be attached to: {_text(attachment.reason) or attachment.error}")
        self._redirect(attachment)
        self._await_joined(agent, attachment)
        return self._times.freeze()

    def _redirect(self, attachment: CData) -> None:
        """Puts the hooks in, and lets the agent go on."""
        sizes = {self._program.libc.bias + s.value: s.size for s in self._program.libc.symbols.all().values()}
        barred = []
        for patch in _patches(attachment):
            size = sizes.get(patch.entry, 0) if patch.maps else _JUMP_BYTES
            barred.append((patch.entry + 1, patch.entry + max(size, _JUMP_BYTES)))
        words = self._words(attachment, into=True)
        if not self._live(attachment).patched:
            # `leave`, the other half of the word, is 0.
            words.append((attachment.live + ffi.offsetof("struct udd_attach_live", "patched"), 0, 1))
        self._change(barred, words)

    def _words(self, attachment: CData, *, into: bool) -> list[tuple[int, int, int]]:
        """What is to be changed for the hooks to be in, or to be out, if it is not so yet."""
        words = []
        for patch in _patches(attachment):
            before, after = (patch.before, patch.after) if into else (patch.after, patch.before)
            if int.from_bytes(self._process.read(patch.entry, 8), "little") != after:
                words.append((patch.entry, before, after))
        return words

    def _change(self, barred: list[tuple[int, int]], words: list[tuple[int, int, int]]) -> None:
        outcome = ffi.new("struct udd_attach_outcome *")
        array = ffi.new("struct udd_attach_word[]", words)
        code = code_array(barred)
        result = lib.udd_attach_change(self._process.pid, code, len(code), array, len(words), _PATIENCE_MS, outcome)
        self._times.all = max(self._times.all, outcome.held_ns / 1e9)
        self._times.threads = outcome.threads
        if result == 0:
            return
        why = {
            -errno.EAGAIN: f"not all were at safe places at once within {_PATIENCE_MS / 1000:g} s: try again",
            -errno.ESTALE: "someone else has changed the code of its C library",
            -errno.ESRCH: "it has ended",
        }.get(result, f"error {-result}")
        raise UdedupError(f"holding the threads of {self._process} failed: {why}")

    def _await_joined(self, agent: Library, attachment: CData) -> None:
        deadline = time.monotonic() + _JOIN_SECONDS
        while time.monotonic() < deadline:
            live = self._live(attachment)
            if live.state == lib.UDD_ATTACH_JOINED:
                return
            if live.state == lib.UDD_ATTACH_REFUSED:
                reason = _text(self._attachment(agent).reason)
                if live.clean:
                    self._change([], self._words(attachment, into=False))
                raise UdedupError(f"{self._process} can't join the engine: {reason}")
            time.sleep(_LOOK_SECONDS)
        self.detach()
        raise UdedupError(f"{self._process} got no answer from the engine within {_JOIN_SECONDS:g} s")

    # ---- detaching ----

    def detach(self) -> tuple[Held, bool]:
        """Returns for how long the program was held, and whether the hooks are out. Raises UdedupError."""
        agent = find_library(self._process, AGENT_NAME)
        if agent is None:
            raise UdedupError(f"{self._process} does not share its memory")
        attachment = self._attachment(agent)
        if attachment.live and self._live(attachment).state in (
            lib.UDD_ATTACH_LEFT,
            lib.UDD_ATTACH_REFUSED,
        ):
            raise UdedupError(f"{self._process} does not share its memory any more")
        self._call(agent.address("udedup_leave"), b"", 0, "taking the agent out of")
        attachment = self._attachment(agent)
        if attachment.error:
            raise UdedupError(f"{self._process} does not share its memory")
        clean = self._await_left(attachment)
        if clean:
            self._change([], self._words(attachment, into=False))
        return self._times.freeze(), clean

    def _await_left(self, attachment: CData) -> bool:
        deadline = time.monotonic() + _LEAVE_SECONDS
        while time.monotonic() < deadline:
            live = self._live(attachment)
            if live.state == lib.UDD_ATTACH_LEFT:
                return bool(live.clean)
            if not live.leave:
                raise UdedupError(
                    f"{self._process} goes on sharing: there is no memory, or no mappings, for private copies of it all"
                )
            time.sleep(_LOOK_SECONDS)
        raise UdedupError(f"{self._process} still makes private copies after {_LEAVE_SECONDS:g} s: see `udedup status`")


def _patches(attachment: CData) -> list[CData]:
    # It is the program's to write, who may be anybody.
    count = min(attachment.patch_count, lib.UDD_ATTACH_PATCHES_MAX)
    return [patch for patch in attachment.patches[0:count] if patch.entry]


def _text(array: CData) -> str:
    text: bytes = ffi.string(array)
    return "".join(character for character in text.decode(errors="replace") if character.isprintable())


def _failed_call(outcome: CData) -> str:
    if not outcome.failed_call:
        return "its loader refused the library"
    return f"system call {outcome.failed_call}: {os.strerror(outcome.failed_errno)}"


def attach(pid: int, library: Path, socket: Path, label: str | None, *, quiet: bool, keep_ksm: bool) -> Held:
    """Has a program join the engine at ``socket`` under ``label``. Raises UdedupError."""
    process = Process(pid)
    require_attachable(process, library, socket)
    flags = (lib.UDD_ATTACH_QUIET if quiet else 0) | (lib.UDD_ATTACH_KEEP_KSM if keep_ksm else 0)
    return Session(process, library).attach(socket, label, flags)


def detach(pid: int, library: Path) -> tuple[Held, bool]:
    """Takes a program out. Returns as ``Session.detach``; raises UdedupError."""
    process = Process(pid)
    require_traceable(process)
    return Session(process, library).detach()
