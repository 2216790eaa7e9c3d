"""Two guests unpack and build the same project, as build hosts do: its files move through their page caches."""

from collections.abc import Mapping
from pathlib import Path

import trio

from demo.guests import Guest, GuestError, GuestImage, build_image
from demo.scenarios.scenario import Scenario
from demo.scenarios.stage import Stage

GUESTS = 2
PROJECT = "/root/linux-source-6.1"
UNPACK = "cd /root && tar -x -J -f /usr/src/linux-source-6.1.tar.xz"
"""1.3 GB of files, three times what a guest's page cache holds."""

CONFIGURE = f"cd {PROJECT} && make -s ARCH=i386 tinyconfig"
COMPILE = f"cd {PROJECT} && make -s ARCH=i386 init/"
DIGEST = f"cd {PROJECT} && cat init/calibrate.o init/do_mounts.o init/init_task.o | sha256sum"
"""Of what depends on nothing but the source."""

STEP_SECONDS = 1800.0


async def build_project(stage: Stage, guest: Guest) -> str:
    """Unpacks, configures and compiles a part of Linux; returns a digest of the outcome. Raises GuestError."""
    for step, command in (("unpacked", UNPACK), ("configured", CONFIGURE), ("compiled", COMPILE)):
        await guest.run(f"({command}) >/run/log 2>&1 || {{ tail -n 1 /run/log; exit 1; }}", seconds=STEP_SECONDS)
        stage.mark(f"{guest.config.name} has {step}")
    return (await guest.run(DIGEST)).output.split()[0]


class Build(Scenario):
    """See the module."""

    summary = "two guests unpack Linux's source and compile a part of it"
    last_start = "last guest starts"

    def prepare(self, cache: Path) -> Mapping[str, Path]:
        self._image: GuestImage = build_image("build", cache)
        return {"build": self._image.disk}

    async def play(self, stage: Stage) -> float:
        guests = stage.settings.guests or GUESTS
        outcomes: set[str] = set()

        async def live(number: int) -> None:
            await trio.sleep(number * stage.settings.stagger_seconds)
            if number == guests - 1:
                stage.mark(self.last_start)
            async with stage.guest("build", self._image, f"guest{number + 1}") as guest:
                outcomes.add(await build_project(stage, guest))
                await guest.shut_down()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(guests):
                nursery.start_soon(live, number)
        if len(outcomes) != 1:
            raise GuestError("the guests built the same source and got different objects")
        return trio.current_time() - began
