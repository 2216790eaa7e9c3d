"""Small parts: configuration, domains, lead times, what the kernel says, the control client without an engine."""

import gc
import json
import logging
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from udedup._native import ffi, lib
from udedup.engine import control, kernel, maplimit
from udedup.engine.accounting import LeadTimes
from udedup.engine.advisor import ScanTimeTarget
from udedup.engine.agent import _items
from udedup.engine.config import EngineConfig
from udedup.engine.domain import DomainRules
from udedup.engine.guests import CONNECT_SECONDS, LINES, LINES_SECONDS, REST_PER_WORK, WAIT_SECONDS, Guests
from udedup.engine.wire import HEADER, REPORT_BYTES, REPORTS_BYTES, SHARED_BYTES, AgentError, refusal
from udedup.errors import UdedupError

PAGE = 4096


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"policy": "magic"}, "magic"),
        ({"pages_to_scan": 0}, "at least 1"),
        ({"sleep_millisecs": -1}, "-1 ms"),
        ({"hint_runs": 0, "scan_runs": 0}, "0:0"),
        ({"hint_runs": -1}, "-1:1"),
        ({"scan_runs": 1001}, "at most 1000"),
        ({"hint_slots": 0}, "hint slots"),
        ({"advisor": ScanTimeTarget(), "sleep_millisecs": 0}, "a sleep of 0 ms"),
        ({"advisor": ScanTimeTarget(seconds=math.nan)}, "scan time is nan"),
        ({"advisor": ScanTimeTarget(max_cpu=0)}, "CPU limit is 0%"),
        ({"advisor": ScanTimeTarget(max_cpu=101)}, "CPU limit is 101%"),
        ({"advisor": ScanTimeTarget(min_pages_to_scan=2, max_pages_to_scan=1)}, "2 to 1, are no range"),
        ({"images": ((None, Path("/x")),)}, "mount"),
        ({"shared_domains": frozenset({"fleet"})}, "'fleet' is shared, but no user"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UdedupError, match=text):
        EngineConfig(**settings).check()


def test_default_settings_are_possible() -> None:
    EngineConfig().check()


@pytest.mark.parametrize(
    ("uid", "label", "allowed"),
    [
        (1000, "", True),
        (0, "x", True),
        (500, "x", True),
        (1000, "x", False),
        (1000, "a", True),
        (1001, "a", False),
        (1001, "private", True),
        (1001, "off", True),
    ],
)
def test_domain_rules(uid: int, label: str, allowed: bool) -> None:
    rules = DomainRules(500, frozenset({(1000, "a")}))
    assert rules.permits(uid, label) is allowed
    if not allowed:
        with pytest.raises(AgentError, match=f"'{label}' is not allowed for uid {uid}"):
            rules.key(uid, label, 1)


ALLOWED = frozenset({(1000, "a"), (1001, "a"), (1000, "fleet"), (1001, "fleet")})
RULES = DomainRules(500, ALLOWED, shared=frozenset({"fleet"}), unmapped_uid=65534)


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ((1000, "", 1), (1000, "", 2), True),
        ((1000, "", 1), (1001, "", 2), False),
        ((1000, "a", 1), (1000, "a", 2), True),
        ((1000, "a", 1), (1000, "", 2), False),
        ((1000, "a", 1), (1001, "a", 2), False),  # a label is not shared unless the configuration says so
        ((1000, "fleet", 1), (1001, "fleet", 2), True),
        ((1000, "fleet", 1), (0, "fleet", 2), False),  # root may use it, but is not among those who share it
        ((1000, "fleet", 1), (1000, "", 2), False),
        ((1000, "private", 1), (1000, "private", 2), False),
        ((65534, "", 1), (65534, "", 2), False),  # two users that the engine can't tell apart
    ],
)
def test_who_is_together(one: tuple[int, str, int], other: tuple[int, str, int], together: bool) -> None:
    assert (RULES.key(*one) == RULES.key(*other)) is together


def test_off_is_in_no_domain() -> None:
    with pytest.raises(AgentError, match="left alone"):
        RULES.key(1000, "off", 1)


def test_unmapped_users_are_known_as_such() -> None:
    """The kernel shows everybody outside an engine's user namespace as the same uid."""
    program = "from udedup.engine.domain import unmapped_uid; print(unmapped_uid())"
    inside = [sys.executable, "-c", program]
    assert subprocess.run(inside, capture_output=True, text=True, check=True).stdout == "None\n"
    done = subprocess.run(["unshare", "--map-root-user", *inside], capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no user namespaces: {done.stderr}")
    assert done.stdout.strip() == Path("/proc/sys/kernel/overflowuid").read_text().strip()


async def test_time_of_users_is_shared_out(autojump_clock: trio.testing.MockClock) -> None:
    """Each has a fifth of the engine's time, whatever others do; who would wait for long is turned away at once."""
    guests = Guests(own=frozenset({0}), connections_max=100)
    assert [await guests.turn(0, 1.0) for _ in range(100)] == [True] * 100
    assert trio.current_time() == 0
    done = {1000: 0, 1001: 0}
    async with trio.open_nursery() as nursery:

        async def act(uid: int) -> None:
            while trio.current_time() < 9.99:
                if await guests.turn(uid, 0.01):
                    done[uid] += 1
                else:
                    await trio.sleep(0.001)

        for _ in range(50):
            nursery.start_soon(act, 1000)
        nursery.start_soon(act, 1001)
    assert 200 <= done[1000] <= 225
    assert 200 <= done[1001] <= 202
    began = trio.current_time()
    answers = []
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            answers.append(await guests.turn(1002, 0.1))

        for _ in range(10):
            nursery.start_soon(ask)
    assert sorted(answers) == [False] * 7 + [True] * 3
    assert trio.current_time() - began == 1.0


async def test_connections_of_users() -> None:
    guests = Guests(own=frozenset({0}), connections_max=8)
    for _ in range(2):
        assert guests.comes(1000)
        guests.check_room(1000)
    assert guests.comes(1000)
    with pytest.raises(AgentError, match="2 connections of uid 1000"):
        guests.check_room(1000)
    for _ in range(6):
        assert guests.comes(0)
        guests.check_room(0)
    assert guests.comes(0)
    with pytest.raises(AgentError, match="8 connections already"):
        guests.check_room(0)
    guests.goes(1000)
    guests.goes(1000)
    guests.check_room(0)


async def test_connections_that_come_to_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """They take no more than a part of the engine's time; others connect as before."""
    guests = Guests(own=frozenset({0}), connections_max=8)
    taken = 0
    began = trio.current_time()
    while trio.current_time() - began < 10:
        for _ in range(5):
            if guests.comes(1000):
                taken += 1
                guests.goes(1000)
        assert guests.comes(0)
        guests.goes(0)
        await trio.sleep(0.001)
    assert guests.comes(1001)
    assert taken * CONNECT_SECONDS <= (10 + WAIT_SECONDS) / (1 + REST_PER_WORK) + CONNECT_SECONDS


async def test_lines_about_one_user(autojump_clock: trio.testing.MockClock) -> None:
    guests = Guests(own=frozenset({0}), connections_max=8)
    for _ in range(2):
        levels = [guests.heard_of(1000) for _ in range(50)]
        assert levels == [logging.WARNING] * LINES + [logging.DEBUG] * (50 - LINES)
        assert guests.heard_of(1001) == guests.heard_of(0) == logging.WARNING
        await trio.sleep(LINES_SECONDS + 1)


def test_layout_of_the_shared_area() -> None:
    """The parts lie one after the other and fit."""
    parts = [
        (lib.UDD_SHARED_STATS, ffi.sizeof("struct udd_stats")),
        (lib.UDD_SHARED_HINTS, ffi.sizeof("struct udd_hint_ring")),
        (lib.UDD_SHARED_DROPS, ffi.sizeof("struct udd_drop_ring")),
        (lib.UDD_SHARED_COPY, lib.UDD_COPY_SLOTS * PAGE),
    ]
    ends = [start + size for start, size in parts]
    starts = [start for start, _ in parts[1:]] + [SHARED_BYTES]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert all(start % PAGE == 0 for start, _ in parts)
    assert HEADER.size == ffi.sizeof("struct udd_header")
    # One copy for each report of an answer, and those of one UDD_COPY.
    assert max(lib.UDD_REPORTS_MAX, lib.UDD_COPY_MAX) <= lib.UDD_COPY_SLOTS


def told(reason: str) -> str:
    """What arrives of a reason."""
    message = refusal(lib.UDD_BYE, reason)
    assert len(message) == ffi.sizeof("struct udd_refused")
    assert message[-1] == 0
    return message[HEADER.size :].rstrip(b"\0").decode()


@given(st.text(st.sampled_from("aä… "), min_size=60, max_size=200).map(str.strip))
def test_long_reasons_are_cut_between_words(reason: str) -> None:
    text = told(reason)
    if len(reason.encode()) < lib.UDD_REASON_MAX:
        assert text == reason
    else:
        assert text.endswith(" …")
        assert reason.startswith(text.removesuffix(" …"))
        assert " " not in reason[:60] or reason[len(text) - 2] == " "


@pytest.mark.parametrize(
    ("uid", "label", "text"),
    [
        (1000, "web", "under [domains] in udedup.toml or with --allow-domain 1000:web"),
        (65534, "customer-0815", "allow it under [domains] in udedup.toml or with --allow-domain …"),
        (0xFFFFFFFE, "x" * 63, "xxx' is not allowed for uid 4294967294: allow it …"),
    ],
)
def test_refused_labels_say_what_matters(uid: int, label: str, text: str) -> None:
    """As far as there is room, which is not much."""
    assert told(DomainRules(500, frozenset()).explain(uid, label)).endswith(text)


# ---- lead times ----


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_percentiles(nanoseconds: list[int], fraction: float) -> None:
    """At most a quarter above the true value, never below it."""
    times = LeadTimes()
    run, result = ffi.new("struct udd_run[1]"), ffi.new("struct udd_merge_result[1]")
    run[0].pages, result[0].merged = 1, 1
    hinted = ffi.new("struct udd_hinted[1]")
    for lead in nanoseconds:
        hinted[0].nanoseconds = 10**13 - lead
        lib.udd_hinted_leads(hinted, 1, run, result, 1, 10**13, times.histogram)
    ordered = sorted(nanoseconds)
    true = next(value for rank, value in enumerate(ordered, 1) if rank >= fraction * len(ordered)) / 1e9
    found = times.percentile(fraction)
    assert found is not None
    assert true < found <= 1.25 * true + 1e-9


def test_percentiles_of_nothing() -> None:
    assert LeadTimes().percentile(0.5) is None


# ---- the kernel's numbers ----


def store_mapping(pages: int, name: str = "udedup-store-1") -> tuple[int, mmap.mmap]:
    """A memfd like a segment, mapped private and read."""
    descriptor = os.memfd_create(name)
    os.write(descriptor, os.urandom(pages * PAGE))
    mapping = mmap.mmap(descriptor, pages * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert sum(mapping[i * PAGE] for i in range(pages)) >= 0
    return descriptor, mapping


def test_smaps_of_ourselves() -> None:
    before = kernel.read_smaps(None)
    first, merged = store_mapping(100)
    second, other = store_mapping(100, "something-else")
    comparing = mmap.mmap(first, 100 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    assert sum(comparing[i * PAGE] for i in range(100)) >= 0
    merged[0] = 1
    after = kernel.read_smaps(os.getpid())
    assert after.merged_rss - before.merged_rss == 100 * PAGE
    assert after.merged_anonymous - before.merged_anonymous == PAGE
    assert after.store_pss - before.store_pss == 101 * PAGE
    for mapping in (merged, other, comparing):
        mapping.close()
    os.close(first)
    os.close(second)


def test_own_smaps_are_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often somebody asks."""
    now = 0.0
    monkeypatch.setattr(kernel.time, "monotonic", lambda: now)
    own = kernel.OwnSmaps()
    first = own.look()
    descriptor, mapping = store_mapping(100)
    now = kernel.OWN_SECONDS
    assert own.look() is first
    now += 0.1
    assert own.look().store_pss - first.store_pss == 100 * PAGE
    mapping.close()
    os.close(descriptor)


def sums(*, merged: int = 0, anonymous: int = 0, store: int = 0, private: int = 0) -> kernel.Smaps:
    """Numbers of one process, in pages."""
    return kernel.Smaps(
        pss=(store + private) * PAGE,
        store_pss=store * PAGE,
        merged_rss=merged * PAGE,
        merged_anonymous=anonymous * PAGE,
    )


def test_saved_by_the_kernels_account() -> None:
    """Two processes that share 100 pages, of which each has written to 10 of its own, save what they still share."""
    agents = tuple(sums(merged=100, anonymous=10, store=50 + 10, private=7) for _ in range(2))
    view = kernel.KernelView(engine=sums(private=3), agents=agents, unreadable=0)
    assert view.saved == (90 + 90 - 100) * PAGE
    assert view.pss == (2 * 67 + 3) * PAGE


def test_missing_processes_are_counted() -> None:
    assert kernel.look([2**22 + 1]).unreadable == 1
    with pytest.raises(OSError, match="No such file"):
        kernel.read_smaps(2**22 + 1)


# ---- mapping limit ----


def test_mapping_limit_leaves_a_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "max_map_count"
    setting.write_text("65530\n")
    monkeypatch.setattr(maplimit, "MAX_MAP_COUNT", setting)
    assert maplimit.vma_limit() == 61435
    with maplimit.raised(1_000_000):
        assert setting.read_text() == "1000000\n"
    assert setting.read_text() == "65530\n"
    with maplimit.raised(100):
        assert setting.read_text() == "65530\n"
    with maplimit.raised(None):
        assert setting.read_text() == "65530\n"


# ---- the control client ----


def answered(path: Path, packets: list[bytes]) -> Any:
    """What the client makes of these packets."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                for packet in packets:
                    connection.send(packet)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return control.request(path, {"op": "status"}, seconds=5)
        finally:
            thread.join()


def test_answer_in_parts(socket_path: Path) -> None:
    raw = json.dumps({"ok": True, "result": list(range(1000))}).encode()
    assert answered(socket_path, [b"+" + raw[:100], b"+" + raw[100:200], b"." + raw[200:]]) == list(range(1000))


@pytest.mark.parametrize(
    ("packets", "text"),
    [
        ([b'.{"ok": false, "error": "no such thing"}'], "no such thing"),
        ([b".not json"], "does not answer like an engine"),
        ([b'.["ok"]'], "does not answer like an engine"),
        ([b'.{"fine": 1}'], "does not answer like an engine"),
        ([b'+{"ok": true'], "closed the connection"),
        ([], "closed the connection"),
    ],
)
def test_bad_answers(socket_path: Path, packets: list[bytes], text: str) -> None:
    with pytest.raises(UdedupError, match=text) as caught:
        answered(socket_path, packets)
    assert "\n" not in str(caught.value)


def test_no_engine(socket_path: Path) -> None:
    with pytest.raises(UdedupError, match="no engine listens at"):
        control.request(socket_path, {"op": "status"})


def test_a_name_too_long_for_a_socket() -> None:
    with pytest.raises(UdedupError, match="failed"):
        control.request(Path("/" + "x" * 200), {"op": "status"})


def test_the_client_starts_fast() -> None:
    """`udedup run` pays for every import."""
    import subprocess
    import sys

    code = "import sys, udedup.engine.control; print(*sorted({'trio', 'msgspec', 'attr', 'cffi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_what_was_received_may_become_garbage_in_a_cycle() -> None:
    """As it does when an agent leaves in the middle of a request: a memoryview of it would end the engine."""
    garbage: list[object] = []
    garbage += [_items(bytes(REPORTS_BYTES + REPORT_BYTES), "struct udd_report *", REPORTS_BYTES), garbage]
    del garbage
    assert gc.collect() > 0
