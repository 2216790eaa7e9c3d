"""SIGUSR1: what the engine is at, written to a file. That needs no socket: it helps where nobody gets through."""

import logging
import os
import tempfile
from collections.abc import AsyncIterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from udedup.engine.link import Peer

if TYPE_CHECKING:
    from udedup.engine.server import Engine

log = logging.getLogger(__name__)

NAME: Final = "status.json"
"""In the state directory; one file, as a log has no room for thousands of processes in a line."""


async def follow(asked: AsyncIterable[object], engine: "Engine", directory: Path) -> None:
    """Writes ``udedup status --json`` into ``directory`` each time, in the place of what was written before."""
    path = directory / NAME
    own = Peer(os.getpid(), os.geteuid(), os.getegid())
    async for _ in asked:
        status = msgspec.json.format(msgspec.json.encode(await engine.status(own, with_kernel=True)))
        try:
            await trio.to_thread.run_sync(_put, path, status)
        except OSError as error:
            log.warning("the engine's state can't be written to %s: %s", path, error.strerror)
        else:
            log.warning("the engine's state is in %s", path)


def _put(path: Path, content: bytes) -> None:
    """Never is half of it found there, and nobody else may read it. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content + b"\n")
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
