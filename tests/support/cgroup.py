"""A control group that limits the memory of a process under test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

ROOT = Path("/sys/fs/cgroup")


@attrs.frozen
class Controller:
    """Where the kernel has memory control groups."""

    folder: Path
    limit: str
    """Name of the file that takes the limit."""


def memory_controller() -> Controller | None:
    """In either version of control groups; None if groups can't be made."""
    for controller in (Controller(ROOT / "memory", "memory.limit_in_bytes"), Controller(ROOT, "memory.max")):
        enabled = controller.folder / "cgroup.subtree_control"
        if controller.limit == "memory.max":
            if not enabled.exists() or "memory" not in enabled.read_text().split():
                continue
        elif not (controller.folder / controller.limit).exists():
            continue
        return controller
    return None


@contextmanager
def memory_limited(pid: int, limit: int) -> Iterator[None]:
    """What ``pid`` allocates from now on may not exceed ``limit`` bytes. It must have ended when this does."""
    controller = memory_controller()
    assert controller is not None
    group = controller.folder / f"udedup-test-{pid}"
    group.mkdir()
    try:
        (group / controller.limit).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        group.rmdir()
