"""Workers that load the same file, each for itself: ``workers.py FILE COUNT spawn|fork``.

Says ``ready PID…`` once all have, and ``checked DIGEST…`` of what each has for every line it is told.
"""

import hashlib
import multiprocessing
import os
import pickle
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy


def load(path: str) -> tuple[object, bytes]:
    """What a worker keeps, and how to see that it is right: an array, or many small objects."""
    if path.endswith(".npy"):
        array = numpy.load(path)
        return array, memoryview(array).cast("B")
    return pickle.loads(Path(path).read_bytes()), b""


def work(path: str, pipe: Connection) -> None:
    """One worker."""
    kept, content = load(path)
    pipe.send(str(os.getpid()))
    with suppress(EOFError):  # the server has ended
        while True:
            pipe.recv()
            pipe.send(hashlib.sha256(content or pickle.dumps(kept)).hexdigest())


def main() -> None:
    """The server."""
    path, count, start = sys.argv[1:]
    context = multiprocessing.get_context(start)
    pipes = []
    for _ in range(int(count)):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(path, theirs), daemon=True).start()
        pipes.append(ours)
    print("ready", *(pipe.recv() for pipe in pipes), flush=True)
    for _ in sys.stdin:
        for pipe in pipes:
            pipe.send(True)
        print("checked", *(pipe.recv() for pipe in pipes), flush=True)


if __name__ == "__main__":
    main()
