"""A headless Chromium that opens one page and says what came of it.

It speaks the browser's own protocol (https://chromedevtools.github.io/devtools-protocol/) through a pair of pipes:
messages are JSON, and end with a zero byte.
"""

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.ledger import Ledger

PROGRAM = "chromium-headless-shell"
START_SECONDS = 60.0
_COMMANDS, _ANSWERS = 3, 4
"""Descriptors that the browser has its pipes at."""


class Page:
    """A page that has been loaded; made by :func:`opened`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.troubles: list[str] = []
        """Exceptions of scripts, and what the browser's console has as errors or warnings."""
        self.requests: list[str] = []
        """Addresses of all that was asked for."""

    def load(self, address: str, width: int, height: int) -> None:
        """Opens the page and waits until all of it is there."""
        target = self._ask("Target.createTarget", url="about:blank", width=width, height=height)
        self._session = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        assert "errorText" not in self._ask("Page.navigate", url=address)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def resize(self, width: int, height: int) -> None:
        """Gives it a window of another size, in pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        result = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Writes all of the page as a PNG file."""
        whole = self._ask("Page.getLayoutMetrics")["cssContentSize"] | {"scale": 1}
        shot = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        """The next message; what it tells of the page is kept."""
        deadline = time.monotonic() + START_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no word of the browser within {START_SECONDS:.0f} s"
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        match message:
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                self.troubles.append(str(details))
            case {"method": "Log.entryAdded", "params": {"entry": entry}} if entry["level"] in ("error", "warning"):
                self.troubles.append(entry["text"])
            case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "warning", "args": words}}:
                self.troubles.append(str(words))
            case {"method": "Network.requestWillBeSent", "params": {"request": request}}:
                self.requests.append(request["url"])
        return message


@contextmanager
def opened(file: Path, folder: Path, ledger: Ledger, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A local page, loaded in a browser that keeps its own files in ``folder``."""
    (read_commands, write_commands), (read_answers, write_answers) = os.pipe(), os.pipe()
    command = [
        PROGRAM,
        "--no-sandbox",  # which root can't have
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        "about:blank",
    ]
    # The shell puts the pipes where the browser looks for them; it has them at numbers of its own.
    script = f'exec {_COMMANDS}<&"$0" {_ANSWERS}>&"$1"; shift; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", script, str(read_commands), str(write_answers), *command],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[read_commands, write_answers],
        env={**os.environ, "HOME": str(folder)},
    )
    ledger.add_process(process.pid)
    os.close(read_commands)
    os.close(write_answers)
    try:
        page = Page(write_commands, read_answers)
        page.load(file.as_uri(), width, height)
        yield page
    finally:
        # It ends when its pipe does.
        os.close(write_commands)
        os.close(read_answers)
        process.wait(START_SECONDS)
