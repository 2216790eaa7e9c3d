"""One connection: answers in time, and whose fault it is if they are not."""

import os
import socket
import time
from collections.abc import Iterator

import pytest
import trio
from engine.test_adoption import open_descriptors

from udedup._native import lib
from udedup.engine.link import STRAYS_MAX, Link, Strays
from udedup.engine.wire import HEADER, AgentError


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The engine's end, and the agent's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def refuse_bells() -> None:
    raise AgentError("no bell was asked for")


def answer_to(request: bytes) -> bytes:
    sequence = HEADER.unpack_from(request)[3]
    return HEADER.pack(lib.UDD_MAGIC, lib.UDD_DONE, 0, sequence, 0, 77)


@pytest.mark.parametrize("turn", range(5))
async def test_own_absence_is_not_the_agents_fault(ends: tuple[socket.socket, socket.socket], turn: int) -> None:
    """The answer came while this process was stopped."""
    link = Link(ends[0], answer_seconds=0.2, on_doorbell=refuse_bells, strays=Strays())

    async def be_stopped() -> None:
        await trio.sleep(0.05)
        ends[1].send(answer_to(ends[1].recv(1000)))
        time.sleep(0.5)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.receive)
        nursery.start_soon(be_stopped)
        assert (await link.request(lib.UDD_SCAN)).value == 77
        nursery.cancel_scope.cancel()


async def test_silence_is(ends: tuple[socket.socket, socket.socket]) -> None:
    link = Link(ends[0], answer_seconds=0.2, on_doorbell=refuse_bells, strays=Strays())
    started = trio.current_time()
    with pytest.raises(AgentError, match="did not answer request 6 within"):
        await link.request(lib.UDD_SCAN)
    assert trio.current_time() - started < 1


async def test_silence_after_an_absence_is(ends: tuple[socket.socket, socket.socket]) -> None:
    """It gets its time once more, no longer."""
    link = Link(ends[0], answer_seconds=0.2, on_doorbell=refuse_bells, strays=Strays())

    async def be_stopped() -> None:
        time.sleep(0.5)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_stopped)
        with pytest.raises(AgentError, match="did not answer"):
            await link.request(lib.UDD_SCAN)


async def test_memfd_of_an_answer_nobody_takes_is_closed(ends: tuple[socket.socket, socket.socket]) -> None:
    link = Link(ends[0], answer_seconds=5, on_doorbell=refuse_bells, strays=Strays())
    memfd = os.memfd_create("stray")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: link.request(lib.UDD_HANDOVER, takes_memfd=True))
            await trio.testing.wait_all_tasks_blocked()
            socket.send_fds(ends[1], [answer_to(ends[1].recv(1000))], [memfd])
            scope.cancel()
    link.close()
    assert open_descriptors(memfd) == 1
    os.close(memfd)


def test_strays_have_a_limit() -> None:
    """Descriptors that can't be closed now; a pipe's end is closed by a thread that has to wait for its turn."""
    strays = Strays()
    assert not strays.full
    gate, key = os.pipe()
    original = os.close

    def slow(descriptor: int) -> None:
        os.read(gate, 1)
        original(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "close", slow)
        for _ in range(STRAYS_MAX):
            assert not strays.full
            strays.close(os.dup(gate))
        assert strays.full
        os.write(key, b"x" * STRAYS_MAX)
        deadline = time.monotonic() + 10
        while strays.full:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    original(gate)
    original(key)
