"""``udedup engine --metrics``: who may ask an engine, and what it says while it works."""

import http.client
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from support.engine import Engine, udedup
from support.users import NOBODY, as_nobody, open_way

PAGES = 500


class UnixConnection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


def scrape(connection: http.client.HTTPConnection) -> dict[str, list[Sample]]:
    """All samples by name."""
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(response.read().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


@pytest.mark.require("userfaultfd-move", "root")
def test_an_engine_at_work(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    """What its status says, of all programs."""
    path = tmp_path / "metrics"
    engine = engine_factory("--metrics", str(path), "--sleep-millisecs", "1", mount=False)
    program = f"import random, sys; held = random.Random(1).randbytes({PAGES} << 12); print(1); sys.stdin.read()"
    programs = [engine.wrap("/usr/bin/python3", "-c", program, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    status = engine.wait_until("merged", lambda status: status["pages_sharing"] > 0.9 * PAGES)
    found = scrape(UnixConnection(path))
    assert found["udedup_pages_sharing"][0].value > 0.9 * PAGES
    assert found["udedup_merged_pages_total"][0].value >= status["merges"]["pages"]
    assert found["udedup_agents"][0].value == 2
    of_programs = found["udedup_agent_pages_sharing"]
    assert {sample.labels["pid"] for sample in of_programs} == {str(program.pid) for program in programs}
    assert [sample.labels["command"] for sample in of_programs] == ["python3", "python3"]
    assert all(sample.value > 0.9 * PAGES for sample in of_programs)
    for each in programs:
        each.communicate()
    assert engine.stop() == 0
    assert not path.exists()
    assert engine.log.read_text() == ""


@pytest.mark.require("userfaultfd-move", "root")
def test_only_the_engines_user_may_ask(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    """And, if that is said, a group."""
    open_way(tmp_path)
    own, group = tmp_path / "own", tmp_path / "group"
    engine_factory("--metrics", str(own), mount=False)
    engine_factory("--metrics", str(group), "--metrics-group", str(NOBODY), mount=False)
    modes = [(path.stat().st_mode & 0o777, path.stat().st_gid) for path in (own, group)]
    assert modes == [(0o600, 0), (0o660, NOBODY)]
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    for path, allowed in ((own, False), (group, True)):
        command = [*as_nobody(), sys.executable, "-c", program, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == allowed, done.stderr
        assert allowed or "PermissionError" in done.stderr


@pytest.mark.require("userfaultfd-move", "root")
def test_a_port_of_this_machine(engine_factory: Callable[..., Engine]) -> None:
    with socket.socket() as sock:
        # Other programs hardly use any address but 127.0.0.1.
        sock.bind(("127.77.1.2", 0))
        port = sock.getsockname()[1]
    engine = engine_factory("--metrics", f"127.77.1.2:{port}", mount=False)
    assert "udedup_engine_info" in scrape(http.client.HTTPConnection("127.77.1.2", port, timeout=20))
    # Nowhere else does anybody listen.
    listening = [line.split()[1] for line in Path(f"/proc/{engine.pid}/net/tcp").read_text().splitlines()[1:]]
    assert {address for address in listening if address.endswith(f":{port:04X}")} == {f"02014D7F:{port:04X}"}


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (
            ("--metrics", "/none/metrics"),
            "no folder /none for the socket: No such file or directory; name another with --m",
        ),
        (("--metrics-group", "0"), "a group for the metrics is given, but no path of a socket"),
        (("--metrics", "9105", "--metrics-group", "0"), "a group for the metrics is given, but no path of a socket"),
    ],
)
@pytest.mark.require("userfaultfd-move")
def test_mistakes_are_one_line(tmp_path: Path, argv: tuple[str, ...], reason: str) -> None:
    done = udedup("engine", "--socket", tmp_path / "socket", *argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"udedup: {reason}")


@pytest.mark.require("userfaultfd-move")
def test_without_the_extra(tmp_path: Path) -> None:
    """As after `pip install udedup` alone; and an engine without metrics needs nothing of it."""
    program = (
        "import sys; sys.modules['h11'] = sys.modules['prometheus_client'] = None\n"
        "from udedup.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "engine", "--socket", str(tmp_path / "socket")]
    done = subprocess.run([*command, "--metrics", "9105"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "udedup: --metrics needs the Python package h11: pip install 'udedup[metrics]'\n"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        process.terminate()
