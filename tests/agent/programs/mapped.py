"""Maps images with Python's mmap and SQLite's; run by test_files.py.

argv: two images, then two databases that hold the same. Waits until what it mapped is merged, and checks it all the
while.
"""

import mmap
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PATIENCE = 20.0
PAGE = mmap.PAGESIZE
SEGMENT_PAGES = 4096
QUERY = "SELECT count(*), sum(number), sum(length(text)), max(text) FROM things"


def merged_pages(permissions: str) -> int:
    """How many pages of files are the store's. The agent's own view of the store is in whole segments."""
    pages = 0
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        span, found, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if "/memfd:udedup-store" in line and found == permissions and end - start < SEGMENT_PAGES * PAGE:
            pages += (end - start) // PAGE
    return pages


def until(pages: int, permissions: str, check: Callable[[], None]) -> None:
    """Checks until so many pages are merged, and once more."""
    deadline = time.monotonic() + PATIENCE
    while merged_pages(permissions) < pages:
        assert time.monotonic() < deadline, f"{merged_pages(permissions)} of {pages} pages are merged"
        check()
    check()


def map_images(paths: Sequence[Path]) -> None:
    """With ACCESS_READ, which makes a shared mapping, and with a private one."""
    maps = []
    for path in paths:
        content = path.read_bytes()
        with path.open("rb") as file:
            maps.append((mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), content))
            maps.append((mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ), content))
    pages = sum(len(content) // PAGE for _, content in maps) // 2

    def check() -> None:
        for mapped, content in maps:
            assert mapped[:] == content

    check()
    until(pages, "r--p", check)
    until(pages, "r--s", check)
    for mapped, _ in maps:
        mapped.close()
    assert merged_pages("r--p") == merged_pages("r--s") == 0


def query_databases(paths: Sequence[Path]) -> None:
    """What SQLite maps stays mapped while the database is open."""
    databases = []
    for path in paths:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        assert database.execute("PRAGMA mmap_size=1073741824").fetchone() == (1073741824,)
        databases.append(database)
    rows = databases[0].execute(QUERY).fetchall()

    def check() -> None:
        for database in databases:
            assert database.execute(QUERY).fetchall() == rows

    check()
    pages = sum(path.stat().st_size // PAGE for path in paths)
    until(pages * 9 // 10, "r--s", check)
    for database in databases:
        database.close()


if __name__ == "__main__":
    map_images([Path(name) for name in sys.argv[1:3]])
    query_databases([Path(name) for name in sys.argv[3:5]])
