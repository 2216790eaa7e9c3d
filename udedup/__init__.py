"""udedup: userspace memory deduplication for Linux, guided by I/O hints.

Programs that cooperate knowingly use :func:`join`, :func:`advise`, :func:`stats` and :func:`pause`; those that watch or
steer an engine, :func:`connect`. Everything else is the ``udedup`` command.
"""

from typing import TYPE_CHECKING

from udedup.errors import UdedupError

if TYPE_CHECKING:
    from udedup.api import Stats, advise, join, pause, stats
    from udedup.client import EngineClient, connect
    from udedup.places import native_directory

__all__ = [
    "EngineClient",
    "Stats",
    "UdedupError",
    "advise",
    "connect",
    "join",
    "native_directory",
    "pause",
    "stats",
]


def __getattr__(name: str) -> object:
    # cffi and trio take a while to import, and `udedup run` must start fast.
    if name in {"Stats", "advise", "join", "pause", "stats"}:
        from udedup import api

        return getattr(api, name)
    if name in {"EngineClient", "connect"}:
        from udedup import client

        return getattr(client, name)
    if name == "native_directory":
        from udedup.places import native_directory

        return native_directory
    raise AttributeError(f"module 'udedup' has no attribute {name!r}")
