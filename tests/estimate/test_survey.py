"""What is found in processes with known content, against an oracle that shares no code with it."""

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from estimate.conftest import PAGE, Counts, Subject, look_closely, survey
from support.engine import Engine
from support.ledger import Ledger

from udedup.errors import UdedupError
from udedup.estimate import processes
from udedup.estimate.figures import Estimate
from udedup.record.kernel import ksm, ksm_counter

Start = Callable[[], Subject]

EQUAL = """
private = anonymous({pages})
private[:] = random.Random({seed}).randbytes({pages} * PAGE)
"""
SELF = """
twice = anonymous(200)
twice[:] = (b"".join(bytes([number]) * PAGE for number in range(1, 101))) * 2
"""
ZERO = """
zero = anonymous(300)
for page in range(300): zero[page * PAGE] = 1; zero[page * PAGE] = 0
unwritten = anonymous(50)
answer = sum(unwritten[page * PAGE] for page in range(50))
"""
PATIENCE = 30.0


def agree(estimate: Estimate, counts: Counts) -> None:
    """All figures are the oracle's."""
    total, kinds = estimate.total, estimate.kinds
    assert (total.pages, total.already, total.already_file) == (counts.pages, counts.already, counts.already_file)
    assert (total.file, total.zero, total.zero_file) == (counts.file, counts.zero, counts.zero_file)
    assert (total.unreadable, total.known) == (0, counts.known)
    assert total.within + total.between == pytest.approx(counts.within + counts.between, abs=0.1)
    found = (kinds.anonymous, kinds.file, kinds.mixed)
    assert found == pytest.approx((counts.anonymous, counts.of_files, counts.mixed))
    assert estimate.saved == estimate.saved_least == estimate.saved_most == pytest.approx(total.saved)
    assert sum(figures.pages for figures in estimate.names.values()) == total.pages
    assert sum(figures.saved for figures in estimate.names.values()) == pytest.approx(total.saved, abs=0.1)


@pytest.mark.require("root")
@pytest.mark.parametrize("threads", [1, 3])
def test_everything_at_once(start: Start, ledger: Ledger, tmp_path: Path, threads: int) -> None:
    first, second = start(), start()
    file = tmp_path / "file"
    file.write_bytes(random.Random(7).randbytes(400 * PAGE) + bytes(20 * PAGE))
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    first.do(EQUAL.format(pages=1000, seed=1) + SELF + ZERO)
    second.do(EQUAL.format(pages=1000, seed=1) + ZERO)
    # Another file with the same content, and the same content in anonymous memory.
    for subject, path in ((first, file), (second, copy)):
        subject.do(
            f"mapped = mmap.mmap(os.open({str(path)!r}, os.O_RDONLY), 0, mmap.MAP_PRIVATE, mmap.PROT_READ);"
            "answer = sum(mapped[::PAGE])"
        )
    first.do("copied = anonymous(10); copied[:] = mapped[:10 * PAGE]")
    first.do("shared = mmap.mmap(-1, 64 * PAGE); shared[:] = random.Random(3).randbytes(64 * PAGE)")
    child = first.do("answer = os.fork() or 0\nif not answer: time.sleep(1000)")
    assert isinstance(child, int)
    ledger.add_process(child)
    pids = [first.pid, second.pid, child]
    settle(pids)
    before = list(map(kernels_account, pids))
    estimate = survey(pids, threads=threads)
    # To pin a page that was inherited would have copied it.
    assert list(map(kernels_account, pids)) == before
    counts = look_closely(pids)
    agree(estimate, counts)
    total = estimate.total
    assert 600 <= total.zero - total.zero_file < 800
    assert total.zero_file >= 40
    assert total.between >= 1400
    assert total.within >= 100
    assert estimate.kinds.anonymous >= 1100
    assert estimate.kinds.file >= 400
    assert estimate.kinds.mixed >= 10
    # Inherited memory is one frame, and so is the file.
    assert total.already - total.already_file >= 1500
    assert total.already_file >= 464
    # With several threads, chance decides with which process a frame counts that several have.
    if threads == 1:
        assert total.within == counts.within
        for process in estimate.processes:
            saved = counts.by_process[process.pid] / 1000
            assert process.figures.within + process.figures.between == pytest.approx(saved, abs=total.pages / 1000)


@pytest.mark.require("root")
def test_ten_thousand_mappings(start: Start) -> None:
    subject = start()
    subject.do(EQUAL.format(pages=10_000, seed=1))
    subject.do("import ctypes; address = ctypes.addressof(ctypes.c_char.from_buffer(private))")
    subject.do(
        "protect = ctypes.CDLL(None).mprotect\n"
        "for page in range(0, 10_000, 2): protect(ctypes.c_void_p(address + page * PAGE), PAGE, mmap.PROT_READ)"
    )
    assert len(Path(f"/proc/{subject.pid}/maps").read_text().splitlines()) > 10_000
    estimate = survey([subject.pid], threads=2)
    agree(estimate, look_closely([subject.pid]))
    assert estimate.total.pages > 10_000


@pytest.mark.require("root", "huge-pages")
def test_huge_pages_stay_whole_and_nothing_comes_in(start: Start) -> None:
    subject = start()
    # Aligned by hand: 4 huge pages, of which the second half is never touched, and a hole of a gigabyte.
    subject.do(
        "import ctypes; huge = mmap.mmap(-1, 18 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS);"
        "huge.madvise(mmap.MADV_HUGEPAGE); at = -ctypes.addressof(ctypes.c_char.from_buffer(huge)) % (2 << 20);"
        "huge[at : at + (8 << 20)] = random.Random(5).randbytes(4 << 20) * 2;"
        "hole = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); hole[1 << 29] = 1"
    )
    before = kernels_account(subject.pid)
    estimate = survey([subject.pid])
    assert kernels_account(subject.pid) == before
    assert before["AnonHugePages"] >= 8 << 10
    agree(estimate, look_closely([subject.pid]))
    assert estimate.total.within >= 1024


def settle(pids: list[int]) -> None:
    """Waits until all sleep, after a fork and their last answers."""
    before: list[dict[str, int]] = []
    while (now := list(map(kernels_account, pids))) != before:
        before = now
        time.sleep(0.05)


def kernels_account(pid: int) -> dict[str, int]:
    """Memory in KiB, and page faults."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    faults = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    kept = {name: found[name] for name in ("Rss", "Pss_Anon", "AnonHugePages", "Anonymous", "Swap")}
    return kept | {"minor": int(faults[7]), "major": int(faults[9])}


@pytest.mark.require("root")
def test_what_ksm_has_merged_is_shared_already(start: Start) -> None:
    first, second = start(), start()
    for subject in (first, second):
        subject.do(EQUAL.format(pages=500, seed=1) + "private.madvise(mmap.MADV_MERGEABLE)")
    pids = [first.pid, second.pid]
    apart = survey(pids).total
    assert apart.between >= 500
    with ksm({"pages_to_scan": 5000, "sleep_millisecs": 10}):
        deadline = time.monotonic() + PATIENCE
        while ksm_counter("pages_sharing") < 500 and time.monotonic() < deadline:
            time.sleep(0.05)
        before = list(map(kernels_account, pids))
        estimate = survey(pids)
        assert list(map(kernels_account, pids)) == before
        agree(estimate, look_closely(pids))
    assert estimate.total.already_ksm == 500
    assert estimate.total.between == apart.between - 500


@pytest.mark.require("root", "userfaultfd-move")
def test_what_udedup_has_merged_is_shared_already(engine: Engine) -> None:
    """Its copy is one page frame, which counts once; agents' views of the store are nothing of the programs'."""
    program = (
        "import random, sys; held = random.Random(1).randbytes(1000 << 12); print(1, flush=True); sys.stdin.read()"
    )
    wrapped = [engine.wrap("/usr/bin/python3", "-c", program, stdin=-1, stdout=-1, text=True) for _ in range(3)]
    pids = [each.pid for each in wrapped]
    deadline = time.monotonic() + PATIENCE
    while (estimate := survey(pids)).total.already_udedup < 1900 and time.monotonic() < deadline:
        time.sleep(0.1)
    for each in wrapped:
        each.communicate()
    store, view = estimate.names[processes.STORE], estimate.names[processes.STORE_VIEW]
    assert store.already_udedup == estimate.total.already_udedup >= 1900
    assert store.frames >= 900
    assert view.already_udedup == 0
    assert view.frames < store.frames


def test_those_that_end_meanwhile(start: Start) -> None:
    first, second = start(), start()
    for subject in (first, second):
        subject.do(EQUAL.format(pages=40_000, seed=1))

    looked = 0

    def on_looked(pages: int) -> None:
        nonlocal looked
        looked += pages
        if looked > 20_000 and second.process.returncode is None:
            second.end()

    estimate = survey([first.pid, second.pid], on_looked=on_looked)
    assert [process.pid for process in estimate.processes] == [first.pid]
    assert [left.pid for left in estimate.left_out] == [second.pid]
    assert "ended" in estimate.left_out[0].reason

    def on_looked_first(pages: int) -> None:
        first.end()

    estimate = survey([first.pid], on_looked=on_looked_first)
    assert 0 < estimate.total.pages < 40_000
    with pytest.raises(UdedupError, match=f"process {first.pid} .* ended"):
        survey([first.pid])


def test_those_that_map_and_unmap_meanwhile(start: Start) -> None:
    subject = start()
    subject.do(
        """
def churn():
    while True:
        memory = anonymous(2000)
        memory[:] = b"x" * len(memory)
        memory.close()
threading.Thread(target=churn, daemon=True).start()
"""
    )
    for _ in range(30):
        total = survey([subject.pid], threads=2).total
        assert total.unreadable + total.zero + total.within <= total.frames
        assert total.saved <= total.frames


def test_nothing_of_the_kernels_own() -> None:
    """A zombie has no memory, and neither have threads of the kernel."""
    with subprocess.Popen(["true"]) as zombie:
        while b"\nState:\tZ" not in Path(f"/proc/{zombie.pid}/status").read_bytes():
            time.sleep(0.01)
        with pytest.raises(UdedupError, match="there are no processes to look at"):
            survey([zombie.pid])
