"""Has a child, and says its pid, for every line of its input; they check their memory until that ends."""

import os
import select
import sys

CHILDREN_END, OWN_END = os.pipe()


def live() -> None:
    os.close(OWN_END)
    text = b"".join(b"%d " % number for number in range(200000))
    while not select.select([CHILDREN_END], [], [], 0.01)[0]:
        assert text == b"".join(b"%d " % number for number in range(200000))
    os._exit(0)


def main() -> None:
    children = []
    print("ready", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            live()
        children.append(child)
        print(child, flush=True)
    os.close(OWN_END)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


main()
