"""Lines of the screen, for several sizes of it."""

import pytest
from rich.cells import cell_len
from support.statuses import Busy, agent, image, status

from udedup.engine import accounting
from udedup.engine.accounting import Status
from udedup.top.rates import between
from udedup.top.screen import BARS, KEYS, Frame, gauge, layout, once, rows_of, screen, sparkline
from udedup.top.view import Deed, View, fitted

SIZES = [(80, 24), (120, 50), (200, 110), (40, 12), (20, 5), (10, 3), (1, 1), (300, 8)]


def frame_of(now: Status, before: Status | None = None, **changes: object) -> Frame:
    rates = None if before is None else between(before, now)
    return Frame(now, rates, **{"saved": (now.bytes_saved,), "interval": 2.0, **changes})  # type: ignore[arg-type]


def shown(frame: Frame, view: View, columns: int = 120, lines: int = 40) -> list[str]:
    rows = rows_of(frame, view)
    view = fitted(view, rows, layout(lines, len(rows), len(frame.status.images)).agents)
    return [line.plain for line in screen(frame, view, rows, columns, lines)]


@pytest.mark.parametrize(("columns", "lines"), SIZES)
@pytest.mark.parametrize("agents", [0, 1, 100])
@pytest.mark.parametrize("images", [0, 1, 40])
def test_it_fills_the_screen_and_no_more(columns: int, lines: int, agents: int, images: int) -> None:
    busy = Busy(agents, images)
    before, now = busy(), busy()
    for frame in (frame_of(now), frame_of(now, before), frame_of(now, before, saved=range(1000), notice="no " * 99)):
        for view in (View(), View(pid=1000 + agents - 1), View(question=Deed("unmerge", 1))):
            text = shown(frame, view, columns, lines)
            assert [cell_len(line) for line in text] == [columns] * lines


def test_each_line_of_the_head() -> None:
    now = status(
        uptime_seconds=3725.0,
        pages_shared=1234,
        pages_sharing=5678,
        bytes_saved=100 << 20,
        general_profit=90 << 20,
        pages_scanned=25_000,
        hints=accounting.HintStatus(place=100, content=20, dropped=10, visited=0, merged=0, waiting=1 << 17),
        limits=accounting.LimitStatus(sleep_millisecs=20, cpu_percent=70.0, hint_slots=1 << 18, vmas=61436),
        cpu_seconds=accounting.CpuStatus(engine=0.5, agents=0.05),
        agents=[agent(1), agent(2, merging=False)],
    )
    frame = frame_of(now, status(uptime_seconds=3715.0), saved=(0, 50 << 20, 100 << 20))
    assert [line.rstrip() for line in shown(frame, View())[:7]] == [
        "udedup  engine 4711 at /run/udedup.sock, policy xlh, up 1:02:05",
        "saved   100.0 MiB  profit 90.0 MiB  store 0 B  udedup itself 30.0 MiB",
        "        ▁▄█ 0:04, most 100.0 MiB",
        "pages   shared 1,234  sharing 5,678  zero 0  unshared 0  volatile 0",
        "rates   scanned 2,500/s of 50,000  merged 0/s  breaks 0/s  pressure none",
        "hints   [||||||||||          ] 131,072 of 262,144 waiting  given 12.0/s  dropped 1.0/s",
        "cpu     engine 5.0%  agents 0.5%  of at most 70%  processes 2, active 1  mappings at most 61,436",
    ]
    unlimited = accounting.LimitStatus(sleep_millisecs=0, cpu_percent=None, hint_slots=1, vmas=1)
    assert "scanned -/s of no limit" in shown(frame_of(status(limits=unlimited)), View())[4]


def test_a_low_screen_has_processes_all_the_same() -> None:
    frame = frame_of(status(agents=[agent(n) for n in range(1, 30)]))
    text = shown(frame, View(), 80, 10)
    assert [line.split()[:1] for line in text[:4]] == [["udedup"], ["saved"], [], ["PID"]]
    assert sum("worker-" in line for line in text) == 4


def test_processes_and_why_they_do_not_merge() -> None:
    agents = [
        agent(1),
        agent(2, merging=False, reason="a discard came past libc"),
        agent(3, merging=False, paused=True, reason="paused on request"),
        agent(4, merging=False),
    ]
    before = status(agents=[agent(1)])
    text = shown(frame_of(status(uptime_seconds=102.0, agents=agents), before), View(sort="pid", backwards=True))
    words = [" ".join(line.split()) for line in text[8:13]]
    assert words == [
        "PID UID DOMAIN SHARED ZERO BREAKS/S VMAS CPU% COMMAND STATE",
        "1 1000 1000 1.0 MiB 4.0 KiB 0 101 0 worker-1 active",
        "2 1000 1000 2.0 MiB 8.0 KiB - 102 - worker-2 not merging: a discard came past libc",
        "3 1000 1000 3.0 MiB 12.0 KiB - 103 - worker-3 paused on request",
        "4 1000 1000 4.0 MiB 16.0 KiB - 104 - worker-4 not merging",
    ]


def test_images() -> None:
    before = status(images=[image("a", blocks_read=10), image("b"), image("new")])
    now = status(
        uptime_seconds=102.0,
        images=[image("a", blocks_read=12), image("b", blocks_read=400, blocks_served=300), image("new")],
    )
    text = [" ".join(line.split()) for line in shown(frame_of(now, before), View())]
    at = text.index("IMAGE FORMAT SIZE READS/S FROM STORE")
    assert text[at + 1 : at + 4] == ["b raw 1.0 GiB 200 75%", "a raw 1.0 GiB 1.0 0%", "new raw 1.0 GiB 0 -"]


def test_the_selected_row_is_shown_in_reverse_and_at_length() -> None:
    long = "not enough of something or other " * 5
    frame = frame_of(status(agents=[agent(7, merging=False, reason=long), agent(8)]))
    rows = rows_of(frame, View(pid=7))
    lines = screen(frame, View(pid=7), rows, 250, 30)
    (marked,) = [line for line in lines if line.style == "reverse"]
    assert marked.plain.split()[0] == "7"
    assert lines[-2].plain.startswith(f"7 worker-7: not merging: {long}; 10 runs, 0 pages broken, 7 hints")
    # What is too long ends with an ellipsis in the table.
    assert any("…" in line for line in shown(frame, View(), 80))


def test_the_last_line() -> None:
    frame = frame_of(status())
    assert shown(frame, View())[-1].rstrip() == KEYS
    assert shown(frame, View(remark="did it"))[-1].rstrip() == "did it"
    assert shown(frame, View(question=Deed("unmerge", 5)))[-1].rstrip() == "unmerge 5? y/n"
    assert shown(frame_of(status(), notice="gone"), View(remark="did it"))[-1].rstrip() == "gone"


def test_nothing_shown_says_anything_to_the_terminal() -> None:
    evil = "\x1b[2J\x9b\r\n\a"
    frame = frame_of(
        status(agents=[agent(1, command=evil, domain=evil, merging=False, reason=evil)], images=[image(evil)])
    )
    for line in [*shown(frame, View(pid=1)), *once(frame, View()), *shown(frame_of(status(), notice=evil), View())]:
        assert line.isprintable()


def test_wide_characters_keep_the_columns() -> None:
    frame = frame_of(status(agents=[agent(1, command="計算機" * 20), agent(2)]))
    first, second = (line for line in shown(frame, View(), 90)[9:] if "active" in line)
    assert cell_len(first.partition("active")[0]) == cell_len(second.partition("active")[0])


def test_once_has_everything_and_cuts_nothing() -> None:
    busy = Busy(100, 50)
    before, now = busy(), busy()
    text = once(frame_of(now, before), View(sort="cpu"))
    assert sum("worker-" in line for line in text) == 100
    assert sum(line.startswith("disk") for line in text) == 50
    assert not any("…" in line or "\x1b" in line for line in text)
    assert "scanned 20,000/s of 50,000" in "\n".join(text)
    long = frame_of(status(agents=[agent(1, command="x" * 300)]))
    assert any("x" * 300 in line for line in once(long, View()))


@pytest.mark.parametrize(
    ("values", "bars"),
    [((), ""), ((0,), "▁"), ((0, 0), "▁▁"), ((7,), "█"), ((0, 1, 7), "▁▂█"), ((-5, 10), "▁█"), (range(8), BARS)],
)
def test_sparkline(values: tuple[int, ...], bars: str) -> None:
    assert sparkline(values) == bars


def test_gauge() -> None:
    assert gauge(0, 100) == " " * 20
    assert gauge(1, 1 << 20).count("|") == 1
    assert gauge(50, 100).count("|") == 10
    assert gauge(300, 100) == "|" * 20
