"""Guests boot one after the other from one image, as a host's do after a power cut."""

from collections.abc import Mapping
from pathlib import Path

import trio

from demo.guests import GuestImage, build_image
from demo.scenarios.scenario import Scenario
from demo.scenarios.stage import Stage

GUESTS = 4
START = "python3.11 -c 'import asyncio, email, http, json, xml' && perl -e1 && sha256sum --quiet -c /etc/manifest"
"""What a guest does once it is up: starts programs, and checks all its files, which reads them."""

START_SECONDS = 600.0


class Boot(Scenario):
    """See the module."""

    summary = "guests boot from one image, a few seconds apart, and check their files"
    last_start = "last guest starts"

    def prepare(self, cache: Path) -> Mapping[str, Path]:
        self._image: GuestImage = build_image("boot", cache)
        return {"boot": self._image.disk}

    async def play(self, stage: Stage) -> float:
        guests = stage.settings.guests or GUESTS
        done = 0
        all_done = trio.Event()
        end = trio.Event()

        async def live(number: int) -> None:
            nonlocal done
            await trio.sleep(number * stage.settings.stagger_seconds)
            if number == guests - 1:
                stage.mark(self.last_start)
            async with stage.guest("boot", self._image, f"guest{number + 1}") as guest:
                await guest.run(START, seconds=START_SECONDS)
                done += 1
                if done == guests:
                    all_done.set()
                await end.wait()
                await guest.shut_down()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(guests):
                nursery.start_soon(live, number)
            await all_done.wait()
            seconds = trio.current_time() - began
            stage.mark("all have booted")
            await stage.settled()
            end.set()
        return seconds
