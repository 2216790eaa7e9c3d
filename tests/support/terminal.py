"""A program in a terminal of its own: what it shows there, keys for it, and the modes it leaves behind."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

_CONTROL = re.compile(r"\x1b\[[?]?([0-9;]*)([A-Za-z])")
_PATIENCE = 20.0


class ProgramInTerminal:
    """A command as leader of a session with a new terminal. Use it as a context: the program is gone at the end."""

    def __init__(self, command: Sequence[str], *, columns: int = 80, lines: int = 24, **options: Any) -> None:
        self.written = ""
        """All that it wrote."""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._begun = ""
        self._rows: dict[int, str] = {}
        self._row = 0
        self.own, self.others = pty.openpty()
        self.resize(columns, lines)
        self.modes = termios.tcgetattr(self.others)
        """Before it came."""
        self.process = subprocess.Popen(
            command,
            stdin=self.others,
            stdout=self.others,
            stderr=self.others,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )

    def __enter__(self) -> "ProgramInTerminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self.own, self.others):
            if descriptor >= 0:
                os.close(descriptor)

    def resize(self, columns: int, lines: int) -> None:
        """As a window manager does; the kernel sends SIGWINCH."""
        fcntl.ioctl(self.own, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def send(self, keys: str) -> None:
        """Somebody types."""
        os.write(self.own, keys.encode())

    def hang_up(self) -> None:
        """The terminal's window is closed."""
        os.close(self.others)
        os.close(self.own)
        self.others = self.own = -1

    def read(self, seconds: float) -> None:
        """Takes what it writes, waiting so long for the first of it."""
        while select.select([self.own], [], [], seconds)[0]:
            text = self._decoder.decode(os.read(self.own, 65536))
            self.written += text
            self._show(text)
            seconds = 0

    def until(self, shown: Callable[[list[str]], bool], what: str) -> list[str]:
        """The first screen that is right; fails the test, saying ``what``, if none comes."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            self.read(0.05)
            screen = self.screen
            if shown(screen):
                return screen
            assert self.process.poll() is None or select.select([self.own], [], [], 0)[0], (
                f"it ended with {self.process.returncode}, not {what}: {self.written}"
            )
        raise AssertionError(f"not {what}: {self.screen}")

    def end(self, number: signal.Signals | None = None) -> int:
        """Sends a signal, if any, and returns the exit status; all it wrote is read then."""
        if number is not None:
            self.process.send_signal(number)
        deadline = time.monotonic() + _PATIENCE
        # It may have more to say than a terminal holds unread.
        while self.own >= 0 and self.process.poll() is None and time.monotonic() < deadline:
            self.read(0.05)
        status = self.process.wait(_PATIENCE)
        if self.own >= 0:
            self.read(0)
        return status

    @property
    def screen(self) -> list[str]:
        """The lines now."""
        return [self._rows.get(number, "").rstrip() for number in range(max(self._rows, default=0) + 1)]

    def _show(self, text: str) -> None:
        """Of control sequences it knows those that rich sends: places, clearing, and colours, which it leaves out."""
        text = self._begun + text
        at = 0
        while at < len(text):
            found = _CONTROL.match(text, at)
            if found is not None:
                numbers, kind = found.groups()
                if kind == "J":
                    self._rows = {}
                elif kind == "H":
                    self._row = int(numbers.split(";")[0] or 1) - 1
                    self._rows[self._row] = ""
                at = found.end()
                continue
            end = text.find("\x1b", at + 1)
            end = len(text) if end < 0 else end
            if text[at] == "\x1b":
                self._begun = text[at:]
                return
            self._rows[self._row] = self._rows.get(self._row, "") + text[at:end]
            at = end
        self._begun = ""

    @property
    def restored(self) -> bool:
        """Whether the terminal is as it was: its modes, its usual screen, its cursor."""
        last = {sequence: self.written.rfind(sequence) for sequence in _SWITCHES}
        return termios.tcgetattr(self.others) == self.modes and all(
            last[on] > last[off] or last[off] < 0 for on, off in _PAIRS
        )


_PAIRS = (("\x1b[?25h", "\x1b[?25l"), ("\x1b[?1049l", "\x1b[?1049h"))
_SWITCHES = [sequence for pair in _PAIRS for sequence in pair]
"""Of the cursor and of the other screen: what puts each back, and what took it."""
