import os
import threading
import time
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from udedup._native import lib  # type: ignore[import-not-found, unused-ignore]
from udedup.vdi import fastpoll


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


async def never() -> bool:
    raise AssertionError("waited, although a request was there")


async def test_takes_waiting_request_without_scheduler(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    wait = fastpoll.make_wait(pipe[0], never)
    with assert_no_checkpoints():
        assert await wait()


async def test_others_get_their_turn(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpoll, "HOLD_SECONDS", 1e9)
    os.write(pipe[1], b"x")
    wait = fastpoll.make_wait(pipe[0], never)
    for _ in range(2):
        for _ in range(fastpoll.REQUESTS_MAX):
            with assert_no_checkpoints():
                assert await wait()
        with assert_checkpoints():
            assert await wait()
        # The request after the checkpoint counts as the first.
        for _ in range(fastpoll.REQUESTS_MAX - 1):
            await wait()
        with assert_checkpoints():
            assert await wait()
        wait = fastpoll.make_wait(pipe[0], never)


async def test_slow_requests_give_way_earlier(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpoll, "HOLD_SECONDS", 0.0)
    os.write(pipe[1], b"x")
    wait = fastpoll.make_wait(pipe[0], never)
    with assert_checkpoints():
        assert await wait()


async def test_polls_again_when_another_task_was_faster(pipe: tuple[int, int]) -> None:
    waits = 0

    async def original() -> bool:
        # Says readable each time, as trio does to every task it wakes; only the third time it is still true.
        nonlocal waits
        waits += 1
        await trio.lowlevel.checkpoint()
        if waits == 3:
            os.write(pipe[1], b"x")
        return True

    assert await fastpoll.make_wait(pipe[0], original)()
    assert waits == 3


async def test_looks_a_while_for_the_next_request(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpoll, "SPIN_NS", 10_000_000_000)
    monkeypatch.setattr(fastpoll, "HOLD_SECONDS", 1000.0)
    # The loop must not have anything else to do.
    monkeypatch.setattr(fastpoll, "loop_descriptor", lambda: -1)
    wait = fastpoll.make_wait(pipe[0], never)
    writer = threading.Timer(0.05, os.write, (pipe[1], b"x"))
    writer.start()
    with assert_no_checkpoints():
        assert await wait()
    writer.join()


async def test_looks_no_longer_than_the_loop_is_idle(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpoll, "SPIN_NS", 60_000_000_000)

    async def original() -> bool:
        await trio.lowlevel.wait_readable(pipe[0])
        return True

    wait = fastpoll.make_wait(pipe[0], original)

    async def ask() -> None:
        # Only a loop that runs gets behind this: the look has to end for that.
        await trio.to_thread.run_sync(time.sleep, 0.05)
        os.write(pipe[1], b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            assert await wait()


async def test_looks_less_often_when_it_is_in_vain(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpoll, "SPIN_NS", 1)
    monkeypatch.setattr(fastpoll, "loop_descriptor", lambda: -1)
    looks = []
    ask = fastpoll.lib.udd_request_wait

    class Asked:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def udd_request_wait(self, device: int, loop: int, spin_ns: int) -> int:
            looks.append(spin_ns)
            return int(ask(device, loop, spin_ns))

    async def original() -> bool:
        await trio.lowlevel.checkpoint()
        os.write(pipe[1], b"x")
        return True

    monkeypatch.setattr(fastpoll, "lib", Asked())
    wait = fastpoll.make_wait(pipe[0], original)
    for _ in range(1000):
        assert await wait()
        os.read(pipe[0], 1)
    # Each time it does not find the request at once it is asked twice.
    assert len(looks) == 2000
    assert sum(looks) < 30


def test_pauses_grow_up_to_a_limit_and_end_with_the_first_success() -> None:
    spinning = fastpoll.Spinning()
    pauses = []
    for _ in range(8):
        assert spinning.next()
        spinning.ended(found=False)
        pauses.append(0)
        while not spinning.next():
            pauses[-1] += 1
    assert pauses == [1, 3, 7, 15, 31, 63, 63, 63]
    spinning.ended(found=True)
    assert all(spinning.next() for _ in range(100))


async def test_another_trio_is_done_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert fastpoll.loop_descriptor() >= 0
    monkeypatch.setattr(fastpoll, "EPOLL", "_core.not_there")
    assert fastpoll.loop_descriptor() == -1
    assert ["has no _core.not_there" in record.message for record in caplog.records] == [True]


async def test_ends_with_the_session(pipe: tuple[int, int]) -> None:
    async def original() -> bool:
        await trio.lowlevel.checkpoint()
        return False

    assert not await fastpoll.make_wait(pipe[0], original)()


async def test_closed_device_counts_as_readable() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    try:
        assert await fastpoll.make_wait(reader, never)()
    finally:
        os.close(reader)


@pytest.mark.parametrize("version", ["3.4.2", "3.6.0", "3.50.1", "4.0", "unknown", "13.5.0"])
def test_untried_versions_are_left_alone(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pipe: tuple[int, int]
) -> None:
    monkeypatch.setattr(pyfuse3, "__version__", version)
    original = getattr(pyfuse3, fastpoll.ATTRIBUTE)
    with fastpoll.fast_poll(pipe[0]) as active:
        assert not active
        assert getattr(pyfuse3, fastpoll.ATTRIBUTE) is original
    assert [version in record.message for record in caplog.records] == [True]


def test_missing_attribute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pipe: tuple[int, int]
) -> None:
    monkeypatch.delattr(pyfuse3, fastpoll.ATTRIBUTE)
    with fastpoll.fast_poll(pipe[0]) as active:
        assert not active
        assert not hasattr(pyfuse3, fastpoll.ATTRIBUTE)
    assert ["has no" in record.message for record in caplog.records] == [True]


def test_is_undone(pipe: tuple[int, int]) -> None:
    original = getattr(pyfuse3, fastpoll.ATTRIBUTE)
    with fastpoll.fast_poll(pipe[0]) as active:
        assert active
        assert getattr(pyfuse3, fastpoll.ATTRIBUTE) is not original
    assert getattr(pyfuse3, fastpoll.ATTRIBUTE) is original
