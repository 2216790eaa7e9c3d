"""The engine's log in both formats, and its state on SIGUSR1."""

import json
import logging
import re
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.test_reload import wait_for, write
from support.engine import Engine, udedup

from udedup.commands.logs import JsonFormatter

pytestmark = pytest.mark.require("userfaultfd-move", "root")


def test_entries() -> None:
    try:
        int("two\nlines")
    except ValueError:
        record = logging.LogRecord("udedup.x", logging.WARNING, "x.py", 1, "%s “%d”", ("a\n", 5), sys.exc_info())
    record.created, record.msecs = 1700000000.25, 250.0
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("exception").endswith("ValueError: invalid literal for int() with base 10: 'two\\nlines'")
    assert entry == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "udedup.x",
        "message": "a\n “5”",
    }


def entries(engine: Engine) -> list[dict[str, str]]:
    return [json.loads(line) for line in engine.log.read_text().splitlines()]


def test_a_log_of_objects(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    file = write(tmp_path / "udedup.toml", "[engine]\nlog-format = 'json'\n")
    engine = engine_factory("--config", str(file), mount=False)
    write(file, "[engine]\nlog-format = 'json'\nlog-level = 'debug'\npolicy = 'linear'\n")
    engine.process.send_signal(signal.SIGHUP)
    wait_for(engine, "can't change")
    engine.wrap(sys.executable, "-c", "print()").wait(30)
    wait_for(engine, "left")
    # The settings say how the lines look that follow.
    write(file, "[engine]\nlog-level = 'debug'\npages-to-scan = 70\n")
    before = entries(engine)
    engine.process.send_signal(signal.SIGHUP)
    wait_for(engine, "udedup: settings changed: pages-to-scan\n")
    found = {(entry["level"], entry["logger"]) for entry in before}
    assert {("warning", "udedup.engine.reload"), ("debug", "udedup.engine.server")} <= found
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"]) for entry in before)
    assert engine.stop() == 0


def test_a_failure_is_in_the_logs_format(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    done = udedup("engine", "--socket", long, "--log-format", "json")
    assert (done.returncode, done.stdout) == (1, "")
    entry = json.loads(done.stderr)
    assert (entry["level"], str(long) in entry["message"]) == ("critical", True)
    text = udedup("engine", "--socket", long)
    assert (text.returncode, text.stderr) == (1, f"udedup: {entry['message']}\n")


def test_sigusr1_writes_the_state(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    engine = engine_factory(mount=False)
    path = engine.socket.parent / "state" / "status.json"
    program = engine.wrap(sys.executable, "-c", "import time; time.sleep(100)")
    try:
        engine.wait_until("joined", lambda status: bool(status["agents"]))
        # Nobody gets through to it any more.
        engine.socket.unlink()
        engine.process.send_signal(signal.SIGUSR1)
        wait_for(engine, f"udedup: the engine's state is in {path}\n")
        dumped = json.loads(path.read_text())
        assert dumped["pid"] == engine.pid
        assert [agent["pid"] for agent in dumped["agents"]] == [program.pid]
        assert dumped["kernel"]["pss_bytes"] > 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    finally:
        program.kill()
        program.wait()


def test_sigusr1_where_nothing_can_be_written(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = engine_factory("--state-dir", str(tmp_path / "file" / "state"), mount=False)
    engine.process.send_signal(signal.SIGUSR1)
    wait_for(
        engine, f"udedup: the engine's state can't be written to {tmp_path}/file/state/status.json: Not a directory"
    )
    assert engine.status()["agents"] == []
    assert engine.stop() == 0
