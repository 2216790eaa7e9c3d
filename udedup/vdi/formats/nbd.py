"""The client's side of NBD, as much as reading takes: fixed newstyle negotiation, simple replies.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, where the names come from.
"""

import errno
import os
import struct
from typing import Final

import trio

NBD_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
REPLY_MAGIC: Final = 0x0003_E889_0455_65A9
REQUEST_MAGIC: Final = 0x2560_9513
SIMPLE_REPLY_MAGIC: Final = 0x6744_6698

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
OPT_GO: Final = 7
REP_ACK: Final = 1
REP_INFO: Final = 3
REP_ERROR: Final = 1 << 31
INFO_EXPORT: Final = 0
CMD_READ: Final = 0

OPTION_BYTES_MAX: Final = 4096

OPTION_REPLY: Final = struct.Struct(">QIII")
EXPORT: Final = struct.Struct(">HQH")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")


class NbdError(Exception):
    """The server broke the protocol or went away: the connection is of no more use."""


class NbdClient:
    """One connection, on which one thing happens at a time. Cancelling leaves it unusable."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._handle = 0
        self.size = 0
        """Bytes of the export."""

    async def negotiate(self, export: str = "") -> None:
        """Agrees on ``export``. Raises NbdError."""
        magic, option_magic, flags = struct.unpack(">8s8sH", await self._receive(18))
        if magic != NBD_MAGIC or option_magic != OPTION_MAGIC or not flags & FLAG_FIXED_NEWSTYLE:
            raise NbdError("it is no NBD server of the newstyle")
        name = export.encode()
        choice = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        await self._send(
            struct.pack(">I", FLAG_FIXED_NEWSTYLE | flags & FLAG_NO_ZEROES)
            + OPTION_MAGIC
            + struct.pack(">II", OPT_GO, len(choice))
            + choice
        )
        while True:
            magic, option, kind, length = OPTION_REPLY.unpack(await self._receive(OPTION_REPLY.size))
            if magic != REPLY_MAGIC or option != OPT_GO or length > OPTION_BYTES_MAX:
                raise NbdError("its answer to the choice of an export is no answer")
            data = await self._receive(length)
            if kind == REP_ACK:
                return
            if kind & REP_ERROR:
                raise NbdError(f"it refuses the export: {data.decode('utf-8', 'replace') or hex(kind)}")
            if kind == REP_INFO and len(data) >= EXPORT.size:
                topic, size, _ = EXPORT.unpack_from(data)
                if topic == INFO_EXPORT:
                    self.size = size

    async def read_into(self, view: memoryview, offset: int) -> None:
        """Fills ``view`` from byte ``offset`` on. Raises OSError if the server can't read, NbdError if it is gone."""
        self._handle += 1
        await self._send(REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, self._handle, offset, len(view)))
        magic, error, handle = SIMPLE_REPLY.unpack(await self._receive(SIMPLE_REPLY.size))
        if magic != SIMPLE_REPLY_MAGIC or handle != self._handle:
            raise NbdError("its answer to a read is no answer")
        if error:
            raise OSError(errno.EIO, f"qemu-nbd can't read it: {os.strerror(error)}")
        await self._receive_into(view)

    def close(self) -> None:
        """Closes the connection."""
        self._stream.socket.close()

    async def _send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise NbdError("the connection is gone") from error

    async def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        await self._receive_into(memoryview(data))
        return bytes(data)

    async def _receive_into(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = await self._stream.socket.recv_into(view[done:])
            except (OSError, trio.ClosedResourceError) as error:
                raise NbdError("the connection is gone") from error
            if not count:
                raise NbdError("it closed the connection")
            done += count
