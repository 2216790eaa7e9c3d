"""The sampler sees equal and shared pages for what they are, whoever made them so."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from record.conftest import Holder

from udedup.record.kernel import KSM, ksm, ksm_counter
from udedup.record.sampler import PAGE, Sampler

PAGES = 500
NOISE = 60
"""Pages of the interpreters themselves that may change between two samples."""

MERGE_SECONDS = 30.0

pytestmark = pytest.mark.require("root")

Hold = Callable[[], Holder]


def near(value: int, wanted: int) -> bool:
    return abs(value - wanted) <= NOISE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk with what holders hold after ``fill`` with seed 1."""
    path = tmp_path / "image"
    path.write_bytes(random.Random("1").randbytes(PAGES * PAGE))
    return path


def test_equal_pages_are_opportunities(hold: Hold, image: Path) -> None:
    first, second = hold(), hold()
    pids = [first.pid, second.pid]
    for holder in (first, second):
        holder.tell("zero", 0, 1)  # now the interpreter has settled
    sampler = Sampler()
    sampler.know(image)
    before = sampler.take(pids, 1.0)
    first.tell("fill", 0, PAGES, 1)
    alone = sampler.take(pids, 2.0)
    second.tell("fill", 100, PAGES, 1)
    both = sampler.take(pids, 3.0)
    assert near(alone.present - before.present, PAGES)
    assert near(alone.opportunity - before.opportunity, 0)
    assert near(both.opportunity - alone.opportunity, PAGES)
    assert alone.known_opportunities == 0
    assert both.known_opportunities == 2 * PAGES
    assert both.known_merges == 0


def test_zero_pages_are_counted_apart(hold: Hold) -> None:
    holder = hold()
    holder.tell("fill", 0, PAGES, 1)
    sampler = Sampler()
    before = sampler.take([holder.pid], 1.0)
    holder.tell("zero", 0, PAGES)
    after = sampler.take([holder.pid], 2.0)
    assert near(after.zero_pages - before.zero_pages, PAGES)
    assert near(after.opportunity - before.opportunity, 0)


def test_content_that_changes_is_a_new_opportunity(hold: Hold, image: Path) -> None:
    first, second = hold(), hold()
    pids = [first.pid, second.pid]
    sampler = Sampler()
    sampler.know(image)
    for holder in (first, second):
        holder.tell("fill", 0, PAGES, 1)
    assert sampler.take(pids, 1.0).known_opportunities == 2 * PAGES
    first.tell("fill", 0, PAGES, 2)
    assert sampler.take(pids, 2.0).known_opportunities == 2 * PAGES
    first.tell("fill", 0, PAGES, 1)
    assert sampler.take(pids, 3.0).known_opportunities == 4 * PAGES


def test_frames_shared_by_a_fork_are_merged_at_once(hold: Hold, image: Path) -> None:
    holder = hold()
    holder.tell("fill", 0, PAGES, 1)
    sampler = Sampler()
    sampler.know(image)
    alone = sampler.take([holder.pid], 1.0)
    assert alone.sharing == 0
    # Both halves of the fork answer.
    who = {holder.tell("fork"), int(holder.process.stdout.readline())}  # type: ignore[union-attr]
    both = sampler.take(sorted(who), 2.0)
    assert both.sharing >= PAGES
    assert both.shared >= PAGES
    assert both.known_merges == both.known_merges_at_once == 2 * PAGES
    # Others are pages of the interpreter that were equal before.
    assert list(sampler.latencies()).count(1.0) >= 2 * PAGES


def test_a_process_that_is_gone_has_no_pages(hold: Hold) -> None:
    holder = hold()
    holder.tell("fill", 0, PAGES, 1)
    sampler = Sampler()
    assert sampler.take([holder.pid], 1.0).present > PAGES
    holder.end()
    assert sampler.take([holder.pid], 2.0).present == 0


def test_what_ksm_merges(hold: Hold, image: Path) -> None:
    """Latency is counted from the last sample without the opportunity; KSM is as it was afterwards."""
    first, second = hold(), hold()
    pids = [first.pid, second.pid]
    sampler = Sampler()
    sampler.know(image)
    sampler.take(pids, 1.0)
    for holder in (first, second):
        holder.tell("fill", 0, PAGES, 1)
        holder.tell("mergeable", 0, PAGES)
    waiting = sampler.take(pids, 2.0)
    assert waiting.known_opportunities == 2 * PAGES
    assert waiting.known_merges == 0
    settings = {path.name: path.read_text() for path in KSM.iterdir() if path.name in ("pages_to_scan", "run")}
    with ksm({"pages_to_scan": 5000, "sleep_millisecs": 1}):
        deadline = time.monotonic() + MERGE_SECONDS
        while ksm_counter("pages_sharing") < PAGES and time.monotonic() < deadline:
            time.sleep(0.05)
        merged = sampler.take(pids, 7.0)
        assert merged.known_merges == 2 * PAGES
        assert merged.known_merges_at_once == 0
        assert merged.sharing - waiting.sharing >= PAGES
        assert set(sampler.latencies()) == {6.0}
    assert {name: (KSM / name).read_text() for name in settings} == settings
    apart = sampler.take(pids, 8.0)
    assert apart.sharing <= waiting.sharing + NOISE
