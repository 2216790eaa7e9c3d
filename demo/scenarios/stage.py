"""Where a scenario plays: with udedup, with KSM or with neither, under the eyes of the recorder."""

import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import MappingProxyType

import trio
from attrs import define, field

from demo import services
from demo.guests import Guest, GuestConfig, GuestImage, started
from demo.guests import wrapped as wrapped_command
from demo.scenarios.settings import Settings, Side
from udedup.record.recorder import Recorder

SETTLED_GROWTH = 1.002
"""Less growth than this …"""

SETTLED_SCANS = 2
"""… while all memory is scanned so many times: nothing more to share."""

SETTLED_SECONDS = 10.0
"""And for so long at least, s."""

LOOK_SECONDS = 0.5
FORWARD_NONE: Mapping[int, int] = MappingProxyType({})


@define
class Stage:
    """One side of a comparison. Processes that a scenario starts behind ``wrap`` and watches are recorded."""

    side: Side
    settings: Settings
    folder: Path
    """For the scenario's own files."""

    engine: services.Engine | None
    """Of udedup's side only."""

    pids: list[int] = field(factory=list)
    """Watched."""

    recorder: Recorder | None = None
    """Looks at all sides alike, as it takes time. None until it begins."""

    @property
    def wrap(self) -> tuple[str, ...]:
        """What goes before a command that is to share its memory. QEMU needs it on udedup's side only."""
        return wrapped_command(self.engine.socket) if self.engine else ()

    @property
    def wrap_native(self) -> tuple[str, ...]:
        """The same for a program that does not itself offer its memory to KSM."""
        return (sys.executable, "-m", "demo.scenarios.mergeable") if self.side is Side.KSM else self.wrap

    def disk(self, name: str, file: Path) -> Path:
        """Where an image is read: on udedup's mount, or the file itself."""
        return self.engine.mount / name if self.engine else file

    @asynccontextmanager
    async def guest(
        self, kind: str, image: GuestImage, name: str, forward: Mapping[int, int] = FORWARD_NONE
    ) -> AsyncIterator[Guest]:
        """A guest of an image, recorded from its start to its end and ready for commands; see :class:`GuestConfig`."""
        config = GuestConfig(
            image=image,
            disk=self.disk(kind, image.disk),
            name=name,
            memory_mib=self.settings.memory_mib,
            forward=forward,
        )
        async with started(config, self.folder, self.wrap) as guest:
            with self.watching(guest.pid):
                self.mark(f"{name} starts")
                await guest.ready()
                yield guest

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        """Has the process recorded during the block."""
        self.pids.append(pid)
        try:
            yield
        finally:
            self.pids.remove(pid)

    def mark(self, text: str) -> None:
        """Notes that something happened now."""
        if self.recorder:
            self.recorder.mark(text)

    async def settled(self) -> None:
        """Returns once sharing no longer grows, or after ``settle_seconds``."""
        if self.recorder is None or self.side is Side.BARE:
            return
        best, best_scans, since = -1, 0, trio.current_time()
        with trio.move_on_after(self.settings.settle_seconds):
            while True:
                row = self.recorder.rows[-1]
                if row.sharing > best * SETTLED_GROWTH:
                    best, best_scans, since = row.sharing, row.full_scans, trio.current_time()
                elif row.full_scans > best_scans + SETTLED_SCANS and trio.current_time() > since + SETTLED_SECONDS:
                    return
                await trio.sleep(LOOK_SECONDS)
