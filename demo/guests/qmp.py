"""QEMU's machine protocol (QMP) over an open stream: one command at a time, events passed over."""

from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from demo.guests.lines import Lines
from udedup.errors import UdedupError


class Monitor:
    """A QEMU that answers commands."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._lines = Lines(stream)
        self._ready = False
        self._lock = trio.Lock()

    async def command(self, name: str, **arguments: object) -> Any:
        """Returns what QEMU answers to a command. Raises UdedupError if it refuses, EOFError if it is gone."""
        async with self._lock:
            if not self._ready:
                await self._answer()  # the greeting
                await self._ask("qmp_capabilities", {})
                self._ready = True
            return await self._ask(name, arguments)

    async def human(self, line: str) -> str:
        """Returns what a command of the human monitor prints: its errors are text too."""
        text: str = await self.command("human-monitor-command", **{"command-line": line})
        return text.strip()

    async def _ask(self, name: str, arguments: Mapping[str, object]) -> Any:
        await self._lines.write(msgspec.json.encode({"execute": name, "arguments": arguments}))
        answer = await self._answer()
        if "error" in answer:
            raise UdedupError(f"QEMU refuses {name}: {answer['error']['desc']}")
        return answer["return"]

    async def _answer(self) -> dict[str, Any]:
        while True:
            message: dict[str, Any] = msgspec.json.decode(await self._lines.read())
            if "event" not in message:
                return message
