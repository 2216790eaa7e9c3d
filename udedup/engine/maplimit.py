"""How many mappings a process may have (vm.max_map_count), and raising it while the engine runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from udedup.errors import UdedupError

MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
RESERVE_PART = 16
"""One part in this many is left to the application."""


def vma_limit() -> int:
    """Mappings that an agent's process may have in all."""
    limit = int(MAX_MAP_COUNT.read_text(encoding="ascii"))
    return min(limit - limit // RESERVE_PART, 0xFFFFFFFF)


@contextmanager
def raised(wanted: int | None) -> Iterator[None]:
    """Raises the limit to ``wanted`` and puts it back at the end; None: does nothing. Raises UdedupError."""
    before = int(MAX_MAP_COUNT.read_text(encoding="ascii"))
    if wanted is None or wanted <= before:
        yield
        return
    try:
        MAX_MAP_COUNT.write_text(f"{wanted}\n", encoding="ascii")
    except OSError as error:
        raise UdedupError(f"vm.max_map_count stays {before}: {error.strerror}; raising it takes root") from None
    try:
        yield
    finally:
        MAX_MAP_COUNT.write_text(f"{before}\n", encoding="ascii")
