"""Hostile clients of another user beside a torture run, one kind after the other (tests/engine/hostile.py)."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

import attrs
import trio
from engine.hostile import KINDS
from support.users import as_nobody, open_way

TESTS: Final = Path(__file__).resolve().parents[1]
HOSTILE: Final = tuple(kind for kind in KINDS if kind != "honest")
SECONDS: Final = 5.0
"""How long each is let loose."""


@attrs.define
class Hostility:
    """What was done to the engine."""

    attacks: Counter[str] = attrs.field(factory=Counter)
    """Times a client was let loose, by kind."""

    pids: set[int] = attrs.field(factory=set)
    """Of these clients: what the engine says of them is no failure."""

    failures: list[str] = attrs.field(factory=list)
    """Clients that did not go on until their end."""

    async def go_on(self, socket: Path, random: Random, note_process: Callable[[int], None]) -> None:
        """Lets them loose until cancelled, also while there is no engine."""
        open_way(socket.parent)
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}
        while True:
            kind = random.choice(HOSTILE)
            command = [*as_nobody(), sys.executable, "-m", "engine.hostile", str(socket), kind]
            client = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            note_process(client.pid)
            self.pids.add(client.pid)
            self.attacks[kind] += 1
            try:
                await trio.sleep(SECONDS)
                if client.poll() is not None:
                    self.failures.append(f"the hostile client {kind} ended with {client.returncode}")
            finally:
                client.kill()
                client.wait()
