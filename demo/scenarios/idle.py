"""Programs with nothing in common that do nothing: what does looking cost?"""

import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import trio

from demo.scenarios.scenario import Scenario
from demo.scenarios.stage import Stage

PROGRAMS = 2
SECONDS = 60.0
HOLD = "import os, sys; held = os.urandom({megabytes} << 20); print('holds', flush=True); sys.stdin.read()"


class Idle(Scenario):
    """See the module."""

    summary = "two programs hold random bytes and sleep: nothing to share, cost only"

    def prepare(self, cache: Path) -> Mapping[str, Path]:
        return {}

    async def play(self, stage: Stage) -> float:
        hold = HOLD.format(megabytes=stage.settings.memory_mib)
        began = trio.current_time()
        with ExitStack() as stack:
            for _ in range(stage.settings.guests or PROGRAMS):
                program = stack.enter_context(
                    subprocess.Popen(
                        [*stage.wrap_native, sys.executable, "-c", hold],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                )
                stack.enter_context(stage.watching(program.pid))
                assert program.stdout is not None
                await trio.to_thread.run_sync(program.stdout.readline)
            stage.mark("programs sleep")
            await trio.sleep(SECONDS)
            return trio.current_time() - began
