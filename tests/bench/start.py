"""How long commands take that do nothing: `--help` (wanted: 100 ms at most), and `status` of an engine (150 ms).

Each is run --times times, one after the other; the median and the extremes are printed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UDEDUP = (sys.executable, "-m", "udedup")


def measure(command: list[str], times: int) -> list[float]:
    """Seconds of each run."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return taken


def show(name: str, taken: list[float]) -> None:
    """Prints them in milliseconds."""
    middle = statistics.median(taken)
    print(f"{name:10} median {middle * 1e3:.0f} ms  least {min(taken) * 1e3:.0f}  most {max(taken) * 1e3:.0f}")


def main() -> None:
    """Measures both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    show("--help", measure([*UDEDUP, "--help"], args.times))
    with tempfile.TemporaryDirectory(prefix="udedup-") as folder:
        socket = Path(folder) / "socket"
        engine = subprocess.Popen([*UDEDUP, "engine", "--socket", str(socket)], stdout=subprocess.PIPE)
        assert engine.stdout is not None
        try:
            engine.stdout.readline()
            show("status", measure([*UDEDUP, "status", "--socket", str(socket)], args.times))
        finally:
            engine.terminate()
            engine.wait()


if __name__ == "__main__":
    main()
