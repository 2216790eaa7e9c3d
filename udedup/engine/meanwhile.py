"""Something to do while a step of the linear scan waits for an agent.

Most steps are over within a fraction of a millisecond, and a task for each would cost as much again: so there is one
beside all of them, which looks at the clock.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

PROMPT_SECONDS = 0.001
"""What takes longer, s, is waited for."""


class Meanwhile:
    """Calls ``serve`` once a step lasts long, and cancels it at the step's end if it has not returned."""

    def __init__(self, serve: Callable[[], Awaitable[None]]) -> None:
        self._serve = serve
        self._steps = 0
        """Begun so far."""
        self._under_way = False
        self._begun = trio.Event()
        """There were steps of late."""
        self._serving = trio.CancelScope()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step; one at a time."""
        self._steps += 1
        self._under_way = True
        self._begun.set()
        try:
            yield
        finally:
            self._under_way = False
            self._serving.cancel()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._begun.wait()
            step = self._steps
            await trio.sleep(PROMPT_SECONDS)
            if step != self._steps:
                continue
            if self._under_way:
                with trio.CancelScope() as self._serving:
                    await self._serve()
                    await trio.sleep_forever()
            else:
                self._begun = trio.Event()
