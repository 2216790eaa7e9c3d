import os
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

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
