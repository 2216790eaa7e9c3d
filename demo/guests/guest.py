"""A QEMU guest: starts it, runs commands in it, and ends it."""

import base64
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import field, frozen

from demo.guests.image import GuestImage
from demo.guests.lines import Lines
from demo.guests.qmp import Monitor
from udedup.errors import UdedupError

QEMU = "qemu-system-x86_64"
MIB = 1 << 20
BOOT_SECONDS = 120.0
END_SECONDS = 30.0
COMMAND_BYTES_MAX = 2048
"""Of a command line: more could overrun the guest's terminal buffer."""


class GuestError(UdedupError):
    """A guest that did not do what it was to; the message ends with its console's last lines."""


@frozen
class GuestConfig:
    """What a guest is made of."""

    image: GuestImage
    """Kernel and initrd come from here."""

    disk: Path | None = None
    """The image's disk as the guest is to read it, on the udedup mount say; None: ``image.disk`` itself."""

    name: str = "guest"
    """For people and for the names of its files."""

    memory_mib: int = 256
    """Guest RAM."""

    processors: int = 1
    """Virtual ones."""

    mem_merge: bool = True
    """Whether QEMU gives its RAM to KSM (which takes no notice when the agent suppresses it)."""

    aio: str = "threads"
    """How QEMU reads the disk: threads, native or io_uring. ``native`` takes cache=none."""

    cache: str = "writeback"
    """QEMU's cache mode for the disk."""

    forward: Mapping[int, int] = field(factory=dict)
    """Host TCP ports on 127.0.0.1 to guest TCP ports; the guest has a network if there are any."""

    incoming: str | None = None
    """URI to take a migration from, in place of booting."""

    def arguments(self, overlay: Path, console: Path, command_fd: int, monitor_fd: int) -> list[str]:
        """The command line; ``overlay`` is the disk, ``console`` the file for kernel messages."""
        merge = "on" if self.mem_merge else "off"
        arguments = [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", self.name),
            *("-machine", f"pc,mem-merge={merge},hpet=off", "-cpu", "max", "-smp", str(self.processors)),
            # TCG's buffer for translated code would be 1 GiB, in huge pages.
            *("-accel", "tcg,thread=multi,tb-size=128", "-m", str(self.memory_mib)),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)),
            *("-append", "console=ttyS0 quiet loglevel=4 panic=-1 random.trust_cpu=on"),
            *("-drive", f"file={overlay},format=qcow2,if=virtio,cache={self.cache},aio={self.aio}"),
            *("-device", "virtio-rng-pci"),
            *("-serial", f"file:{console}"),
            *("-chardev", f"socket,id=command,fd={command_fd}", "-serial", "chardev:command"),
            *("-chardev", f"socket,id=monitor,fd={monitor_fd}", "-mon", "chardev=monitor,mode=control"),
        ]
        if self.forward:
            ports = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in self.forward.items())
            arguments += ["-netdev", f"user,id=net{ports}", "-device", "virtio-net-pci,netdev=net,romfile="]
        if self.incoming:
            arguments += ["-incoming", self.incoming]
        return arguments


@frozen
class Completed:
    """A command that ran in a guest."""

    status: int
    """Exit status."""

    output: str
    """What it printed, errors included."""


class Guest:
    """A running guest. Made by :func:`started` or :func:`booted`."""

    def __init__(
        self,
        config: GuestConfig,
        process: trio.Process,
        overlay: Path,
        console: Path,
        commands: trio.abc.Stream,
        monitor: trio.abc.Stream,
    ) -> None:
        self.config = config
        self.process = process
        self.overlay = overlay
        """The guest's own writes: a qcow2 file on top of the disk."""
        self.console = console
        """File with the kernel's messages."""
        self.monitor = Monitor(monitor)
        """QEMU's own commands."""
        self._lines = Lines(commands)
        self._lock = trio.Lock()
        self._number = 0

    @property
    def pid(self) -> int:
        """QEMU's process: `udedup run` becomes it."""
        return self.process.pid

    async def ready(self, seconds: float = BOOT_SECONDS) -> None:
        """Waits until the guest takes commands. Raises GuestError if it does not get there."""
        with self._failing("boot", seconds), trio.fail_after(seconds):
            while self.config.incoming and not (await self.monitor.command("query-status"))["running"]:
                await trio.sleep(0.1)
            while not self.config.incoming and await self._lines.read() != b"ready":
                pass

    async def run(self, command: str, *, check: bool = True, seconds: float = BOOT_SECONDS) -> Completed:
        """Runs a shell command of at most COMMAND_BYTES_MAX bytes in the guest and returns how it ended.

        Raises GuestError if it takes longer than ``seconds`` or, with ``check``, if its status is not 0.
        """
        encoded = base64.b64encode(command.encode())
        if len(encoded) > COMMAND_BYTES_MAX:
            raise ValueError(f"a command of {len(encoded)} encoded bytes is more than a guest can take")
        async with self._lock:
            with self._failing(f"run {command!r}", seconds), trio.fail_after(seconds):
                self._number += 1
                await self._lines.write(b"%d %s" % (self._number, encoded))
                number, status, output = 0, b"", b""
                while number != self._number:  # the answer to an earlier one that took too long
                    first, status, output = (await self._lines.read()).split(b" ")
                    number = int(first)
        done = Completed(int(status), base64.b64decode(output).decode(errors="replace"))
        if check and done.status:
            last = (done.output.strip().splitlines() or ["no message"])[-1]
            raise GuestError(f"{self.config.name}: {command!r} ended with {done.status}: {last}")
        return done

    async def ram(self) -> range:
        """The addresses of the guest's RAM in QEMU's process (of what lies below 3 GiB)."""
        # "Host virtual address for 0x0 (pc.ram) is 0x7f…"
        address = int((await self.monitor.human("gpa2hva 0")).rpartition(" ")[2], 16)
        return range(address, address + min(self.config.memory_mib, 3072) * MIB)

    async def save(self, tag: str) -> None:
        """Saves the guest's state as a snapshot in its overlay."""
        await self._human(f"savevm {tag}")

    async def load(self, tag: str) -> None:
        """Goes back to a snapshot, memory and disk."""
        await self._human(f"loadvm {tag}")

    async def migrate(self, file: Path, seconds: float = BOOT_SECONDS) -> None:
        """Writes the guest's state to ``file`` and leaves the guest stopped; ``incoming="exec:cat FILE"`` takes it."""
        await self.monitor.command("migrate", uri=f"exec:cat >'{file}'")
        with self._failing("migrate", seconds), trio.fail_after(seconds):
            while (info := await self.monitor.command("query-migrate"))["status"] != "completed":
                if info["status"] in ("failed", "cancelled"):
                    raise GuestError(f"{self.config.name} did not migrate: {info.get('error-desc', info['status'])}")
                await trio.sleep(0.1)

    async def shut_down(self, seconds: float = END_SECONDS) -> None:
        """Has the guest unmount its disk and switch off, and waits for QEMU's end. Raises GuestError if it fails."""
        # Daemons keep the file system busy.
        text = "kill -TERM -1; sleep 1; kill -KILL -1; sync; mount -o remount,ro / && exec busybox poweroff -f"
        async with self._lock:
            with self._failing("shut down", seconds), trio.fail_after(seconds):
                await self._lines.write(b"0 " + base64.b64encode(text.encode()))
                status = await self.process.wait()
        if status:
            raise GuestError(f"{self.config.name} ended with {status}")

    async def quit(self, seconds: float = END_SECONDS) -> None:
        """Ends QEMU at once, in order; the guest's disk stays as it is."""
        with self._failing("quit", seconds), trio.fail_after(seconds):
            await self.monitor.command("quit")
            await self.process.wait()

    async def _human(self, line: str) -> None:
        answer = await self.monitor.human(line)
        if answer:  # says something only if it fails
            raise GuestError(f"{self.config.name}: {line}: {answer}")

    def _failing(self, what: str, seconds: float) -> "_Failing":
        return _Failing(self, what, seconds)


class _Failing:
    """Turns a time that is up, and an end of QEMU, into a GuestError."""

    def __init__(self, guest: Guest, what: str, seconds: float) -> None:
        self._guest = guest
        self._what = what
        self._seconds = seconds

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        guest = self._guest
        if isinstance(error, trio.TooSlowError):
            problem = f"is not done after {self._seconds:.0f} s"
        elif isinstance(error, EOFError):
            problem = "failed, QEMU is gone"
        else:
            return
        last = guest.console.read_text(errors="replace").splitlines()[-5:] if guest.console.exists() else []
        raise GuestError(f"{guest.config.name}: {self._what} {problem}; console: {' | '.join(last)}") from error


def wrapped(engine_socket: Path, *options: str) -> tuple[str, ...]:
    """Returns what to put before a command so that it shares its memory; ``options`` are those of `udedup run`."""
    return (sys.executable, "-m", "udedup", "run", "--socket", str(engine_socket), *options, "--")


@asynccontextmanager
async def started(config: GuestConfig, folder: Path, wrap: Sequence[str] = ()) -> AsyncIterator[Guest]:
    """Starts a guest behind ``wrap`` (:func:`wrapped` or nothing); QEMU is gone at the end of the block, in any case.

    ``folder`` gets the guest's overlay, console and QEMU's messages, named after it; an overlay that is there is used
    as it is. Raises GuestError if QEMU is missing.
    """
    overlay, console, log = (folder / f"{config.name}.{kind}" for kind in ("qcow2", "console", "log"))
    if not overlay.exists():
        backing = (config.disk or config.image.disk).absolute()
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "raw", str(overlay)]
        await _run_tool(create)
    command, command_far = socket.socketpair()
    monitor, monitor_far = socket.socketpair()
    with command, monitor, log.open("ab") as messages:
        descriptors = (command_far.fileno(), monitor_far.fileno())
        try:
            process = await trio.lowlevel.open_process(
                [*wrap, *config.arguments(overlay, console, *descriptors)],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                pass_fds=descriptors,
            )
        except FileNotFoundError:
            raise GuestError(f"{QEMU} is not installed: apt-get install qemu-system-x86") from None
        finally:
            command_far.close()
            monitor_far.close()
        try:
            yield Guest(config, process, overlay, console, _stream(command), _stream(monitor))
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()


@asynccontextmanager
async def booted(config: GuestConfig, folder: Path, wrap: Sequence[str] = ()) -> AsyncIterator[Guest]:
    """Like :func:`started`, and waits until the guest takes commands."""
    async with started(config, folder, wrap) as guest:
        await guest.ready()
        yield guest


async def _run_tool(command: Sequence[str]) -> None:
    try:
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    except FileNotFoundError:
        raise GuestError(f"{command[0]} is not installed: apt-get install qemu-utils") from None
    if done.returncode:
        raise GuestError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")


def _stream(end: socket.socket) -> trio.SocketStream:
    end.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(end))
