"""SIGHUP at an engine as a person has it: the file is read again."""

import os
import pty
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import END_SECONDS, READY_SECONDS, UDEDUP, Engine
from support.ledger import Ledger


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o644)
    return file


def wait_for(engine: Engine, text: str) -> None:
    """For a line of the log."""
    deadline = time.monotonic() + READY_SECONDS
    while text not in engine.log.read_text():
        assert time.monotonic() < deadline, engine.log.read_text()
        time.sleep(0.02)


@pytest.mark.require("userfaultfd-move", "root", "fuse")
def test_rates_and_images_change_while_it_runs(engine_factory: Callable[..., Engine], tmp_path: Path) -> None:
    disks = [tmp_path / name for name in ("a.img", "b.img")]
    for disk in disks:
        disk.write_bytes(os.urandom(8192))
    images = f"[images]\na = '{disks[0]}'\n"
    file = write(tmp_path / "udedup.toml", f"{images}[limits]\npages-to-scan = 70\n")
    engine = engine_factory("--config", str(file), "--hint-slots", "1000")
    assert engine.mount is not None
    assert engine.status()["pages_to_scan"] == 70

    more = f"{images}b = '{disks[1]}'\nc = '{tmp_path / 'missing'}'\n"
    write(file, f"{more}[engine]\npolicy = 'linear'\n[limits]\npages-to-scan = 71\nhint-slots = 7\n")
    engine.process.send_signal(signal.SIGHUP)
    status = engine.wait_until("reloaded", lambda status: status["pages_to_scan"] == 71)
    assert status["policy"] == "xlh"
    engine.wait_until("two images", lambda status: {image["name"] for image in status["images"]} == {"a", "b"})
    assert (engine.mount / "b").read_bytes() == disks[1].read_bytes()
    # The command line goes before the file, as at the start: the hint slots are the same.
    wait_for(engine, "can't change while the engine runs, left as they are: policy\n")
    wait_for(engine, f"image {tmp_path / 'missing'}: ")

    write(file, "[engine]\npage-to-scan = 1\n")
    engine.process.send_signal(signal.SIGHUP)
    wait_for(engine, f"settings stay as they are: {file}: engine.page-to-scan: is not known here")
    assert engine.status()["pages_to_scan"] == 71

    write(file, "[limits]\npages-to-scan = 72\n")
    engine.process.send_signal(signal.SIGHUP)
    engine.wait_until("reloaded", lambda status: status["pages_to_scan"] == 72)
    wait_for(engine, "no longer named, but still shown: a, b; `udedup umount` takes images out")
    assert (engine.mount / "a").read_bytes() == disks[0].read_bytes()
    assert engine.stop() == 0
    assert "Traceback" not in engine.log.read_text()


@pytest.mark.require("userfaultfd-move", "root")
def test_an_engine_ends_with_its_terminal(tmp_path: Path, ledger: Ledger) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(UDEDUP[0], [*UDEDUP, "engine", "--socket", str(tmp_path / "socket")])
    ledger.add_process(pid)
    said = b""
    while b"ready " not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    deadline = time.monotonic() + END_SECONDS
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert not (tmp_path / "socket").exists()
