"""Two guests compile the same project, as build hosts do."""

from collections.abc import Mapping
from pathlib import Path

import trio

from demo.guests import Guest, GuestImage, build_image
from demo.scenarios.scenario import Scenario
from demo.scenarios.stage import Stage

GUESTS = 2
COMPILE = "cd /root/lua5.4/src && make -s linux >/run/log 2>&1 || { tail -n 1 /run/log; exit 1; }"
CHECK = "echo 'print(6 * 7)' | /root/lua5.4/src/lua -"
COMPILE_SECONDS = 1800.0


async def compile_project(guest: Guest) -> None:
    """Builds Lua from Debian's source package and tries it. Raises GuestError."""
    await guest.run(COMPILE, seconds=COMPILE_SECONDS)
    answer = (await guest.run(CHECK)).output.strip()
    if answer != "42":
        raise RuntimeError(f"{guest.config.name}: what was compiled says {answer!r}, not 42")


class Build(Scenario):
    """See the module."""

    summary = "two guests compile Lua with gcc"
    last_start = "last guest starts"

    def prepare(self, cache: Path) -> Mapping[str, Path]:
        self._image: GuestImage = build_image("build", cache)
        return {"build": self._image.disk}

    async def play(self, stage: Stage) -> float:
        guests = stage.settings.guests or GUESTS

        async def live(number: int) -> None:
            await trio.sleep(number * stage.settings.stagger_seconds)
            if number == guests - 1:
                stage.mark(self.last_start)
            async with stage.guest("build", self._image, f"guest{number + 1}") as guest:
                await compile_project(guest)
                stage.mark(f"{guest.config.name} has compiled")
                await guest.shut_down()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(guests):
                nursery.start_soon(live, number)
        return trio.current_time() - began
