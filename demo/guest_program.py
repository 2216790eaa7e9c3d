"""A virtual machine as one of the main job's programs."""

import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import trio

from demo.guests import Guest, GuestConfig, GuestImage, started
from demo.programs import Program

Result = TypeVar("Result")

GUESTS = 2
MEMORY_MIB = 192
CHECK = "sha256sum --quiet -c /etc/manifest"
CHECK_CHANGED = "sha256sum --quiet -c /root/changed"
"""Say nothing but what is wrong."""

CHANGE = (
    "cp /usr/lib/python3.11/*.py /root && for file in /root/*.py; do echo changed >>$file; done"
    " && sha256sum /root/*.py >/root/changed && sync && echo 3 >/proc/sys/vm/drop_caches"
)
"""Writes files, records what they hold, and has them read again from the disk."""

SECONDS = 120.0
END_SECONDS = 60.0


class GuestProgram(Program):
    """A guest that checks all files on its disk. Trio runs in a thread of its own, as everything else here waits."""

    kind = "qemu, Debian"

    def __init__(self, config: GuestConfig, folder: Path, prefix: Sequence[str]) -> None:
        """Starts QEMU behind ``prefix`` (``udedup run …`` or nothing)."""
        self.name = config.name
        self.items = config.image.files
        self._error: Exception | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(config, folder, prefix), daemon=True)
        self._thread.start()
        self._begun.wait()
        if self._error:
            raise self._error

    def _run(self, config: GuestConfig, folder: Path, prefix: Sequence[str]) -> None:
        try:
            trio.run(self._live, config, folder, prefix)
        except Exception as error:
            self._error = error
            self._begun.set()

    async def _live(self, config: GuestConfig, folder: Path, prefix: Sequence[str]) -> None:
        async with started(config, folder, prefix) as self._guest:
            self._token = trio.lowlevel.current_trio_token()
            self._end = trio.Event()
            self._begun.set()
            await self._end.wait()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._guest.pid

    def _ask(self, question: Callable[[Guest], Awaitable[Result]]) -> Result:
        return trio.from_thread.run(question, self._guest, trio_token=self._token)

    def wait_loaded(self) -> None:
        self._ask(Guest.ready)
        wrong = self.wrong(changed=False)
        if wrong:
            raise RuntimeError(wrong[0])

    def change(self) -> None:
        self._ask(lambda guest: guest.run(CHANGE, seconds=SECONDS))

    def wrong(self, *, changed: bool) -> list[str]:
        command = f"{CHECK}; {CHECK_CHANGED}" if changed else CHECK
        done = self._ask(lambda guest: guest.run(command, check=False, seconds=SECONDS))
        return [f"{self.name}: {line}" for line in done.output.splitlines()]

    def stop(self) -> None:
        self._ask(Guest.shut_down)
        self.kill()

    def kill(self) -> None:
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._end.set, trio_token=self._token)
            self._thread.join(END_SECONDS)


def start_guests(prefix: Sequence[str], disk: Path, image: GuestImage, folder: Path) -> list[Program]:
    """Starts guests from one disk."""
    programs: list[Program] = []
    try:
        for number in range(1, GUESTS + 1):
            config = GuestConfig(image=image, disk=disk, name=f"guest{number}", memory_mib=MEMORY_MIB)
            programs.append(GuestProgram(config, folder, prefix))
    except BaseException:
        for program in programs:
            program.kill()
        raise
    return programs
