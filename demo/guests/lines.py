"""Lines over a stream."""

import trio

_CHUNK_BYTES = 65536


class Lines:
    """Reads and writes whole lines."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._searched = 0

    async def read(self) -> bytes:
        """Returns the next line without its end. Raises EOFError at the end of the stream."""
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            try:
                chunk = await self._stream.receive_some(_CHUNK_BYTES)
            except trio.BrokenResourceError:
                chunk = b""
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    async def write(self, line: bytes) -> None:
        """Sends a line. Raises EOFError if nobody reads any more."""
        try:
            await self._stream.send_all(line + b"\n")
        except trio.BrokenResourceError:
            raise EOFError from None
