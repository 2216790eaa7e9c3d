"""The model of the merge protocol (merge.pml): every state of every configuration, and what the safeguards are for."""

import re
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parent
SOURCES = MODEL.parents[1] / "native" / "agent"

Switches = dict[str, str | int]

CONFIGURATIONS: dict[str, Switches] = {
    # Writes, DMA, forks and discards against merging that may fail, and unmerging.
    "writes": {"WORK": "1+2", "FAILURES": 1, "MAY0": "READ_PAGE+WRITE_PAGE+PIN+FORK", "MAY1": "WRITE_PAGE+DISCARD"},
    # The mapping is replaced by one that is not ours, or by a fresh one that becomes a candidate again.
    "replace": {"WORK": "1+2+16", "MAY0": "WRITE_PAGE+REPLACE", "MAY1": "DISCARD+PROTECT"},
    # Discards past the hooks, with all that the worker does.
    "raw": {"WORK": "1+2+4+8", "FAILURES": 1, "MAY0": "WRITE_PAGE+RAW_DISCARD", "MAY1": "WRITE_PAGE+RAW_DISCARD",
            "ROUNDS": 1},
    # A run of two pages, discarded in part.
    "two": {"PAGES": 2, "OPERATIONS": 1, "ROUNDS": 1, "FAILURES": 1, "WIDEN": 1, "MAY0": "RAW_DISCARD+PIN",
            "MAY1": "WRITE_PAGE+RAW_DISCARD"},
    # Discards on either side of the page that is being merged.
    "sides": {"PAGES": 3, "THREADS": 3, "OPERATIONS": 1, "ROUNDS": 1, "MERGED": "1+4", "MERGE_FROM": 1, "MERGE_TO": 2,
              "MAY0": "RAW_DISCARD", "ON0": 1, "MAY1": "RAW_DISCARD", "ON1": 4, "MAY2": "WRITE_PAGE", "ON2": 2},
    # A merged page moves, with its breaks and its discards.
    "moves": {"PAGES": 2, "MERGED": 1, "OPERATIONS": 2, "ROUNDS": 1, "WORK": "2+32",
              "MAY0": "REMAP+WRITE_PAGE+DISCARD+RAW_DISCARD", "MAY1": "WRITE_PAGE"},
    # Hooks that run into a merged page themselves, while they hold the lock.
    "stack": {"PAGES": 2, "MERGED": 3, "STACK": 1, "OPERATIONS": 1, "ROUNDS": 1, "WORK": "2", "WORK_PAGE": 1,
              "MAY0": "DISCARD", "ON0": 1, "MAY1": "RAW_DISCARD+WRITE_PAGE", "ON1": 1},
    "owner": {"PAGES": 2, "MERGED": 3, "STACK": 1, "OPERATIONS": 1, "ROUNDS": 1, "WORK": "2", "WORK_PAGE": 1,
              "MAY0": "PROTECT+REPLACE", "ON0": 1, "MAY1": "FORK+WRITE_PAGE", "ON1": 3},
    # A hook that makes the very memory private that it runs on.
    "own stack": {"PAGES": 1, "MERGED": 1, "STACK": 0, "OPERATIONS": 1, "ROUNDS": 1, "WORK": "2",
                  "MAY0": "PROTECT", "ON0": 1, "MAY1": "FORK+WRITE_PAGE", "ON1": 1},
    # A merged page goes to another slot of the store.
    "relocates": {"MERGED": 1, "OPERATIONS": 1, "WORK": "2+4+32", "MAY0": "WRITE_PAGE+DISCARD+PIN",
                  "MAY1": "WRITE_PAGE+FORK"},
    "relocates raw": {"MERGED": 1, "OPERATIONS": 1, "WORK": "4+32", "MAY0": "WRITE_PAGE+DISCARD",
                      "MAY1": "WRITE_PAGE+RAW_DISCARD"},
    # The same with the page that a hook runs on, while calls of the agent fail.
    "relocates stack": {"PAGES": 2, "MERGED": 3, "STACK": 1, "OPERATIONS": 1, "ROUNDS": 1, "FAILURES": 1, "WORK": "4",
                        "WORK_PAGE": 1, "MAY0": "DISCARD", "ON0": 1, "MAY1": "RAW_DISCARD", "ON1": 1},
}  # fmt: skip
# With quiet breaks writers sleep on until the lock is given back.
CONFIGURATIONS |= {f"quiet {name}": CONFIGURATIONS[name] | {"QUIET": 1} for name in ("writes", "stack", "owner")}

READS = r"allowed\[\w+\]&"
STUCK = "invalid end state"
MUTATIONS: dict[str, tuple[str, Switches, str]] = {
    "compared before it is frozen": ("writes", {"NO_FREEZE": 1}, READS),
    "no map lock": ("replace", {"NO_MAP_LOCK": 1}, r"vma\[p\]|vma\[\d\]|allowed"),
    "who found a page frozen is not woken": ("writes", {"NO_WAKE": 1}, STUCK),
    "not moved back after a failure": ("writes", {"NOT_MOVED_BACK": 1}, READS),
    "pinned pages move": ("writes", {"MOVE_IGNORES_PINS": 1}, "pinned"),
    "fork past the lock": ("writes", {"FORK_NOT_HOOKED": 1}, READS),
    "removals are not acted upon": ("raw", {"NO_REMOVE_HANDLING": 1}, READS),
    "a page removed while frozen is merged": ("raw", {"NO_REMOVAL_CHECK": 1}, READS),
    "a page removed while frozen is moved back": ("raw", {"THAW_IGNORES_REMOVAL": 1}, READS),
    "removals are known as one span": ("sides", {"REMOVED_IS_A_HULL": 1}, READS),
    "a removed page is populated": ("raw", {"TAKE_BACK_REMOVED": 1, "MAY1": "PIN"}, STUCK),
    "a removed page is mapped again": ("stack", {"SERVE_WHAT_IS_DEFERRED": 1}, READS),
    "hooks don't settle removals": ("moves", {"DEFERRED_LEFT_TO_FAULT_THREAD": 1}, READS),
    "faults only with the lock held exclusively": ("stack", {"NO_SHARED_SERVING": 1}, STUCK),
    "the owner is not served": ("owner", {"NO_OWNER_SERVING": 1}, STUCK),
    "the owner's fault is put aside": ("stack", {"OWNER_PUT_ASIDE": 1}, STUCK),
    "a hook's own stack is copied from the store": ("own stack", {"OWN_STACK_DISSOLVES": 1}, READS),
    "removals wait for readers": ("stack", {"WAITS_FOR_READERS": 1}, STUCK),
    "who sleeps is not woken": ("quiet stack", {"SLEEPERS_FORGOTTEN": 1}, STUCK),
    "the owner of the lock sleeps until it gives it back": ("quiet owner", {"OWNER_SLEEPS": 1}, STUCK),
}
"""What is taken away: the configuration that shows it, the switches, and what spin says then."""

LIMITS: dict[str, tuple[str, Switches, str]] = {
    "raw discard between two calls of arm": ("raw", {"LIMIT_RAW_DISCARD": 1}, READS),
    "raw MAP_FIXED": ("writes", {"MAY0": "RAW_REPLACE"}, r"vma\[p\]!="),
    "fork while a raw discard is not settled": ("raw", {"MAY0": "FORK"}, READS),
    "raw fork": ("writes", {"MAY0": "RAW_FORK"}, READS),
    "raw discard while a hook makes the page private": ("stack", {"MAY0": "PROTECT"}, READS),
}
"""What the README says is not noticed: it is so, and the model knows."""

UNREACHED = {
    "RAW_REPLACE": "the application does it past the hooks: see LIMITS",
    "udd_stop_merging()": "a frozen page whose mapping is gone: only raw calls take it away, see LIMITS",
}
"""Transitions that no configuration comes to, by what stands in their lines of the model, and why."""

SOURCE_OF = {"worker": "agent.pml", "fault_thread": "agent.pml", "application": "application.pml", "init": "merge.pml"}
"""Where the steps of a process stand; spin knows their lines only."""


Step = tuple[str, int, str]
"""Process, line, and what happens there."""


class Verifier:
    """The compiled verifier of one configuration."""

    def __init__(self, folder: Path, switches: Switches, optimize: str, model: str = "merge.pml") -> None:
        for source in MODEL.glob("*.pml"):
            (folder / source.name).write_text(source.read_text())
        self._folder = folder
        self._run("spin", "-a", *(f"-D{name}={value}" for name, value in switches.items()), model)
        self._run("gcc", optimize, "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=3000", "-o", "pan", "pan.c")

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def search(self) -> str:
        """Goes through all states, or until an error; what the verifier printed."""
        done = subprocess.run(["./pan", "-m1000000"], cwd=self._folder, capture_output=True, text=True, check=False)
        return done.stdout

    def steps(self, report: str) -> dict[Step, bool]:
        """Whether the search that printed ``report`` came to each step of the model."""
        process, unreached = "", set()
        for line in report.splitlines():
            if found := re.match(r"unreached in (?:proctype )?(\w+)", line):
                process = found[1]
            elif found := re.match(r"\s+\S+:\d+, state (\d+), ", line):
                unreached.add((process, found[1]))
        steps: dict[Step, bool] = {}
        for line in self._run("./pan", "-d").splitlines():
            if found := re.match(r"proctype (\w+)|(init)", line):
                process = found[1] or found[2]
            elif found := re.match(r"\s+state\s+(\d+) -.*\] \S+:(\d+) => (.*)", line):
                # An inline stands in the model once for each use of it, with the arguments of that.
                step = process, int(found[2]), re.sub(r"\[\w+\]|\d+", "", found[3])
                steps[step] = steps.get(step, False) or (process, found[1]) not in unreached
        return steps


pytestmark = [pytest.mark.require("spin", "gcc"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def reached() -> dict[str, dict[Step, bool]]:
    """By configuration, which steps its search came to; each test of a configuration adds its own."""
    return {}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_state_is_right(tmp_path: Path, reached: dict[str, dict[Step, bool]], name: str) -> None:
    verifier = Verifier(tmp_path, CONFIGURATIONS[name], "-O2")
    report = verifier.search()
    assert "errors: 0" in report, report
    assert "Search not completed" not in report, report
    assert "max search depth too small" not in report, report
    reached[name] = verifier.steps(report)


def test_no_step_is_for_show(reached: dict[str, dict[Step, bool]]) -> None:
    """Every one is come to in some configuration, or it is known why not."""
    if reached.keys() != CONFIGURATIONS.keys():
        pytest.skip("not all configurations were searched before")
    every = {step for steps in reached.values() for step in steps}
    never = every - {step for steps in reached.values() for step, come_to in steps.items() if come_to}
    lines = {
        (process, number, (MODEL / SOURCE_OF[process]).read_text().splitlines()[number - 1].strip())
        for process, number, _ in never
    }
    unexplained = {line for line in lines if not any(words in line[2] for words in UNREACHED)}
    assert not unexplained
    assert len(lines) >= len(UNREACHED), "some of what is said to be never come to is"


def check_harm(folder: Path, configuration: str, switches: Switches, harm: str) -> None:
    report = Verifier(folder, CONFIGURATIONS[configuration] | switches, "-O0").search()
    assert "errors: 1" in report, report
    said = re.search(r"^pan:1: (.*)", report, re.MULTILINE)
    assert said, report
    assert re.search(harm, said[1]), said[1]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_missing_safeguard_is_found(tmp_path: Path, name: str) -> None:
    check_harm(tmp_path, *MUTATIONS[name])


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_real(tmp_path: Path, name: str) -> None:
    check_harm(tmp_path, *LIMITS[name])


def test_functions_that_the_model_names_exist() -> None:
    code = "\n".join(source.read_text() for source in SOURCES.glob("*.c"))
    # Definitions start at the beginning of a line, calls don't.
    defined = set(re.findall(r"^[a-z][^\n;=]*?\b(\w+)\([^;{}]*?\)\n\{", code, re.MULTILINE))
    agent, application = ((MODEL / name).read_text() for name in ("agent.pml", "application.pml"))
    comments = re.findall(r"/\*.*?\*/", agent + application, re.DOTALL)
    named = {name for comment in comments for name in re.findall(r"(\w+)\(\)", comment)}
    assert named <= defined, named - defined
    # Whatever the agent does is named after the function that does it.
    for heading in re.findall(r"^(?:inline|proctype) .*", agent, re.MULTILINE):
        assert re.search(r"/\* \w+\(\) \*/$", heading), heading
