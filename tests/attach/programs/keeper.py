"""Holds pages that are equal in all programs of its kind, and some of its own; reads them all again and again.

Ends with status 0 when its input does. Its arguments: how many pages of each kind, and what number its own ones are
made from.
"""

import hashlib
import mmap
import select
import sys

PAGE = 4096


def page(kind: int, number: int) -> bytes:
    return hashlib.sha512(f"{kind} {number}".encode()).digest() * (PAGE // 64)


def main() -> None:
    count, own = int(sys.argv[1]), int(sys.argv[2])
    pages = [page(kind, number) for kind in (0, own) for number in range(count)]
    memory = mmap.mmap(-1, len(pages) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"".join(pages)
    print("ready", flush=True)
    rounds = 0
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        at = rounds % len(pages)
        assert memory[:] == b"".join(pages), f"changed by itself in round {rounds}"
        pages[at] = page(own + 1, rounds)
        memory[at * PAGE : (at + 1) * PAGE] = pages[at]
        rounds += 1
    print(f"{rounds} rounds")


main()
