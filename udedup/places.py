"""Where engines listen and keep things. Standard library only, so that commands start fast."""

import os
from pathlib import Path

SYSTEM_SOCKET = Path("/run/udedup.sock")
"""Where root's engine listens."""


SYSTEM_STATE = Path("/var/lib/udedup")
"""Where root's engine keeps things."""


def native_directory() -> Path:
    """Returns where ``udedup.h`` and ``libudedup.so`` are: C programs that join by themselves need both.

    >>> sorted(path.name for path in udedup.native_directory().glob("*udedup.[hs]*"))
    ['libudedup.so', 'udedup.h']
    """
    return Path(__file__).parent


def default_socket() -> Path:
    """Returns where an engine of this user listens: $UDEDUP_SOCKET if set, else by user."""
    given = os.environ.get("UDEDUP_SOCKET")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return SYSTEM_SOCKET
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "udedup.sock" if runtime else temporary_socket()


def temporary_socket() -> Path:
    """Returns where an engine of this user listens who has no directory for that: another user may put one there."""
    return Path(f"/tmp/udedup-{os.geteuid()}.sock")


def engine_socket() -> Path:
    """Returns where to look for a running engine: this user's own, else root's if there is one."""
    own = default_socket()
    return own if own.exists() or not SYSTEM_SOCKET.exists() else SYSTEM_SOCKET


def state_directory() -> Path:
    """Returns where an engine of this user keeps things: what systemd gives, else root's place or the user's own."""
    given = os.environ.get("STATE_DIRECTORY")
    if given:
        # There are several if the unit names several.
        return Path(given.partition(":")[0])
    if os.geteuid() == 0:
        return SYSTEM_STATE
    home = os.environ.get("XDG_STATE_HOME")
    # Relative ones are to be ignored, by the specification.
    base = Path(home) if home and os.path.isabs(home) else Path("~/.local/state").expanduser()  # noqa: PTH117
    return base / "udedup"
