"""Python, Redis, SQLite and PostgreSQL programs that load the same data from one disk image."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import trio

from demo import image as images
from demo import services
from demo.postgres import PostgresServer
from demo.programs import Program, start_all
from demo.scenarios.scenario import Scenario
from demo.scenarios.stage import Stage

SERVERS = 2
"""PostgreSQL's."""


class Native(Scenario):
    """See the module. Every byte is checked at the end."""

    summary = "python, redis, sqlite and postgres programs hold the files and databases of one disk image"
    last_start = "last program starts"

    def prepare(self, cache: Path) -> Mapping[str, Path]:
        self._image = images.build(cache.parent)
        return {"disk.img": Path(self._image.path)}

    async def play(self, stage: Stage) -> float:
        disk = stage.disk("disk.img", Path(self._image.path))
        with services.file_system(stage.folder, disk) as files:
            began = trio.current_time()
            programs = start_all(stage.wrap_native, disk, files, self._image, stage.folder)
            try:
                for number in range(1, SERVERS + 1):
                    server = partial(PostgresServer, f"postgres{number}", stage.wrap_native)
                    programs.append(await trio.to_thread.run_sync(server, files, self._image, stage.folder))
                stage.mark(self.last_start)
                stage.pids.extend(program.pid for program in programs)
                await trio.to_thread.run_sync(_wait_loaded, programs)
                seconds = trio.current_time() - began
                stage.mark("all have loaded")
                await stage.settled()
                wrong = await trio.to_thread.run_sync(_wrong, programs)
                stage.pids.clear()
                await trio.to_thread.run_sync(_stop, programs)
            finally:
                for program in programs:
                    program.kill()
        if wrong:
            raise RuntimeError("\n".join(wrong))
        return seconds


def _wait_loaded(programs: list[Program]) -> None:
    for program in programs:
        program.wait_loaded()


def _wrong(programs: list[Program]) -> list[str]:
    return [line for program in programs for line in program.wrong(changed=False)]


def _stop(programs: list[Program]) -> None:
    for program in programs:
        program.stop()
