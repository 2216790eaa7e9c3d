"""``udedup estimate`` as users have it: what it prints, whom it may look at, and what is wrong usage."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.cgroup import memory_controller
from support.engine import UDEDUP, udedup
from support.users import NOBODY, as_nobody, as_user, open_way

PAGE = 4096
PAGES = 1000
PROGRAM = """
import mmap, random, sys
held = mmap.mmap(-1, {pages} * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
numbers = random.Random({seed})
for page in range({pages}):
    held[page * 4096 : page * 4096 + 4096] = numbers.randbytes(4096)
print(1, flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(*prefix: str, seed: int = 1, pages: int = PAGES, arguments: tuple[str, ...] = ()) -> Iterator[int]:
    """A process with random pages; its id."""
    program = PROGRAM.format(seed=seed, pages=pages)
    command = [*prefix, "/usr/bin/python3", "-c", program, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.mark.require("root")
def test_tables(tmp_path: Path) -> None:
    with holding() as one, holding() as other:
        done = udedup("estimate", one, other, "--top", 3)
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout.splitlines()[0]
    assert re.fullmatch(r"could be saved now: [\d.]+ MiB of [\d.]+ MiB \([\d.]+%\), the memory of 2 processes", first)
    assert "processes: 2 of 2" in done.stdout
    assert re.search(r"mappings by name: 3 of \d+", done.stdout)
    assert "confidence" not in done.stdout
    assert "only root" not in done.stdout
    assert f"{other} " in done.stdout


@pytest.mark.require("root")
def test_json_and_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    with holding() as one, holding(arguments=(evil,)) as other:
        done = udedup("estimate", "--json", "--html", tmp_path / "page.html", "--jobs", 0, one, other)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    total = found["total"]
    assert found["page_bytes"] == PAGE
    assert found["saved"] == found["saved_least"] == found["saved_most"]
    assert found["saved"] == pytest.approx(total["zero"] + total["within"] + total["between"], abs=1)
    assert PAGES <= total["between"] < 2 * PAGES
    assert {process["pid"] for process in found["processes"]} == {one, other}
    assert sum(found["kinds"].values()) == pytest.approx(total["within"] + total["between"], abs=1)
    assert (found["left_out"], found["sample"], found["confidence"]) == ([], 1.0, 1.0)
    check_page((tmp_path / "page.html").read_text(), evil)


class Tags(HTMLParser):
    """Opened and closed in order, and where they lead."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str, evil: str) -> None:
    """It is whole, has pictures, and loads and runs nothing, whatever programs call themselves."""
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert {"svg", "rect", "table", "h1"} <= set(tags.seen)
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert not {"src", "href"} & set(tags.attributes)
    assert evil not in text
    assert "&lt;script&gt;" in text


@pytest.mark.require("root")
def test_sample() -> None:
    with holding(pages=4 * PAGES) as one, holding(pages=4 * PAGES) as other:
        done = udedup("estimate", "--json", "--sample", "50%", one, other)
        shown = udedup("estimate", "--sample", "50", one, other)
    found = json.loads(done.stdout)
    assert found["sample"] == 0.5
    assert 0.4 < found["sampled"] / (found["total"]["pages"] - found["total"]["already"]) < 0.6
    assert found["saved_least"] <= found["saved"] <= found["saved_most"]
    assert found["saved_least"] < 4.5 * PAGES
    assert found["saved_most"] > 4 * PAGES
    assert re.search(r"\nbetween [\d.]+ MiB and [\d.]+ MiB with 95% confidence", shown.stdout)


@pytest.mark.require("root", "qemu-utils")
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_images(tmp_path: Path, format_: str) -> None:
    """Memory that is equal to blocks of an image, whose digests may have been kept already."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"".join(bytes([1 + number]) * PAGE for number in range(100)) + bytes(50 * PAGE))
    image = tmp_path / f"disk.{format_}"
    if format_ != "raw":
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format_, disk, image], check=True)
    program = f"""
import mmap, sys
held = mmap.mmap(-1, 100 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held[:] = open({str(disk)!r}, "rb").read(409600)
print(1, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        results = []
        for _ in range(2):
            done = udedup("estimate", "--json", "--image", image, process.pid)
            assert (done.returncode, done.stderr) == (0, "")
            results.append(json.loads(done.stdout))
            assert udedup("index", image).returncode == 0
        shown = udedup("estimate", "--image", image, process.pid).stdout
        bad = udedup("estimate", "--image", tmp_path / "none", process.pid)
        process.stdin.close()
    # File cache of the disk is no memory of the process; what it holds is in a hundred pages of its own.
    for found in results:
        assert found["images"] == {str(image): 100}
        assert found["total"]["known"] == pytest.approx(100, abs=5)
    assert "equal to blocks of images" in shown
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)
    assert "No such file" in bad.stderr


@pytest.mark.require("root")
def test_without_root(tmp_path: Path) -> None:
    """Page frames are not shown, and other users' processes are left out with a line each."""
    open_way(Path(sys.executable).resolve().parent)
    page = tmp_path / "page.html"
    page.touch()
    page.chmod(0o666)
    open_way(tmp_path)
    with holding(*as_user(NOBODY)) as own, holding() as roots:
        command = [*as_nobody(), *UDEDUP, "estimate", "--json", "--html", str(page), str(own), str(roots)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        command = [*as_nobody(), *UDEDUP, "estimate", str(roots)]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        command = [*as_nobody(), *UDEDUP, "estimate", str(own)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"udedup: process {roots} (/usr/bin/python3 ")
    assert done.stderr.count("\n") == 1
    found = json.loads(done.stdout)
    assert [process["pid"] for process in found["processes"]] == [own]
    assert found["page_frames"] is False
    assert found["total"]["pages"] - found["total"]["already"] >= PAGES
    assert [left["pid"] for left in found["left_out"]] == [roots]
    assert page.stat().st_size > 1000
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "not for this user to read" in refused.stderr
    assert "only root sees" in shown.stdout


@pytest.mark.require("root", "memory-groups")
def test_control_group() -> None:
    controller = memory_controller()
    assert controller is not None
    group = controller.folder / f"udedup-test-{os.getpid()}"
    (group / "below").mkdir(parents=True)
    try:
        with holding() as one, holding() as other:
            (group / "cgroup.procs").write_text(str(one))
            (group / "below" / "cgroup.procs").write_text(str(other))
            done = udedup("estimate", "--json", "--cgroup", group)
        assert {process["pid"] for process in json.loads(done.stdout)["processes"]} == {one, other}
        empty = udedup("estimate", "--cgroup", group)
        assert (empty.returncode, empty.stderr) == (1, "udedup: there are no processes to look at\n")
    finally:
        (group / "below").rmdir()
        group.rmdir()
    done = udedup("estimate", "--cgroup", "/no/such")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("udedup: no control group /sys/fs/cgroup/no/such")


def test_all_processes() -> None:
    with holding() as one:
        done = udedup("estimate", "--all", "--json", "--sample", "5%")
        assert done.returncode == 0
        assert one in {process["pid"] for process in json.loads(done.stdout)["processes"]}


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--all", "1"),
        ("--all", "--cgroup", "a"),
        ("--cgroup", "a", "1"),
        ("0",),
        ("x",),
        ("--sample", "0", "1"),
        ("--sample", "101%", "1"),
        ("--sample", "nan", "1"),
        ("--sample", "much", "1"),
        ("--jobs", "-1", "1"),
    ],
)
def test_wrong_usage(argv: tuple[str, ...]) -> None:
    done = udedup("estimate", *argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_what_is_not_there(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    done = udedup("estimate", ended.pid)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"udedup: process {ended.pid} (?): has ended meanwhile\n"
    with holding() as one:
        done = udedup("estimate", "--html", tmp_path / "none" / "page.html", one)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "can't be written" in done.stderr


def test_interrupted() -> None:
    """Ctrl-C while it looks ends it without a word."""
    with holding(pages=50 * PAGES) as one:
        for _ in range(10):
            command = [*UDEDUP, "estimate", str(one)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and f"/proc/{one}/pagemap" not in open_files(process.pid):
                pass
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
            assert errors == ""
            if process.returncode:
                break
        assert process.returncode == 130


def open_files(pid: int) -> set[str]:
    """What a process has open that may end, or close it, meanwhile."""
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(str(link.readlink()))
    return found


def test_progress_is_for_terminals() -> None:
    with holding() as one:
        done = subprocess.run(
            ["script", "-qec", " ".join([*UDEDUP, "estimate", str(one)]), "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    assert "memory" in done.stdout
