"""Who guesses at whose memory, and what the times of writes then say (see probe.c)."""

import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
from bench.measuring import Bench, Engine, Program, status, wait_for_agents
from sidechannel.distributions import Comparison, compare
from support.users import as_nobody, open_way

HERE: Final = Path(__file__).resolve().parent
SEED: Final = 1
"""Of what is held."""

ROUNDS: Final = 4
"""Of the linear scan, after which whatever can be merged is: the first remembers a page, the second reports it."""

SETTLE_SECONDS: Final = 60.0
OPTIONS: Final = ("--sleep-millisecs", "0", "--socket-mode", "666")
"""Of the engine."""


@attrs.frozen
class Scene:
    """Two processes of one engine."""

    name: str
    holder: str | None = None
    """Domain label of the process that has the content, or none."""

    guesser: str | None = None
    """Domain label of the process that guesses it, or none."""

    nobody: bool = False
    """Whether that one is of another user."""

    quiet: bool = False
    """Whether it runs with quiet breaks."""

    @property
    def together(self) -> bool:
        """Whether both are in one domain."""
        return self.holder == self.guesser and not self.nobody


INSIDE: Final = Scene("in one domain")
QUIET: Final = Scene("in one domain, with quiet breaks", quiet=True)
ACROSS: Final = (
    Scene("of another user", nobody=True),
    Scene("of another label", holder="one", guesser="two"),
    Scene("private", guesser="private"),
)


@attrs.frozen
class Times:
    """Of all trials, ns."""

    right: list[float]
    """Where the guess was right: somebody else has the content."""

    wrong: list[float]

    @property
    def comparison(self) -> Comparison:
        """Can they be told apart?"""
        return compare(self.right, self.wrong)

    @classmethod
    def of(cls, words: list[str]) -> "Times":
        """Takes the program's answer apart."""
        return cls(
            [float(word) for word in words if word.startswith("+")],
            [float(word) for word in words if not word.startswith("+")],
        )


@contextmanager
def _program(
    bench: Bench, engine: Engine, pages: int, domain: str | None, *, nobody: bool, quiet: bool
) -> Iterator[Program]:
    program = bench.compile("probe", HERE)
    user: list[str] = []
    if nobody:
        open_way(bench.folder)
        open_way(engine.socket.parent)
        user = as_nobody()
    process = engine.wrap(
        *user,
        program,
        str(pages),
        domain=domain,
        quiet=quiet,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with Program(process) as probe:
        probe.hear()
        yield probe


@contextmanager
def playing(bench: Bench, engine: Engine, scene: Scene, pages: int) -> Iterator[Program]:
    """The scene's processes: the one that guesses, beside the one that holds ``pages`` pages of SEED's content."""
    with (
        _program(bench, engine, pages, scene.holder, nobody=False, quiet=False) as holder,
        _program(bench, engine, pages, scene.guesser, nobody=scene.nobody, quiet=scene.quiet) as guesser,
    ):
        wait_for_agents(engine, 2)
        holder.ask(f"hold {SEED}")
        yield guesser


def time_writes(bench: Bench, engine: Engine, scene: Scene, pages: int, odds: int = 2) -> Times:
    """Guesses at ``pages`` pages, waits until the engine has looked at all of them, and times a write to each.

    One guess in ``odds`` is right: the fewer, the more alone they lie among wrong ones.
    """
    with playing(bench, engine, scene, pages) as guesser:
        right = int(guesser.ask(f"guess {SEED} {secrets.randbelow(1 << 30)} {odds}")[0])
        _settle(engine, guesser, pages if scene.quiet else right if scene.together else 0)
        return Times.of(guesser.ask("write"))


def time_hints(bench: Bench, engine: Engine, scene: Scene, trials: int) -> Times:
    """Hints at pairs of equal pages of the guesser's own, and times how long it takes until they are merged."""
    with playing(bench, engine, scene, trials) as guesser:
        _settle(engine, guesser, 0)
        return Times.of(guesser.ask(f"advise {SEED} {secrets.randbelow(1 << 30)} {trials}"))


def _settle(engine: Engine, guesser: Program, merged: int) -> None:
    """Waits for some rounds of the scan, and until at least so many of the guessed pages are merged."""
    deadline = time.monotonic() + SETTLE_SECONDS
    rounds = status(engine)["full_scans"] + ROUNDS
    while status(engine)["full_scans"] < rounds or int(guesser.ask("merged")[0]) < merged:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{guesser.ask('merged')[0]} of {merged} pages merged: {status(engine)}")
        time.sleep(0.05)
