"""Taking over the segments of an engine that is gone, from the agents that still have pages merged with them.

An agent hands over descriptors; this module decides which of them may become segments of this engine, whose pages other
processes then merge with. Nothing that an agent says counts for that, only what the kernel says about the descriptor.
"""

import errno
import fcntl
import logging
import os

import trio

from udedup.engine.accounting import Counters
from udedup.engine.domain import Domain
from udedup.engine.link import Answer, Link
from udedup.engine.native import ffi, lib
from udedup.engine.store import SEALS, SEGMENT_NAME, Identity, Inherited, Segment
from udedup.engine.wire import CURSOR_TAIL, HANDOVER_BYTES, SEGMENT_BYTES, SEGMENT_SLOTS, AgentError, check

log = logging.getLogger(__name__)

INHERITED_MAX = 4096
"""Segments that a domain may have when another is to be taken over: 64 GiB of store."""

HANDOVERS_MAX = 4096
"""Segments that one agent may hand over: as many as it can have (UDD_SEGMENTS_MAX)."""

SETTLE_SECONDS = 60.0
"""How long to wait for others who refer to a segment that was taken over; they come back within 30 s."""

AGAIN_SECONDS = 90.0
"""How long an agent is asked again for what could not be taken over yet."""


class NotProvenError(Exception):
    """A segment can't be taken over; the text says why."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again
        """Whether that may change."""


def prove(descriptor: int, prefix: str) -> Inherited:
    """Makes sure that a memfd may be shared in the domain whose segments' names begin with ``prefix``, and reads it.

    Processes that are to merge with its pages rely on three things:

    *No page of it ever changes*, whoever made the memfd and whatever they kept of it. What keeps others from writing
    to a living engine's segment, F_SEAL_FUTURE_WRITE, is not enough: mappings made before that seal can still write,
    in an engine that was stopped and not killed, or in an agent that made the memfd itself. But F_SEAL_WRITE can be
    added only while there is no writable mapping and no page is held by a device or a system call under way (EBUSY),
    and afterwards there can be none (fcntl(2), the kernel's mm/memfd.c). So it is added here, *before* the pages are
    read for their digests. It also keeps them from being punched out; the other two seals, from being cut off. Seals
    can't be taken off.

    *It holds nothing that the domain may not see.* A descriptor of a segment is readable as a whole, so it must have
    been this domain's before. A process may have come from another one (setuid) and hand over what it got there. The
    name of a memfd is given to it when it is made and never changes, and engines put the domain into it. A process
    that copies what it can read into a memfd of its own, with another name, only tells what it can tell anyway.

    *Its physical pages were chosen by an engine.* Who may choose which page of the machine's memory others' contents
    lie in could change them past all of this, by disturbing neighbouring rows (Rowhammer). So its owner must be the
    engine's own user; memfds can't be given away to another. A process of the same user could do worse things to its
    like anyway.

    It must also be of tmpfs, not of hugetlbfs, whose pages can't be mapped one by one: it is if it lies on the device
    that ordinary memfds are on.

    Raises NotProvenError. May take some 200 ms: the kernel waits for pages in use before it refuses F_SEAL_WRITE.
    """
    status = os.fstat(descriptor)
    name = os.readlink(f"/proc/self/fd/{descriptor}").removeprefix("/memfd:").removesuffix(" (deleted)")  # noqa: PTH115
    if not name.startswith(SEGMENT_NAME) or status.st_size != SEGMENT_BYTES or status.st_dev != _memfd_device():
        raise NotProvenError("it is no store segment")
    if name.rpartition("-")[0] != prefix:
        raise NotProvenError("it is of another trust domain")
    if status.st_uid != os.geteuid():
        raise NotProvenError(f"it was made by uid {status.st_uid}, not by an engine of this user")
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise NotProvenError("seals are missing")
    # The agent's own would share its file offset and flags with the agent.
    ours = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _seal_for_good(ours)
        digests = ffi.new("uint64_t[]", 2 * SEGMENT_SLOTS)
        used = check(lib.udd_segment_digests(ours, digests), "reading a segment of an earlier engine")
    except BaseException:
        os.close(ours)
        raise
    return Inherited(ours, digests, used)


def _memfd_device() -> int:
    plain = os.memfd_create("udedup", os.MFD_CLOEXEC)
    try:
        return os.fstat(plain).st_dev
    finally:
        os.close(plain)


def _seal_for_good(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
        return
    writable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise NotProvenError("somebody can still write to it", again=True) from None
        if error.errno == errno.EPERM:
            raise NotProvenError("it was sealed against F_SEAL_WRITE") from None
        raise
    finally:
        os.close(writable)


class Handover:
    """What one agent hands over."""

    def __init__(self, link: Link, domain: Domain, counters: Counters, who: str) -> None:
        self._link = link
        self._counters = counters
        self._domain = domain
        self._who = who
        self._last_attempt = trio.current_time() + AGAIN_SECONDS
        self._told: set[str] = set()
        self.unfinished = False
        """Whether to ask again."""

    async def collect(self, ret: list[Segment]) -> None:
        """Asks for all segments of earlier engines and adds those that are ours now, pinned. Raises AgentError."""
        waits: set[str] = set()
        cursor = 0
        for _ in range(HANDOVERS_MAX):
            answer = await self._link.request(lib.UDD_HANDOVER, CURSOR_TAIL.pack(cursor), takes_memfd=True)
            try:
                if answer.status < 0 or answer.count == 0:
                    break
                if answer.count != 1 or len(answer.packet) != HANDOVER_BYTES or answer.value <= cursor:
                    raise AgentError(f"it hands {answer.count} segments over in {len(answer.packet)} bytes")
                cursor = answer.value
                segment = await self._resolve(answer)
                segment.pins += 1
                ret.append(segment)
            except NotProvenError as refusal:
                if refusal.again:
                    waits.add(str(refusal))
                else:
                    self._tell(str(refusal))
            finally:
                if answer.memfd is not None:
                    os.close(answer.memfd)
        self.unfinished = bool(waits) and trio.current_time() < self._last_attempt
        if not self.unfinished:
            for reason in waits:
                self._tell(reason)

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.warning("%s keeps a segment of an earlier engine for itself: %s", self._who, reason)

    async def _resolve(self, answer: Answer) -> Segment:
        """The segment that an answer is about. Raises NotProvenError."""
        store = self._domain.store
        if answer.memfd is None:
            # A fork child: others may have the descriptor. If it lies it gets the descriptor of a segment of its own
            # domain, and the real one compares the inode with what it has mapped.
            head = ffi.from_buffer("struct udd_handover *", answer.packet)
            segment = store.find(Identity(head.device, head.inode))
            if segment is None:
                raise NotProvenError("nobody has a descriptor of it", again=True)
            return segment
        async with self._domain.adopting:
            segment = store.find(Identity.of(answer.memfd))
            if segment is not None:
                return segment
            if len(store.segments) >= INHERITED_MAX:
                raise NotProvenError(f"there are {INHERITED_MAX} segments already")
            try:
                proven = await trio.to_thread.run_sync(prove, answer.memfd, store.prefix)
                segment = store.inherit(proven, self._domain.index, settled_at=trio.current_time() + SETTLE_SECONDS)
            except OSError as error:
                raise NotProvenError(error.strerror or str(error), again=True) from None
            self._counters.segments_adopted += 1
            return segment
