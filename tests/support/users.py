"""Commands as another user."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


def as_nobody() -> list[str]:
    """:func:`as_user`, of one who has nothing."""
    return as_user(NOBODY)


def as_user(uid: int) -> list[str]:
    """The words before a command that is to run as that user.

    One right is left to it: to read files, for this project may lie where only root can.
    """
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return [*drop, "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]


def open_way(folder: Path) -> None:
    """Lets other users reach what is in a folder of root's."""
    for place in (folder, *folder.parents):
        if place != Path("/") and place.stat().st_uid == 0:
            place.chmod(place.stat().st_mode | 0o011)


@contextmanager
def listener_of(uid: int, path: Path) -> Iterator[socket.socket]:
    """A socket as an engine's, made by a user, to which all may connect."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(30)
        os.seteuid(uid)
        try:
            listener.bind(str(path))
            listener.listen()
            path.chmod(0o666)
        finally:
            os.seteuid(0)
        try:
            yield listener
        finally:
            path.unlink()
