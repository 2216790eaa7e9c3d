"""A client of a running engine, for programs on trio: ``async with udedup.connect() as engine``.

Speaks the protocol of ``udedup.engine.control``, which says what each request does and answers, and gives the answers
as the classes of ``udedup.engine.accounting``, in whose words ``udedup status --json`` is.

What takes part in the memory of an engine, and who takes no part for now:

>>> import os, trio, udedup
>>> async def look():
...     async with udedup.connect() as engine:
...         await engine.pause(os.getpid())
...         mine = [agent for agent in (await engine.status()).agents if agent.pid == os.getpid()]
...         resumed = await engine.resume(os.getpid())
...         return mine[0].reason, resumed
>>> udedup.join()
>>> trio.run(look)
('paused on request', 1)
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec
import trio

from udedup.engine.accounting import Status
from udedup.engine.clients import (
    CheckDomainRequest,
    CloneChangeRequest,
    CloneRequest,
    ClonesRequest,
    MergeRequest,
    MountRequest,
    PauseRequest,
    Request,
    StatusRequest,
    UmountRequest,
    UnmergeRequest,
)
from udedup.engine.control import (
    ANSWER_SECONDS,
    CHUNK_BYTES,
    CONNECT_PAUSE,
    Assembly,
    check_size,
    explain,
    explain_nonsense,
    explain_silence,
    require_trusted,
)
from udedup.errors import UdedupError
from udedup.places import engine_socket

if TYPE_CHECKING:
    from udedup.engine.cloning import CloneStatus

T = TypeVar("T")


class _Answer(msgspec.Struct):
    ok: bool
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""


class EngineClient:
    """An engine that can be asked; made by :func:`connect`.

    Several tasks may ask at a time; they are answered in turn. All methods raise :class:`UdedupError`, one line, if the
    engine refuses or does not answer. A later request connects anew, so one that outlives its engine finds the next.
    Users other than root and the engine's own may ask about their own processes only.

    >>> async def save():
    ...     async with udedup.connect() as engine:
    ...         await engine.check_domain("private")  # raises if it may not be used
    ...         before = await engine.status(kernel=True)
    ...         await engine.unmerge(os.getpid())
    ...         after = await engine.status(kernel=True)
    ...         await engine.resume(os.getpid())
    ...         return before.kernel is not None, after.agents[0].pages_sharing
    >>> trio.run(save)
    (True, 0)

    Images and clones, of an engine with a mount:

    >>> async def disks(image):
    ...     async with udedup.connect() as engine:
    ...         shown = await engine.mount(image, name="base")
    ...         clone = await engine.clone(image, "vm1")  # writable
    ...         with open(clone, "r+b") as disk:
    ...             disk.write(b"changed")
    ...         await engine.umount("vm1.raw")  # what was written is kept
    ...         names = [each.name for each in await engine.clones()]
    ...         await engine.show_clone("vm1")
    ...         await engine.discard_clone("vm1")
    ...         await engine.umount(shown)
    ...         return names, shown.name
    >>> trio.run(disks, image)
    (['vm1'], 'base')
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """The engine's socket."""
        self._socket: socket.socket | None = None
        self._turn = trio.StrictFIFOLock()

    # ---- what can be asked ----

    async def status(self, *, kernel: bool = False) -> Status:
        """Everything about the engine.

        ``kernel``: with what the kernel says, too, which takes it milliseconds per process; else that is None.
        """
        return await self._ask(StatusRequest(kernel=kernel), Status)

    async def unmerge(self, pid: int | None = None) -> int:
        """Gives a process its private memory back (None: all of them), and leaves it alone from then on.

        Returns how many pages are private again.
        """
        return await self._ask(UnmergeRequest(pid), int)

    async def pause(self, pid: int | None = None) -> int:
        """Merges no more of a process (None: of any), but lets merged pages stay so. Returns how many processes."""
        return await self._ask(PauseRequest(pid), int)

    async def resume(self, pid: int | None = None) -> int:
        """Undoes :meth:`unmerge` and :meth:`pause`. Returns how many processes may merge again."""
        return await self._ask(MergeRequest(pid), int)

    async def mount(
        self,
        image: Path | str,
        *,
        name: str | None = None,
        image_format: str | None = None,
        secret_file: Path | str | None = None,
    ) -> Path:
        """Shows a disk image in the engine's mount and returns where, as ``udedup mount`` does."""
        request = MountRequest([(name, _absolute(image))], image_format, _absolute_if(secret_file))
        return Path((await self._ask(request, list[str]))[0])

    async def umount(self, image: Path | str) -> None:
        """Takes an image out again, by its name, its path in the mount or its own path."""
        await self._ask(UmountRequest(str(image), _absolute(image)), bool)

    async def clone(
        self,
        base: Path | str,
        name: str,
        *,
        overlay: Path | str | None = None,
        image_format: str | None = None,
        secret_file: Path | str | None = None,
    ) -> Path:
        """Makes a writable disk above an image and returns where it is, as ``udedup mount --clone`` does."""
        request = CloneRequest(name, _absolute(base), _absolute_if(overlay), image_format, _absolute_if(secret_file))
        return Path(await self._ask(request, str))

    async def clones(self) -> "list[CloneStatus]":
        """All clones, in the mount or not."""
        from udedup.engine.cloning import CloneStatus

        return await self._ask(ClonesRequest(), list[CloneStatus])

    async def show_clone(self, name: str) -> Path:
        """Puts a clone back into the mount and returns where."""
        return Path(await self._ask(CloneChangeRequest(name, "show"), str))

    async def commit_clone(self, name: str) -> Path:
        """Writes what a clone has into its base, ends it, and returns the base. May take as long as copying it."""
        return Path(await self._ask(CloneChangeRequest(name, "commit"), str, seconds=None))

    async def discard_clone(self, name: str) -> None:
        """Removes a clone and what was written to it."""
        await self._ask(CloneChangeRequest(name, "discard"), type(None))

    async def check_domain(self, label: str) -> Literal[True]:
        """Whether this user may use a domain's label; raises, saying why, if not."""
        await self._ask(CheckDomainRequest(label), bool)
        return True

    # ---- the connection ----

    async def open(self) -> None:
        """Connects, unless it is. Raises UdedupError if there is no engine, or not for this user."""
        async with self._turn:
            try:
                with trio.fail_after(ANSWER_SECONDS):
                    await self._connected()
            except trio.TooSlowError:
                raise UdedupError(explain_silence(self.path, ANSWER_SECONDS)) from None
            except OSError as error:
                raise UdedupError(explain(self.path, error)) from None

    def close(self) -> None:
        """Ends the connection; the next request would open another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _ask(self, request: Request, kind: type[T], *, seconds: float | None = ANSWER_SECONDS) -> T:
        packet = check_size(msgspec.json.encode(request))
        async with self._turn:
            answered = False
            try:
                with trio.fail_after(float("inf") if seconds is None else seconds):
                    await self._send(packet)
                    raw = await self._receive()
                answer = msgspec.json.decode(raw, type=_Answer)
                result = msgspec.json.decode(answer.result, type=kind) if answer.ok else None
                answered = True
            except trio.TooSlowError:
                raise UdedupError(explain_silence(self.path, seconds or 0)) from None
            except OSError as error:
                raise UdedupError(explain(self.path, error)) from None
            except msgspec.DecodeError:
                raise UdedupError(explain_nonsense(self.path)) from None
            finally:
                # The rest of an answer that nobody waits for any more must not be taken for that of the next request.
                if not answered:
                    self.close()
        if not answer.ok:
            raise UdedupError(answer.error)
        return result  # type: ignore[return-value]

    async def _connected(self) -> socket.socket:
        """Waits for its turn while others have the engine's queue full. Raises OSError."""
        if self._socket is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                while True:
                    try:
                        sock.connect(str(self.path))
                        break
                    except BlockingIOError:
                        await trio.sleep(CONNECT_PAUSE)
                require_trusted(sock, self.path)
            except BaseException:
                sock.close()
                raise
            self._socket = sock
        return self._socket

    async def _send(self, packet: bytes) -> None:
        fresh = self._socket is None
        try:
            await self._send_once(packet)
        except BrokenPipeError:
            # The engine leaves those who say nothing, or it is another one by now: it has not seen this request.
            self.close()
            if fresh:
                raise
            await self._send_once(packet)

    async def _send_once(self, packet: bytes) -> None:
        sock = await self._connected()
        while True:
            try:
                sock.send(packet, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
            else:
                return

    async def _receive(self) -> bytes:
        sock = await self._connected()
        assembly = Assembly()
        while True:
            await trio.lowlevel.wait_readable(sock)
            if assembly.add(sock.recv(CHUNK_BYTES)):
                return assembly.answer


@asynccontextmanager
async def connect(path: Path | str | None = None) -> AsyncIterator[EngineClient]:
    """An engine to ask; ``path`` is its socket (default: ``$UDEDUP_SOCKET``, else this user's engine's, else root's).

    Raises :class:`UdedupError` if none listens there.

    >>> async def unmerge_all(name):
    ...     async with udedup.connect() as engine:
    ...         status = await engine.status()
    ...         chosen = [agent for agent in status.agents if agent.command.startswith(name)]
    ...         return [await engine.unmerge(agent.pid) for agent in chosen]
    >>> trio.run(unmerge_all, "redis-server")
    []
    """
    client = EngineClient(engine_socket() if path is None else Path(path))
    await client.open()
    try:
        yield client
    finally:
        client.close()


def _absolute(path: Path | str) -> str:
    return str(Path(path).absolute())


def _absolute_if(path: Path | str | None) -> str | None:
    return None if path is None else _absolute(path)
