"""One guest compiles, the other serves files: little in common, the unfavourable case."""

from collections.abc import Mapping
from pathlib import Path

import trio

from demo.guests import GuestImage, build_image
from demo.scenarios.build import build_project
from demo.scenarios.scenario import Scenario
from demo.scenarios.serve import serve
from demo.scenarios.stage import Stage


class Mixed(Scenario):
    """See the module. Ends when the compilation does."""

    summary = "one guest builds a part of Linux, one serves static files"
    last_start = "guest2 starts"

    def prepare(self, cache: Path) -> Mapping[str, Path]:
        self._build: GuestImage = build_image("build", cache)
        self._serve: GuestImage = build_image("serve", cache)
        return {"build": self._build.disk, "serve": self._serve.disk}

    async def play(self, stage: Stage) -> float:
        compiled = trio.Event()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, stage, self._serve, "guest2", 0, compiled)
            async with stage.guest("build", self._build, "guest1") as guest:
                await build_project(stage, guest)
                compiled.set()
                await guest.shut_down()
        return trio.current_time() - began
