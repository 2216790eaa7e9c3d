"""udedup: userspace memory deduplication for Linux, guided by I/O hints.

Programs that cooperate knowingly use :func:`join`, :func:`advise` and :func:`stats`; everything else is the ``udedup``
command.
"""

from udedup.errors import UdedupError

__all__ = ["Stats", "UdedupError", "advise", "join", "stats"]


def __getattr__(name: str) -> object:
    # cffi takes a while to import, and `udedup run` must start fast.
    if name in {"Stats", "advise", "join", "stats"}:
        from udedup import api

        return getattr(api, name)
    raise AttributeError(f"module 'udedup' has no attribute {name!r}")
