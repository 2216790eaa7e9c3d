"""The engine: takes connections, serves agents and control clients, and ends in order.

Each connection has its own task (an agent's has two below it), so whatever one of them does or leaves undone, the
others go on.
"""

import errno
import fcntl
import itertools
import logging
import os
import resource
import secrets
import socket
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from udedup.engine import clients, dump, kernel, maplimit, privileges, psi, reload, report
from udedup.engine.accounting import Counters, ImageStatus, Status
from udedup.engine.advisor import FixedPace, Pace, ScanTimePace
from udedup.engine.agent import UNMERGE_SECONDS, Agent, SharedArea
from udedup.engine.clients import (
    CheckDomainRequest,
    Client,
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
from udedup.engine.config import EngineConfig, Ready
from udedup.engine.domain import Domain, DomainRules, Domains, unmapped_uid
from udedup.engine.guests import Guests
from udedup.engine.hints import HintStack
from udedup.engine.link import Link, LinkClosedError, Peer, peer_of, send
from udedup.engine.listener import listening
from udedup.engine.native import lib
from udedup.engine.pressure import PERIOD, PressureState, PressureWatch
from udedup.engine.relief import CPU_MOST, Caches, EagerPace
from udedup.engine.retirement import Retirement
from udedup.engine.rounds import Rounds
from udedup.engine.scheduler import Scheduler
from udedup.engine.shortage import Shortage
from udedup.engine.store import MFD_NOEXEC_SEAL, SegmentNumbers
from udedup.engine.wire import (
    PACKET_MAX,
    SHARED_BYTES,
    AgentError,
    Hello,
    OtherVersionError,
    SilentError,
    parse_hello,
    refusal,
    welcome,
)
from udedup.errors import UdedupError
from udedup.extras import needing

if TYPE_CHECKING:
    from udedup.engine.cloning import Cloning
    from udedup.engine.shelves import Shelves
    from udedup.vdi.formats.probe import Opening
    from udedup.vdi.images import Image, Images

__all__ = ["EngineConfig", "Ready", "run_engine"]

log = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
"""How long a new connection may stay silent."""

ACCEPT_PAUSE = 0.1
"""Pause when there are no descriptors left for a new connection, s."""

ACCEPTS_AT_ONCE = 2
"""New connections that are taken one after the other, before somebody else has a turn of the loop."""

JOIN_SECONDS = 0.001
"""What it takes to let an agent join, and leave again."""

REQUEST_SECONDS = 0.001
"""What a control request takes, and a report as much again for each process, reading what the kernel says included."""

NUMBERS_PER_AGENT = 4
"""Agent numbers that there are for each connection that there may be."""

WIDTH = 8
"""Agents scanned at a time when there is no rate limit."""

USERFAULTFD = "/dev/userfaultfd"


class Engine:
    """All state of one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._started = time.monotonic()
        self._own_smaps = kernel.OwnSmaps()
        self.counters = Counters()
        self.shortage = Shortage()
        self.hints = HintStack(config.hint_slots)
        self.rounds = Rounds(self.counters, self.hints, width=_width(config))
        files = psi.files() if config.pressure_files is None else config.pressure_files
        self.pressure_files: tuple[Path, ...] = tuple(files)
        """Those that are watched."""
        self.pressure = PressureState()
        self.pace = _pace(config, self.pressure)
        """Sets pages_to_scan."""
        self.identity = (secrets.randbits(64) or 1, secrets.randbits(64) or 1)
        """Tells this engine from earlier ones."""
        self.mount_dev = 0
        self.images: Images | None = None
        self.cloning: Cloning | None = None
        self._numbers = SegmentNumbers()
        self._domains = Domains(_rules(config), self._numbers)
        self._vma_limit = maplimit.vma_limit()
        self._last_number = 0
        self._met_other_version = False
        self._guests = Guests(frozenset({0, os.geteuid()}), config.agents_max)

    @property
    def agents(self) -> list[Agent]:
        """Those connected now."""
        return list(self.rounds.agents.values())

    @property
    def domains(self) -> list[Domain]:
        """Those that have or had agents."""
        return list(self._domains)

    @property
    def rules(self) -> DomainRules:
        """Who may be in which domain."""
        return self._domains.rules

    # ---- new settings (udedup.engine.reload); self.config has them already ----

    def change_rate(self) -> None:
        """Goes by another rate."""
        self.pace = _pace(self.config, self.pressure)
        self.rounds.width = _width(self.config)

    def change_domains(self) -> None:
        """Goes by other rules; who is in a domain stays there."""
        self._domains.rules = _rules(self.config)

    def change_agents_max(self) -> None:
        """Takes as many connections from now on; who is connected stays."""
        self._guests.connections_max = self.config.agents_max

    async def add_image(self, path: Path, name: str | None) -> None:
        """Shows one more image, opened as the configuration says. Raises UdedupError."""
        await self._show(path, name, self._opening(self.config.image_format, self.config.secret_file))

    # ---- connections ----

    async def accept(self, listener: socket.socket) -> None:
        """Takes connections until cancelled."""
        async with trio.open_nursery() as nursery:
            for number in itertools.count(1):
                if number % ACCEPTS_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    await trio.lowlevel.wait_readable(listener)
                    continue
                except OSError as error:
                    if not self.shortage.explains(error, "a connection has to wait"):
                        raise
                    await trio.sleep(ACCEPT_PAUSE)
                    continue
                sock.setblocking(False)
                peer = peer_of(sock)
                if self._guests.comes(peer.uid):
                    nursery.start_soon(self._serve, sock, peer)
                else:
                    self.counters.connections_refused += 1
                    sock.close()

    async def _serve(self, sock: socket.socket, peer: Peer) -> None:
        """One connection, from its first message to its end."""
        try:
            packet = b""
            with trio.move_on_after(HELLO_SECONDS):
                packet = await clients.receive_packet(sock, PACKET_MAX)
            # Not earlier: who is refused before it said hello can't read why.
            self._guests.check_room(peer.uid)
            if packet.startswith(b"{"):
                await Client(sock, peer, self._perform, self.counters).serve(packet)
            elif packet:
                hello = parse_hello(packet)
                if not await self._guests.turn(peer.uid, JOIN_SECONDS):
                    # Without a word: agents that hear none try again later.
                    return
                number = self._free_number()
                with self._domains.membership(peer.uid, hello.label, number) as domain:
                    await self._serve_agent(sock, peer, hello, number, domain)
        except OtherVersionError as error:
            # Once for all of them: an upgrade finds many, and their children come, too.
            level = logging.DEBUG if self._met_other_version else logging.WARNING
            self._met_other_version = True
            log.log(level, "connection of pid %d (uid %d) refused: %s", peer.pid, peer.uid, error)
            self._refuse(sock, str(error))
        except AgentError as error:
            level = self._guests.heard_of(peer.uid)
            log.log(level, "connection of pid %d (uid %d) refused: %s", peer.pid, peer.uid, error)
            self._refuse(sock, str(error))
        except LinkClosedError:
            log.debug("pid %d was gone before it was welcomed", peer.pid)
        except OSError as error:
            # An agent that is not welcomed comes back later.
            gone = error.errno in (errno.EPIPE, errno.ECONNRESET)
            if not gone and not self.shortage.explains(error, f"pid {peer.pid} has to wait"):
                raise
        finally:
            self._guests.goes(peer.uid)
            if sock.fileno() >= 0:
                sock.close()

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        self.counters.connections_refused += 1
        try:
            send(sock, refusal(lib.UDD_REFUSED, reason), [])
        except OSError as error:
            log.debug("nobody there to be refused: %s", error.strerror)

    async def _serve_agent(self, sock: socket.socket, peer: Peer, hello: Hello, number: int, domain: Domain) -> None:
        agent, link = self._admit(sock, peer, hello, number, domain)
        self.counters.agents_joined += 1
        log.debug("%s joined domain %s", agent, agent.domain.name)
        if hello.flags & (lib.UDD_HELLO_FORKED | lib.UDD_HELLO_REJOIN):
            agent.submit(agent.take_over)
        self.rounds.joined(agent)
        farewell: str | None = "the engine ends"
        try:
            with agent.scope:
                await self._work_with(agent, link)
            agent.raise_failure()
        except LinkClosedError as closed:
            farewell = None
            log.info("%s left%s", agent, " in the middle of a request" if closed.asked else "")
        except AgentError as error:
            farewell = str(error)
            self.counters.agents_dropped += 1
            self.counters.agents_silent += isinstance(error, SilentError)
            log.log(self._guests.heard_of(peer.uid), "%s dropped: %s", agent, error)
        finally:
            if farewell is not None:
                link.say(refusal(lib.UDD_BYE, farewell))
            self.rounds.left(agent)
            agent.count_out()
            link.close()

    async def _work_with(self, agent: Agent, link: Link) -> None:
        """The agent's two tasks, until one of them ends: with what ended it, not a group of that."""
        failure: LinkClosedError | AgentError | None = None
        async with trio.open_nursery() as nursery:

            async def guard(task: Callable[[], Awaitable[None]]) -> None:
                nonlocal failure
                try:
                    await task()
                except (LinkClosedError, AgentError) as error:
                    # The first one counts; the other task may stumble over the same.
                    failure = failure or error
                except (BrokenPipeError, ConnectionResetError):
                    failure = failure or LinkClosedError(asked=True)
                nursery.cancel_scope.cancel()

            nursery.start_soon(guard, link.receive)
            nursery.start_soon(guard, agent.work)
        try:
            if failure is not None:
                raise failure
        finally:
            # Its traceback has this frame, which would keep the agent and its shared area.
            failure = None

    def _admit(self, sock: socket.socket, peer: Peer, hello: Hello, number: int, domain: Domain) -> tuple[Agent, Link]:
        """Makes the shared area and sends the welcome. Raises LinkClosedError, or OSError if memory is short."""
        quiet = self.config.quiet_breaks or bool(hello.flags & lib.UDD_HELLO_QUIET)
        with ExitStack() as stack:
            descriptor = _shared_area()
            stack.callback(os.close, descriptor)
            area = SharedArea(descriptor)
            descriptors = [descriptor]
            if hello.flags & lib.UDD_HELLO_NEED_UFFD and (userfaultfd := _open_userfaultfd()) is not None:
                stack.callback(os.close, userfaultfd)
                descriptors.append(userfaultfd)
            message = welcome(
                engine_id=self.identity,
                mount_dev=self.mount_dev,
                agent_id=number,
                flags=self._flags(quiet),
                vma_limit=self._vma_limit,
                holdoff_ms=self.config.holdoff_millisecs,
            )
            try:
                send(sock, message, descriptors)
            except (BrokenPipeError, ConnectionResetError):
                # Programs that end at once are nothing special.
                raise LinkClosedError(asked=False) from None

        def on_doorbell() -> None:
            agent.rung()
            self.rounds.change()

        link = Link(sock, answer_seconds=self.config.answer_seconds, on_doorbell=on_doorbell, strays=domain.strays)
        agent = Agent(
            number=number,
            peer=peer,
            hello=hello,
            domain=domain,
            link=link,
            area=area,
            vma_limit=self._vma_limit,
            # How much of a huge page others have would show in whether it is split.
            huge_page_threshold=1 if quiet else self.config.huge_page_threshold,
            counters=self.counters,
            others=self.rounds,
            newest_segment=lambda: self._numbers.newest,
            shares_first_read=self.config.chosen_policy.shares_first_read,
            quiet=quiet,
            shortage=self.shortage,
        )
        return agent, link

    def _flags(self, quiet: bool) -> int:
        flags: int = lib.UDD_CONFIG_ZERO_PAGES if self.config.zero_pages else 0
        if self.config.chosen_policy.hint_runs:
            flags |= lib.UDD_CONFIG_HINTS
        if self.config.chosen_policy.first_sight:
            flags |= lib.UDD_CONFIG_FIRST_SIGHT
        if self.config.smart_scan:
            flags |= lib.UDD_CONFIG_SMART_SCAN
        if quiet:
            flags |= lib.UDD_CONFIG_QUIET
        elif self.config.huge_page_threshold > 1:
            flags |= lib.UDD_CONFIG_KEEP_HUGE
        return flags

    def _free_number(self) -> int:
        """The next free agent number; they go round, so that one just left is not mistaken for its successor.

        Not through all there are: the index has a place for each number up to the highest.
        """
        turn = min(lib.UDD_AGENT_NUMBERS - 1, NUMBERS_PER_AGENT * self.config.agents_max)
        while True:
            self._last_number = self._last_number % turn + 1
            if self._last_number not in self.rounds.agents:
                return self._last_number

    # ---- control ----

    async def _perform(self, request: Request, peer: Peer) -> object:
        looks = sum(agent.peer.uid == peer.uid for agent in self.agents) if isinstance(request, StatusRequest) else 0
        if not await self._guests.turn(peer.uid, REQUEST_SECONDS * (1 + looks)):
            raise UdedupError(f"too many requests of uid {peer.uid} wait already: try again later")
        match request:
            case StatusRequest(kernel=with_kernel):
                return await self.status(peer, with_kernel=with_kernel)
            case MountRequest():
                clients.require_owner(peer, "mounting images")
                return await self._mount(request)
            case UmountRequest():
                clients.require_owner(peer, "unmounting images")
                return await self._umount(request)
            case ClonesRequest():
                clients.require_owner(peer, "listing clones")
                return await self._clone(request)
            case CloneRequest() | CloneChangeRequest():
                clients.require_owner(peer, "making or changing clones")
                return await self._clone(request)
            case UnmergeRequest(pid=pid):
                return await self._unmerge(self._chosen(pid, peer, "unmerging"))
            case PauseRequest(pid=pid):
                chosen = self._chosen(pid, peer, "pausing")
                for agent in chosen:
                    agent.paused = agent.paused or "paused on request"
                return len(chosen)
            case MergeRequest(pid=pid):
                chosen = self._chosen(pid, peer, "resuming")
                for agent in chosen:
                    agent.paused = ""
                return len(chosen)
            case CheckDomainRequest(label=label):
                if not self.rules.permits(peer.uid, label):
                    raise UdedupError(self.rules.explain(peer.uid, label))
                return True

    async def status(self, peer: Peer, *, with_kernel: bool, exact: bool = True) -> Status:
        """The report: of everything for root and the engine's user, for others of their own processes and domains.

        What it says of work done is over all domains, so others get zeros there.
        """
        everything = peer.uid in (0, os.geteuid())
        agents = [agent for agent in self.agents if everything or agent.peer.uid == peer.uid]
        view = None
        if with_kernel:
            pids = {agent.peer.pid for agent in agents}
            view = await trio.to_thread.run_sync(kernel.look, pids, abandon_on_cancel=True)
            view = view if everything else view.without_store
        return report.status(
            config=self.config,
            counters=self.counters if everything else Counters(),
            uptime=time.monotonic() - self._started,
            pages_to_scan=self.pace.pages_to_scan,
            vma_limit=self._vma_limit,
            hints=self.hints,
            everything=everything,
            pressure=self.pressure if self.pressure_files else None,
            agents=agents,
            domains=self.domains if everything else {agent.domain for agent in agents},
            images=[
                ImageStatus(
                    name=image.name,
                    path=str(image.path),
                    format=image.format,
                    size=image.size,
                    blocks_read=image.blocks_read,
                    blocks_served=image.watch.served,
                )
                for image in (self.images or () if everything else ())
            ],
            own=self._own_smaps,
            kernel=view,
            exact=exact,
        )

    def _chosen(self, pid: int | None, peer: Peer, what: str) -> list[Agent]:
        """Agents a request is about. Raises UdedupError if doing ``what`` to them is not the asker's business."""
        if pid is None:
            clients.require_owner(peer, f"{what} all processes")
            return self.agents
        chosen = [agent for agent in self.agents if agent.peer.pid == pid]
        if not chosen:
            raise UdedupError(f"no wrapped process has pid {pid}: see `udedup status`")
        for agent in chosen:
            if peer.uid != agent.peer.uid:
                clients.require_owner(peer, f"{what} a process of uid {agent.peer.uid}")
        return chosen

    async def _unmerge(self, agents: Sequence[Agent]) -> int:
        pages = 0
        for agent in agents:
            agent.paused = "unmerged on request"
        async with trio.open_nursery() as nursery:

            async def unmerge(agent: Agent) -> None:
                nonlocal pages
                ticket = agent.submit(agent.unmerge)
                if ticket is not None:
                    await ticket.wait(UNMERGE_SECONDS)
                    pages += ticket.result or 0

            for agent in agents:
                nursery.start_soon(unmerge, agent)
        return pages

    async def _mount(self, request: MountRequest) -> list[str]:
        secret = None if request.secret is None else clients.absolute(request.secret)
        opening = self._opening(request.format, secret)
        return [str(await self._show(clients.absolute(path), name, opening)) for name, path in request.images]

    async def _show(self, path: Path, name: str | None, opening: "Opening") -> Path:
        """Shows an image, and says where."""
        images, mount = self._require_mount()
        # In a thread: a slow disk must not hold up the engine, and a path in our own mount would wait for us.
        image = await trio.to_thread.run_sync(images.add, path, name, opening)
        self._watch(image)
        return mount / image.name

    async def _umount(self, request: UmountRequest) -> bool:
        from udedup.vdi.clone import Clone
        from udedup.vdi.filesystem import withdraw

        images, mount = self._require_mount()
        path = Path(os.path.normpath(request.path))
        shown = path.name if path.parent == Path(os.path.normpath(mount)) else request.image
        image = images.find(shown) if shown in images.by_name else images.find(request.path)
        await withdraw(images, image, on_removed=lambda: self._forget(image))
        if self.cloning is not None and isinstance(image, Clone):
            await self.cloning.hidden(image)
        return True

    async def _clone(self, request: CloneRequest | ClonesRequest | CloneChangeRequest) -> object:
        self._require_mount()
        if self.cloning is None:
            raise UdedupError("this engine keeps no clones: start it with --state-dir DIR")
        match request:
            case CloneRequest():
                secret = None if request.secret is None else clients.absolute(request.secret)
                overlay = None if request.overlay is None else clients.absolute(request.overlay)
                opening = self._opening(request.format, secret)
                return await self.cloning.create(request.name, clients.absolute(request.base), opening, overlay)
            case ClonesRequest():
                return await self.cloning.list()
            case CloneChangeRequest(name=name, change="show"):
                return await self.cloning.show(name)
            case CloneChangeRequest(name=name, change="commit"):
                return await self.cloning.commit(name)
            case CloneChangeRequest(name=name):
                await self.cloning.discard(name)
                return None

    def _require_mount(self) -> "tuple[Images, Path]":
        if self.images is None or self.config.mount is None:
            raise UdedupError("this engine has no mount: start it with --mount DIR")
        return self.images, self.config.mount

    # ---- images ----

    def load_images(self) -> "Images":
        """Opens the images the configuration names. Raises UdedupError."""
        # Only engines with a mount pay for FUSE.
        from udedup.vdi.images import Images
        from udedup.vdi.state import StateDirectory

        state = None
        if self.config.state_dir is not None:
            try:
                state = StateDirectory.open(self.config.state_dir)
            except UdedupError as error:
                # Digests are hints: it all works without.
                log.warning("digests of images are not kept: %s", error)
        self.images = Images(state)
        self.images.on_changed = self._distrust
        opening = self._opening(self.config.image_format, self.config.secret_file)
        for name, path in self.config.images:
            self._watch(self.images.add(path, name, opening))
        if self.config.state_dir is not None and self.config.mount is not None:
            from udedup.engine.cloning import Cloning
            from udedup.vdi.clonestore import CloneStore

            store = CloneStore(self.config.state_dir / "clones", self.config.allow_backing)
            self.cloning = Cloning(store, self.images, self.config.mount, watch=self._watch, forget=self._forget)
            self.cloning.show_again()
        return self.images

    def _opening(self, format_: str | None, secret: Path | None) -> "Opening":
        from udedup.vdi.formats.probe import Opening

        return Opening(format=format_, allow_backing=self.config.allow_backing, secret=secret)

    def _watch(self, image: "Image") -> None:
        self.hints.add_image(image.inode, image.digests, image.size)

    def _forget(self, image: "Image") -> None:
        self.hints.remove_image(image.inode)
        for domain in self.domains:
            domain.shelves.pop(image.inode, None)

    def shelves(self) -> "Shelves":
        """What readers of the mount are served from."""
        from udedup.engine.shelves import Shelves

        return Shelves(self.rounds.agents.values, self.counters)

    def _distrust(self, image: "Image") -> None:
        for agent in self.agents:
            agent.distrust(image.inode)

    def on_read(self, image: "Image", first_block: int, blocks: int, pid: int) -> None:
        """A content hint. Its digests are in the image's table, where the reader's place hint will find them.

        A page fault comes with no place hint: where the reader has the image mapped is known.
        """
        self.counters.hints_content += blocks
        image.blocks_read += blocks
        self.rounds.image_read(pid, image.inode, first_block, blocks)

    # ---- the end ----

    def close(self) -> None:
        """Gives its hold on the stores and images back."""
        for domain in self.domains:
            domain.store.close()
        if self.images is not None:
            self.images.close()


async def run_engine(
    config: EngineConfig,
    *,
    on_ready: Callable[[Ready], None],
    reloads: AsyncIterable[EngineConfig] | None = None,
    dumps: AsyncIterable[object] | None = None,
) -> None:
    """Runs an engine until cancelled; ``on_ready`` is called once the socket and the mount serve.

    ``reloads`` brings other settings while it runs (see ``udedup.engine.reload``), and each of ``dumps`` has it write
    what it is at into its state directory, if it has one (see ``udedup.engine.dump``).
    At the end the mount and the socket file are gone, and agents are left merged and on their own. Raises UdedupError
    (perhaps in an exception group) for what a person can put right.
    """
    config.check()
    _allow_descriptors()
    with (
        _listener(config) as listener,
        _metrics_socket(config) as metrics_socket,
        maplimit.raised(config.map_count),
        closing(Engine(config)) as engine,
        psi.PressureFiles(engine.pressure_files, period=PERIOD) as pressure,
    ):
        if config.drop_privileges:
            privileges.drop(mount=config.mount is not None)
        scheduler = Scheduler(engine.rounds, config.chosen_policy, engine.pace, sleep_millisecs=config.sleep_millisecs)
        async with trio.open_nursery() as nursery:
            if config.mount is not None:
                from udedup.vdi.filesystem import serve

                images = engine.load_images()
                show = partial(
                    serve,
                    config.mount,
                    images,
                    engine.on_read,
                    shelves=engine.shelves(),
                    allow_other=config.allow_other,
                )
                engine.mount_dev = await nursery.start(show)
            nursery.start_soon(scheduler.run)
            retirement = Retirement(engine, config.retire_seconds)
            nursery.start_soon(retirement.run)
            if engine.pressure_files:
                caches = Caches(
                    lambda: engine.domains, engine.hints, lambda: engine.images or (), engine.shortage, retirement.look
                )
                watch = PressureWatch(pressure, caches, engine.pressure, part_left=config.part_left)
                nursery.start_soon(watch.run)
            nursery.start_soon(engine.accept, listener)
            if metrics_socket is not None:
                from udedup.engine.metrics import endpoint

                nursery.start_soon(endpoint(engine).serve, metrics_socket)
            on_ready(Ready(config.socket, config.mount))
            nursery.start_soon(config.service.show_life)
            if reloads is not None:
                nursery.start_soon(reload.follow, reloads, engine, scheduler)
            if dumps is not None and config.state_dir is not None:
                nursery.start_soon(dump.follow, dumps, engine, config.state_dir)
            with config.service.serving():
                await trio.sleep_forever()


def _listener(config: EngineConfig) -> AbstractContextManager[socket.socket]:
    if config.service.listener is not None:
        return config.service.listening()
    return listening(config.socket, config.socket_mode, config.socket_group)


def _metrics_socket(config: EngineConfig) -> AbstractContextManager[socket.socket | None]:
    """Where to answer for metrics. Raises UdedupError."""
    if config.metrics is None:
        return nullcontext()
    with needing("metrics", "--metrics"):
        from udedup.engine.metrics import metrics_socket
    return metrics_socket(config.metrics, config.metrics_group)


def _pace(config: EngineConfig, pressure: PressureState) -> Pace:
    sleep = config.sleep_millisecs / 1000
    if config.advisor is None:
        return EagerPace(FixedPace(config.pages_to_scan), pressure, sleep_seconds=sleep, max_cpu=CPU_MOST)
    pace = ScanTimePace(config.advisor, pages_to_scan=config.pages_to_scan, sleep_seconds=sleep)
    return EagerPace(pace, pressure, sleep_seconds=sleep, max_cpu=config.advisor.max_cpu)


def _width(config: EngineConfig) -> int:
    return 1 if config.sleep_millisecs else WIDTH


def _rules(config: EngineConfig) -> DomainRules:
    return DomainRules(os.geteuid(), config.allowed_domains, config.shared_domains, unmapped_uid())


def _allow_descriptors() -> None:
    """Each agent and each segment takes two descriptors; the usual limit of 1024 would be 8 GiB of store."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _shared_area() -> int:
    """The descriptor of a fresh shared area. Raises OSError if there is no memory or descriptor for it."""
    descriptor = os.memfd_create("udedup-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
    try:
        os.ftruncate(descriptor, SHARED_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _open_userfaultfd() -> int | None:
    """The device that lets the agent handle page faults, None if we may not open it either."""
    try:
        return os.open(USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        log.warning("an agent asked for %s, which can't be opened: %s", USERFAULTFD, error.strerror)
        return None
