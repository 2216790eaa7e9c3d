"""Where engines listen. Standard library only, so that commands start fast."""

import os
from pathlib import Path

SYSTEM_SOCKET = Path("/run/udedup.sock")
"""Where root's engine listens."""


def default_socket() -> Path:
    """Returns where an engine of this user listens: $UDEDUP_SOCKET if set, else by user."""
    given = os.environ.get("UDEDUP_SOCKET")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return SYSTEM_SOCKET
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "udedup.sock" if runtime else Path(f"/tmp/udedup-{os.geteuid()}.sock")


def engine_socket() -> Path:
    """Returns where to look for a running engine: this user's own, else root's if there is one."""
    own = default_socket()
    return own if own.exists() or not SYSTEM_SOCKET.exists() else SYSTEM_SOCKET
