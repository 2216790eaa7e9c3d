"""The main job: runs programs and guests without udedup, then with it, and checks every byte they hold."""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.live import Live

from demo import image as images
from demo import services
from demo.guest_program import start_guests
from demo.guests import QEMU, build_image
from demo.programs import Program, start_all
from demo.report import Result, line, live, summary
from udedup.engine.control import request
from udedup.record.kernel import process_memory

CACHE = Path(__file__).parent / ".cache"
DISK = "disk.img"
GUEST_KIND = "boot"
"""Names in the mount; the second also names the kind of guest."""

ENGINE_OPTIONS = ("--pages-to-scan", "5000")
"""Five times the default rate."""

LOOK_SECONDS = 0.5
SETTLED_LOOKS = 6
"""So many looks in a row without growth, and a whole scan in between: nothing more to share."""

MERGE_SECONDS_MAX = 45.0


class Screen:
    """A live table on a terminal; elsewhere one line per look."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: dict[str, Any], programs: Sequence[Program], phase: str, seconds: float) -> None:
        """Shows one look at the engine."""
        if self._live:
            self._live.update(live(status, programs, phase, seconds), refresh=True)
        else:
            self._console.print(f"{seconds:5.1f} s  {phase}: {line(status)}", soft_wrap=True, highlight=False)


@contextmanager
def running(programs: list[Program]) -> Iterator[None]:
    """Waits for the programs to load, and ends them: in order if all is well, else at once."""
    try:
        for program in programs:
            program.wait_loaded()
        yield
        for program in programs:
            program.stop()
    finally:
        for program in programs:
            program.kill()


def sum_of_pss(programs: Sequence[Program]) -> int:
    """What the programs cost together, in bytes."""
    return sum(process_memory(program.pid).pss for program in programs)


def until_settled(screen: Screen, engine: services.Engine, programs: Sequence[Program], started: float) -> float:
    """Shows the merging until no more is found; returns when the last was, in seconds from ``started``."""
    best, best_at, best_scans, looks = -1, 0.0, 0, 0
    while True:
        status = request(engine.socket, {"op": "status"})
        seconds = time.monotonic() - started
        screen.show(status, programs, "merging", seconds)
        if status["pages_sharing"] > best * 1.002:
            best, best_at, best_scans, looks = status["pages_sharing"], seconds, status["full_scans"], 0
        looks += 1
        if (looks > SETTLED_LOOKS and status["full_scans"] >= best_scans + 2) or seconds > MERGE_SECONDS_MAX:
            return best_at
        time.sleep(LOOK_SECONDS)


def play(console: Console, json: Path | None) -> int:
    """Returns 1 if any content was wrong, or no memory was saved; writes the result to ``json``, if given."""
    console.print("Disk image: ext4, from files of this machine (kept for the next time)")
    image = images.build(CACHE)
    console.print(f"  {image.size >> 20} MiB, {len(image.files)} libraries, {len(image.documents)} documents")
    disks = {DISK: Path(image.path)}
    guest_image = None
    if shutil.which(QEMU):
        console.print("Disk image of the guests: Debian, from its packages (kept for the next time)")
        guest_image = build_image(GUEST_KIND, CACHE / "guests")
        disks[GUEST_KIND] = guest_image.disk
    else:
        console.print(f"  without guests: {QEMU} is not installed (apt-get install qemu-system-x86)", highlight=False)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="udedup-demo-")))
        engine = stack.enter_context(services.engine(folder, disks, ENGINE_OPTIONS))
        files = stack.enter_context(services.file_system(folder, engine.mount / DISK))

        def start(prefix: Sequence[str], name: str) -> list[Program]:
            own = folder / name
            own.mkdir()
            programs = start_all(prefix, engine.mount / DISK, files, image, own)
            if guest_image:
                programs += start_guests(prefix, engine.mount / GUEST_KIND, guest_image, own)
            return programs

        console.print("The programs without udedup …")
        programs = start((), "without")
        with running(programs):
            pss_without = sum_of_pss(programs)
        console.print(f"  {len(programs)} programs, {pss_without >> 20} MiB")

        console.print("The same programs behind `udedup run` …")
        started = time.monotonic()
        programs = start((sys.executable, "-m", "udedup", "run", "--socket", str(engine.socket), "--"), "with")
        with running(programs), Screen(console) as screen:
            seconds_to_merged = until_settled(screen, engine, programs, started)
            status = request(engine.socket, {"op": "status"})
            pss_engine = process_memory(engine.pid).pss
            pss_with = sum_of_pss(programs) + pss_engine

            wrong = [text for program in programs for text in program.wrong(changed=False)]
            screen.show(request(engine.socket, {"op": "status"}), programs, "verified", time.monotonic() - started)
            for program in programs:
                program.change()
            wrong += [text for program in programs for text in program.wrong(changed=True)]
            last = request(engine.socket, {"op": "status"})
            screen.show(last, programs, "changed and verified again", time.monotonic() - started)

    result = Result(
        programs=len(programs),
        items_verified=2 * sum(program.items for program in programs),
        wrong=tuple(wrong),
        pss_without=pss_without,
        pss_with=pss_with,
        pss_engine=pss_engine,
        saved_kernel=pss_without - pss_with,
        saved_engine=status["bytes_saved"],
        general_profit=status["general_profit"],
        seconds_to_merged=seconds_to_merged,
        lead_time_seconds=last["lead_time_seconds"],
        cpu_seconds=last["cpu_seconds"],
        breaks=last["breaks"]["pages"],
    )
    console.print(summary(result))
    for text in result.wrong:
        console.print(text, style="red", highlight=False)
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return 1 if result.wrong or result.saved_kernel <= 0 else 0
