"""Wrapped virtual machines share memory while everything in them stays right: files, disk, snapshots and migration."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from support.engine import Engine
from support.ledger import Ledger

from demo.guests import Guest, GuestConfig, GuestImage, booted, build_image, wrapped

CACHE = Path(__file__).parent.parent.parent / "demo/.cache/guests"
CHECK = "sha256sum --quiet -c /etc/manifest"
LOOK = "cat /root/told; diff -r /run/copy /run/second && echo same"
SHARING_LEAST = 5000

pytestmark = [
    pytest.mark.require("userfaultfd-move", "fuse", "root", "qemu"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return build_image("boot", CACHE)


@pytest.fixture
def shared(engine_factory: Callable[..., Engine], image: GuestImage) -> Engine:
    """An engine at full speed with the guests' disk."""
    return engine_factory("--sleep-millisecs", "0", images={"boot": image.disk})


async def sharing(engine: Engine, least: int) -> None:
    """Waits until so many pages are shared."""
    text = f"{least} pages shared"
    await trio.to_thread.run_sync(engine.wait_until, text, lambda status: status["pages_sharing"] > least)


def assert_sound(overlay: Path) -> None:
    """The file system that a guest left on its disk is without a fault."""
    raw = overlay.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(overlay), str(raw)], check=True)
    done = subprocess.run(["/usr/sbin/e2fsck", "-f", "-n", str(raw)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def write_and_verify(guest: Guest, engine: Engine) -> None:
    """Files of the image and new ones, before and after merging."""
    await guest.run(CHECK)
    await guest.run("dd if=/dev/urandom of=/root/new bs=1M count=8 2>&1; cp /usr/lib/python3.11/*.py /root")
    await guest.run("cd /root; sync; sha256sum new *.py >sums")
    await sharing(engine, SHARING_LEAST)
    await guest.run("cd /root; sha256sum --quiet -c sums; cp new again; cmp new again")
    await guest.run("echo 3 >/proc/sys/vm/drop_caches; cd /root; sha256sum --quiet -c sums")
    await guest.run(CHECK)


def ram_flags(guest: Guest, ram: range) -> tuple[int, dict[int, set[str]]]:
    """How many mappings of a guest's RAM are the store's, and the VmFlags of all of them by their addresses."""
    store, flags, start = 0, {}, 0
    for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start = int(first.partition("-")[0], 16)
            store += start in ram and "udedup-store" in line
        elif start in ram and first == "VmFlags:":
            flags[start] = set(rest.split())
    return store, flags


async def assert_advice_is_kept(guest: Guest) -> None:
    """What QEMU advised for its RAM holds for merged pages too, and it stays withheld from KSM."""
    ram = await guest.ram()
    looks = []
    for _ in range(3):
        store, flags = ram_flags(guest, ram)
        assert store > 100
        looks.append({start for start, has in flags.items() if not {"dc", "hg"} <= has or "mg" in has})
        await trio.sleep(0.1)
    # A mapping gets its advice one system call after it was made: wrong is what is wrong in every look.
    assert not set.intersection(*looks)


async def test_guests_stay_right(shared: Engine, image: GuestImage, tmp_path: Path, ledger: Ledger) -> None:
    """Two guests from one image: contents, the kernel's view of their RAM, and their disks after the end."""
    assert shared.mount is not None
    disk = shared.mount / "boot"

    async def live(name: str) -> None:
        config = GuestConfig(image=image, disk=disk, name=name, memory_mib=192)
        async with booted(config, tmp_path, wrapped(shared.socket)) as guest:
            ledger.add_process(guest.pid)
            await write_and_verify(guest, shared)
            await assert_advice_is_kept(guest)
            await guest.shut_down()
            await trio.to_thread.run_sync(assert_sound, guest.overlay)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live, "first")
        nursery.start_soon(live, "second")
    hints = (await trio.to_thread.run_sync(shared.status))["hints"]
    assert min(hints["place"], hints["content"], hints["merged"]) > 1000


async def test_snapshot_and_migration(shared: Engine, image: GuestImage, tmp_path: Path, ledger: Ledger) -> None:
    """A merged guest goes back to a snapshot, and moves to another QEMU through a file."""
    assert shared.mount is not None
    config = GuestConfig(image=image, disk=shared.mount / "boot", memory_mib=192)
    state = tmp_path / "state"
    async with booted(config, tmp_path, wrapped(shared.socket)) as guest:
        ledger.add_process(guest.pid)
        await guest.run(CHECK)
        await guest.run("echo before >/root/told; cp -r /usr/lib/python3.11 /run/copy; cp -r /run/copy /run/second")
        await sharing(shared, SHARING_LEAST)
        await guest.save("here")
        await guest.run("echo after >/root/told; rm -r /run/second; sync")
        await guest.load("here")
        assert (await guest.run(LOOK)).output == "before\nsame\n"
        await guest.run(CHECK)
        await guest.migrate(state)
        await guest.quit()
    arrived = GuestConfig(image=image, disk=config.disk, memory_mib=192, incoming=f"exec:cat '{state}'")
    async with booted(arrived, tmp_path, wrapped(shared.socket)) as guest:
        ledger.add_process(guest.pid)
        assert (await guest.run(LOOK)).output == "before\nsame\n"
        await guest.run(CHECK)
        await guest.shut_down()
        assert_sound(guest.overlay)
