"""For all tests: what the machine can do, real engines, and nothing left running or mounted or hanging."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import machine
from support.engine import Engine, start_engine
from support.ledger import Ledger

CAPABILITIES = pytest.StashKey[dict[str, str | None]]()
LEDGER = pytest.StashKey[Ledger]()
ABORT_EARLIER_SECONDS = 5.0
"""How long before a test's own timeout hung mounts are aborted, so that the test can fail by itself."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "require(*names): needs these capabilities of the machine (tests/support/machine.py)"
    )
    config.stash[CAPABILITIES] = machine.examine()
    assert config.cache is not None
    base = config.cache.mkdir("udedup-ledger")
    Ledger.sweep_earlier(base)
    config.stash[LEDGER] = Ledger.of_this_run(base)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[LEDGER].close()


def pytest_report_header(config: pytest.Config) -> str:
    found = config.stash[CAPABILITIES]
    return "machine: " + ", ".join(f"{name}: {'no' if reason else 'yes'}" for name, reason in found.items())


def check_capabilities(config: pytest.Config, names: tuple[str, ...]) -> None:
    """Skips the running test if the machine lacks one of ``names``; fails it where nothing may be missing."""
    found = config.stash[CAPABILITIES]
    missing = [f"{name} ({found[name]})" for name in names if found[name] is not None]
    if missing:
        reason = "this machine lacks " + ", ".join(missing)
        if machine.missing_is_failure():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("require"):
        check_capabilities(item.config, marker.args)


@pytest.fixture
def require(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Call it with names of capabilities the test turns out to need."""
    return lambda *names: check_capabilities(pytestconfig, names)


@pytest.fixture
def ledger(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """The record of what the test starts and mounts; all of it is gone after the test.

    Shortly before the test's time is up its mounts are aborted: a thread that waits for a hung one is deaf to signals.
    """
    ledger = pytestconfig.stash[LEDGER]
    marker = request.node.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else pytestconfig.getini("timeout"))
    watchdog = threading.Timer(max(seconds - ABORT_EARLIER_SECONDS, seconds / 2), ledger.abort_mounts)
    watchdog.daemon = True
    watchdog.start()
    yield ledger
    watchdog.cancel()
    ledger.sweep()


@pytest.fixture(scope="session", autouse=True)
def _state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines and commands that tests start keep nothing in this machine's own places."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("state", numbered=False)
        directory.chmod(0o700)
        patch.setenv("STATE_DIRECTORY", str(directory))
        yield


@pytest.fixture
def engine_factory(tmp_path: Path, ledger: Ledger) -> Iterator[Callable[..., Engine]]:
    """Starts engines, each with a folder of its own; options are those of support.engine.start_engine."""
    engines: list[Engine] = []

    def start(*options: str, **keywords: object) -> Engine:
        folder = tmp_path / f"engine{len(engines)}"
        folder.mkdir()
        engines.append(start_engine(folder, ledger, *options, **keywords))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    for engine in engines:
        if engine.process.poll() is None:
            engine.process.terminate()
    for engine in engines:
        engine.process.wait(20)
        assert engine.process.stdout is not None
        engine.process.stdout.close()


@pytest.fixture
def engine(engine_factory: Callable[..., Engine]) -> Engine:
    """A running engine that scans without a limit on its rate; it has a mount where the machine has FUSE."""
    return engine_factory("--sleep-millisecs", "0", mount=os.access("/dev/fuse", os.R_OK | os.W_OK))
