"""The agents' protocol in Python terms. native/common/wire.h is the authority; numbers come from it."""

import errno
import os
import struct

import attrs

from udedup.engine.native import CData, ffi, lib

HEADER = struct.Struct("<IHHIiQ")
HELLO_START = struct.Struct("<IH18xI")
"""Magic, type and version, in every version of the protocol."""

SEGMENT_TAIL = struct.Struct("<II")
SCAN_TAIL = struct.Struct("<II")
CURSOR_TAIL = struct.Struct("<Q")

HELLO_BYTES: int = ffi.sizeof("struct udd_hello")
REPORTS_BYTES: int = ffi.sizeof("struct udd_reports")
REPORT_BYTES: int = ffi.sizeof("struct udd_report")
COPIED_BYTES: int = ffi.sizeof("struct udd_copied")
HANDOVER_BYTES: int = ffi.sizeof("struct udd_handover")
HUGE_ANSWER_BYTES: int = ffi.sizeof("struct udd_huge")
RANGE_BYTES: int = ffi.sizeof("struct udd_range")
RUN_BYTES: int = ffi.sizeof("struct udd_run")
RESULT_BYTES: int = ffi.sizeof("struct udd_merge_result")

PAGE: int = lib.UDD_PAGE_SIZE
ITEMS_MAX: int = lib.UDD_ITEMS_MAX
REPORTS_MAX: int = lib.UDD_REPORTS_MAX
SCAN_MAX: int = lib.UDD_SCAN_MAX
COPY_MAX: int = lib.UDD_COPY_MAX
HUGE_PAGES: int = lib.UDD_HUGE_PAGES
SEGMENT_SLOTS: int = lib.UDD_SEGMENT_SLOTS
SEGMENT_BYTES: int = lib.UDD_SEGMENT_BYTES
SHARED_BYTES: int = lib.UDD_SHARED_BYTES

PACKET_MAX = max(
    REPORTS_BYTES + REPORTS_MAX * REPORT_BYTES,
    HEADER.size + ITEMS_MAX * RESULT_BYTES,
    HEADER.size + ITEMS_MAX * RUN_BYTES,
    HELLO_BYTES,
)
"""Bytes of the longest message an agent may send."""

CUT_OFF = " …".encode()


class AgentError(Exception):
    """An agent did what it can't have done in good faith, or did nothing: it is dropped. The text says what."""


class SilentError(AgentError):
    """An agent did not answer in time."""


class OtherVersionError(AgentError):
    """An agent speaks another version of the protocol: it is left alone."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"it speaks version {version} of the protocol, this engine speaks {lib.UDD_WIRE_VERSION}: "
            "install the same udedup on both sides"
        )
        self.version = version


@attrs.frozen
class Hello:
    """An agent's first message."""

    flags: int
    """enum udd_hello_flags."""

    engine_id: tuple[int, int]
    """Of the engine whose segments its runs refer to; zeros if none."""

    hooks: int
    """Bit set of installed hooks."""

    label: str
    """Wanted domain label, empty for none."""

    command: str
    """For people."""


def parse_hello(packet: bytes) -> Hello:
    """Checks a first message. Raises AgentError."""
    if len(packet) < HELLO_START.size:
        raise AgentError(f"its first message has {len(packet)} bytes, which is no hello")
    magic, kind, version = HELLO_START.unpack_from(packet)
    if magic != lib.UDD_MAGIC or kind != lib.UDD_HELLO:
        raise AgentError("its first message is no hello")
    # Before the length, which is the version's.
    if version != lib.UDD_WIRE_VERSION:
        raise OtherVersionError(version)
    if len(packet) != HELLO_BYTES:
        raise AgentError(f"its hello has {len(packet)} bytes instead of {HELLO_BYTES}")
    hello = ffi.from_buffer("struct udd_hello *", packet)
    return Hello(
        flags=hello.flags,
        engine_id=(hello.engine_id[0], hello.engine_id[1]),
        hooks=hello.hooks,
        label=_text(hello.label, "label"),
        command=_printable(_text(hello.command, "command")),
    )


def _text(field: CData, what: str) -> str:
    raw = bytes(ffi.buffer(field))
    if b"\0" not in raw:
        raise AgentError(f"the {what} in its hello is not terminated")
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def _printable(text: str) -> str:
    """Without what could break a log line or a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def welcome(
    *, engine_id: tuple[int, int], mount_dev: int, agent_id: int, flags: int, vma_limit: int, holdoff_ms: int
) -> bytes:
    """Packs UDD_WELCOME."""
    message = ffi.new("struct udd_welcome *")
    message.header.magic = lib.UDD_MAGIC
    message.header.type = lib.UDD_WELCOME
    message.engine_id = engine_id
    message.mount_dev = mount_dev
    message.agent_id = agent_id
    message.flags = flags
    message.vma_limit = vma_limit
    message.holdoff_ms = holdoff_ms
    return bytes(ffi.buffer(message))


def refusal(kind: int, reason: str) -> bytes:
    """Packs UDD_REFUSED or UDD_BYE; a long reason ends with a whole word and an ellipsis."""
    raw = reason.encode()
    if len(raw) >= lib.UDD_REASON_MAX:
        start = raw[: lib.UDD_REASON_MAX - 1 - len(CUT_OFF)]
        words, space, _ = start.rpartition(b" ")
        raw = (words if space else start.decode(errors="ignore").encode()) + CUT_OFF
    return HEADER.pack(lib.UDD_MAGIC, kind, 0, 0, 0, 0) + raw.ljust(lib.UDD_REASON_MAX, b"\0")


def check(result: int, what: str) -> int:
    """Turns the result of a C function into an exception: AgentError for -EPROTO, OSError for the rest."""
    if result >= 0:
        return result
    if -result == errno.EPROTO:
        raise AgentError(f"{what} can't be true")
    raise OSError(-result, f"{what}: {os.strerror(-result)}")
