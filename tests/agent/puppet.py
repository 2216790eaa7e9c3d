"""A wrapped process that does what a test tells it (programs/puppet.c)."""

import subprocess
import time

from support.engine import read_line

PAGES = 64
PATIENCE = 20.0


class Puppet:
    """The test's side of one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.address = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = read_line(self.process.stdout, PATIENCE)
        assert line, f"the puppet ended with {self.process.wait(10)}"
        return line.rstrip("\n")

    def ask(self, command: str) -> str:
        """Sends a line, returns the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def merged(self) -> int:
        """How many of its pages are merged, by the kernel's account."""
        return int(self.ask("merged"))

    def is_right(self) -> bool:
        """Whether every page holds what it should."""
        return self.ask("check") == "right"

    def write(self, page: int) -> float:
        """Gives a page new contents; returns the seconds it took."""
        return float(self.ask(f"write {page}"))

    def flip(self, page: int, byte: int) -> None:
        """Changes one bit of a page, or changes it back."""
        assert self.ask(f"flip {page} {byte}") == "ok"

    def swap(self, first: int, second: int) -> None:
        """Has two pages change places, by ``mremap``; their numbers stay with the places."""
        assert self.ask(f"swap {first} {second}") == "ok"

    def stats(self) -> tuple[bool, int, str]:
        """Merging, pages merged, reason; as its agent has it."""
        merging, pages, reason = self.ask("stats").split(" ", 2)
        return merging == "1", int(pages), reason

    def until_merged(self, pages: int = PAGES, *, advise: bool = True) -> None:
        """Waits until so many pages are merged."""
        deadline = time.monotonic() + PATIENCE
        turn = 0
        while self.merged() < pages:
            assert time.monotonic() < deadline, f"{self.merged()} of {pages} pages are merged; {self.stats()}"
            if advise and turn % 50 == 0:
                self.ask("advise")
            turn += 1
            time.sleep(0.01)

    def until(self, merging: bool) -> None:
        """Waits until its agent may merge, or may not."""
        deadline = time.monotonic() + PATIENCE
        while self.stats()[0] != merging:
            assert time.monotonic() < deadline, self.stats()
            time.sleep(0.01)

    def end(self) -> None:
        """Closes its input; it must end by itself and find its memory right."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE) == 0
        self.process.stdout.close()
