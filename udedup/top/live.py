"""The tasks of the live view: asking the engine, keys, the terminal's size, and the end."""

import os
import signal
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs
import trio

from udedup.client import EngineClient, connect
from udedup.engine.accounting import Status
from udedup.errors import UdedupError
from udedup.top.columns import AgentRow
from udedup.top.rates import between
from udedup.top.screen import Frame, layout, once, rows_of, screen
from udedup.top.terminal import Terminal, TerminalGoneError
from udedup.top.view import Deed, View, fitted, press

SAMPLES_MAX = 1000
"""More than a screen is wide."""

PATIENCE_SECONDS = 3.0
"""An answer that is later than that is missed on the screen."""

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

BY_SIGNAL = 128
"""Exit status after a signal, less its number, as shells have it."""


async def watch(path: Path, terminal: Terminal, view: View, interval: float) -> int:
    """Shows the engine at ``path`` until it is enough, and returns an exit status.

    Raises UdedupError if there is no engine to begin with; later, it is waited for. Raises TerminalGoneError.
    """
    async with connect(path) as engine:
        status = await engine.status()
        with trio.open_signal_receiver(*ENDING, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT) as signals, terminal:
            live = Live(engine, terminal, view, status, interval)
            try:
                return await live.run(signals)
            except* TerminalGoneError as group:
                raise TerminalGoneError from group
    raise AssertionError("either it returns or it raises")


class Live:
    """What is shown, and who changes it."""

    def __init__(self, engine: EngineClient, terminal: Terminal, view: View, status: Status, interval: float) -> None:
        """``interval``: between two answers, s."""
        self._engine = engine
        self._terminal = terminal
        self._view = view
        self._last = status
        """What the next rates are reckoned from."""
        self._saved = deque([status.bytes_saved], SAMPLES_MAX)
        self._frame = Frame(status, None, tuple(self._saved), interval)
        self._heard = trio.current_time()
        self._doing: Deed | None = None

    async def run(self, signals: AsyncIterator[int]) -> int:
        """Until a signal or a key ends it; returns an exit status."""
        status = 0
        async with trio.open_nursery() as nursery:
            self._draw()
            nursery.start_soon(self._ask_again_and_again)
            nursery.start_soon(self._notice_silence)
            nursery.start_soon(self._follow_keys, nursery)
            async for number in signals:
                if number in ENDING:
                    status = BY_SIGNAL + number
                    nursery.cancel_scope.cancel()
                    break
                if number == signal.SIGTSTP:
                    self._stop()
                self._terminal.clear()
                self._draw()
        return status

    async def _ask_again_and_again(self) -> None:
        while True:
            await trio.sleep(self._frame.interval)
            try:
                status = await self._engine.status()
            except UdedupError as error:
                self._frame = attrs.evolve(self._frame, notice=str(error))
            else:
                self._saved.append(status.bytes_saved)
                rates, self._last = between(self._last, status), status
                self._frame = attrs.evolve(self._frame, status=status, rates=rates, saved=tuple(self._saved), notice="")
            self._heard = trio.current_time()
            self._draw()

    async def _notice_silence(self) -> None:
        late = self._frame.interval + PATIENCE_SECONDS
        while True:
            await trio.sleep_until(self._heard + late)
            silent = trio.current_time() - self._heard
            if silent >= late:
                self._frame = attrs.evolve(self._frame, notice=f"the engine has not answered for {silent:.0f} s")
                self._draw()
                await trio.sleep(PATIENCE_SECONDS)

    async def _follow_keys(self, nursery: trio.Nursery) -> None:
        while True:
            for key in await self._terminal.keys():
                rows, page = self._rows()
                self._view, deed = press(self._view, key, rows, page)
                if self._view.quits:
                    nursery.cancel_scope.cancel()
                    return
                if deed is not None and self._doing is not None:
                    self._say(f"not yet: {self._doing.kind} {self._doing.pid} is under way")
                elif deed is not None:
                    self._doing = deed
                    self._say(f"{deed.kind} {deed.pid} …")
                    nursery.start_soon(self._do, deed)
            self._draw()

    async def _do(self, deed: Deed) -> None:
        # By a connection of its own: large processes take a while, and the view goes on.
        try:
            async with connect(self._engine.path) as engine:
                remark = await _done(engine, deed)
                self._doing = None
                self._say(remark)
                status = await engine.status()
        except UdedupError as error:
            self._doing = None
            self._say(str(error))
        else:
            # Rates stay those of the last interval: this one was short.
            self._frame = attrs.evolve(self._frame, status=status)
        self._draw()

    def _say(self, remark: str) -> None:
        self._view = attrs.evolve(self._view, remark=remark)

    def _stop(self) -> None:
        """Does what Ctrl-Z asked for, and returns when the shell lets it go on."""
        with self._terminal.given_back():
            # The kernel knows whether there is a shell that would.
            trios = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, trios)

    def _rows(self) -> tuple[list[AgentRow], int]:
        """All rows, and how many have room. The view fits them then."""
        _, height = self._terminal.size
        rows = rows_of(self._frame, self._view)
        page = layout(height, len(rows), len(self._frame.status.images)).agents
        self._view = fitted(self._view, rows, page)
        return rows, page

    def _draw(self) -> None:
        width, height = self._terminal.size
        rows, _ = self._rows()
        self._terminal.draw(screen(self._frame, self._view, rows, width, height))


async def _done(engine: EngineClient, deed: Deed) -> str:
    """Has it done, and says what came of it."""
    match deed.kind:
        case "unmerge":
            return f"{deed.pid}: {await engine.unmerge(deed.pid):,} pages are private again; p resumes"
        case "pause":
            await engine.pause(deed.pid)
            return f"{deed.pid} is paused; what is shared stays so"
        case "resume":
            await engine.resume(deed.pid)
            return f"{deed.pid} may merge again"


async def look(path: Path, view: View, interval: float) -> list[str]:
    """Returns everything as plain text, by two answers of the engine ``interval`` s apart. Raises UdedupError."""
    async with connect(path) as engine:
        before = await engine.status()
        await trio.sleep(interval)
        after = await engine.status()
    return once(Frame(after, between(before, after), (after.bytes_saved,), interval), view)
