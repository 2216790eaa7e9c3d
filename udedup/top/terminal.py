"""A terminal that is drawn on and that gives single keys, and that is as it was before once it is left."""

import os
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import trio
from rich.console import Console
from rich.text import Text

from udedup.top.keys import ESCAPE, ESCAPE_SECONDS, split

_LOCAL_FLAGS: Final = 3
_INPUT_FLAGS: Final = 0
"""Places in what tcgetattr(3) gives."""

_READ_BYTES = 1024


class TerminalGoneError(BrokenPipeError):
    """Nobody is at the other end any more."""


class Terminal:
    """Two descriptors of a terminal: keys come from one, the other is drawn on. Use it as a context."""

    def __init__(self, keys: int, console: Console) -> None:
        """``console`` must be on a terminal, too."""
        self._keys = keys
        self._console = console
        self._before: list[Any] | None = None
        """Its modes; None: they are as they were."""
        self._begun = ""
        """Of a key that takes several characters."""

    def __enter__(self) -> "Terminal":
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """As it was before, meanwhile."""
        self._give_back()
        try:
            yield
        finally:
            self._take()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines. Raises TerminalGoneError."""
        try:
            size = os.get_terminal_size(self._console.file.fileno())
        except OSError as error:
            raise TerminalGoneError from error
        # A serial line knows no size.
        return (size.columns, size.lines) if size.columns and size.lines else (80, 24)

    def draw(self, lines: Sequence[Text]) -> None:
        """Shows lines, which fill the screen. Raises TerminalGoneError."""
        segments = [[*line.render(self._console)] for line in lines]
        try:
            self._console.update_screen_lines(segments)
        except OSError as error:
            raise TerminalGoneError from error

    def clear(self) -> None:
        """Before the screen is drawn with another size. Raises TerminalGoneError."""
        try:
            self._console.clear()
        except OSError as error:
            raise TerminalGoneError from error

    async def keys(self) -> list[str]:
        """The next keys, at least one. Raises TerminalGoneError."""
        while True:
            with trio.move_on_after(ESCAPE_SECONDS if self._begun else float("inf")) as waiting:
                found, self._begun = split(self._begun + await self._read())
                if found:
                    return found
            if waiting.cancelled_caught:
                begun, self._begun = self._begun, ""
                if begun == ESCAPE:
                    return ["escape"]

    async def _read(self) -> str:
        await trio.lowlevel.wait_readable(self._keys)
        try:
            got = os.read(self._keys, _READ_BYTES)
        except OSError as error:
            raise TerminalGoneError from error
        if not got:
            raise TerminalGoneError
        # All keys that mean something are ASCII.
        return got.decode("latin-1")

    def _take(self) -> None:
        self._before = termios.tcgetattr(self._keys)
        mode = termios.tcgetattr(self._keys)
        mode[_LOCAL_FLAGS] &= ~(termios.ICANON | termios.ECHO)
        # Ctrl-S would hold this process up in the middle of a write.
        mode[_INPUT_FLAGS] &= ~termios.IXON
        termios.tcsetattr(self._keys, termios.TCSANOW, mode)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def _give_back(self) -> None:
        """Raises TerminalGoneError."""
        before, self._before = self._before, None
        if before is None:
            return
        try:
            termios.tcsetattr(self._keys, termios.TCSANOW, before)
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
        except (OSError, termios.error) as error:
            raise TerminalGoneError from error
