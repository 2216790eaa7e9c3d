"""Who has opened a file of the mount, and of whose store it may therefore be served."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from udedup.vdi.images import Image
    from udedup.vdi.shelf import Shelf


@attrs.frozen
class Opener:
    """A process, for as long as it lives."""

    pid: int
    """0 if unknown."""
    uid: int
    started: int | None
    """In the kernel's clock ticks since boot: another process with the same number started later. None if unknown."""

    @classmethod
    def of(cls, pid: int, uid: int) -> "Opener":
        """Of a process that is there now."""
        return cls(pid, uid, start_time(pid))

    @property
    def there(self) -> bool:
        """Whether the process with this number is still the same one."""
        return self.started is not None and start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), stat); None if it is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command, in parentheses, may hold blanks and parentheses itself.
    return int(text.rpartition(")")[2].split()[19])


class ShelfSource(Protocol):
    """Knows the trust domains of processes."""

    @property
    def turn(self) -> int:
        """Changes when :meth:`find` may have another answer for somebody it had none for."""

    def find(self, image: "Image", opener: Opener) -> "Shelf | None":
        """What ``opener`` may be served from, of ``image``: the shelf of its own trust domain. None: it has none."""

    def may_know_all(self, uid: int) -> bool:
        """Whether processes of ``uid`` that are in no domain may learn what is in all stores."""


class NoShelves:
    """Nobody has one."""

    turn = 0

    def find(self, image: "Image", opener: Opener) -> "Shelf | None":
        return None

    def may_know_all(self, uid: int) -> bool:
        return False
