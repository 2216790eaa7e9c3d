"""Virtual machines beside the torture programs: each verifies its own files, over and over, while its memory merges."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from demo.guests import MANIFEST, GuestConfig, GuestImage, started, wrapped

CHECK: Final = f"sha256sum --quiet -c /{MANIFEST}"
FORGET: Final = "echo 3 >/proc/sys/vm/drop_caches"
LAP: Final = (
    # Of the image, from the disk into the guest's page cache; then what is there already, and merged by now.
    f"{FORGET} && {CHECK} && {CHECK}",
    # Copies in its memory, equal to each other and to what is cached; then broken and made again.
    "rm -rf /run/copy && cp -r /usr/lib/python3.11 /run/copy && diff -r /usr/lib/python3.11 /run/copy",
    "dd if=/dev/urandom of=/run/noise bs=64k count=32 2>/dev/null && cp /run/noise /root/noise && sync",
    f"{FORGET} && cmp /run/noise /root/noise && diff -r /usr/lib/python3.11 /run/copy",
)
"""What a guest does in a lap; every command must succeed."""

MEMORY_MIB: Final = 192
PATIENCE: Final = 600.0
"""A command may take so long, s: emulated, on a machine whose processors are busy with everything else."""


@attrs.define
class Verified:
    """What guests have done."""

    laps: int = 0
    files: int = 0
    """Of the image whose checksum was right, each time anew."""


async def verify(
    image: GuestImage,
    disk: Path,
    folder: Path,
    name: str,
    socket: Path,
    counters: Path,
    over: Callable[[], bool],
    tell_pid: Callable[[int], None],
    ret: Verified,
) -> None:
    """Runs one wrapped guest until ``over``, at the end of a lap. Raises GuestError if anything in it is not right.

    ``disk`` is the image's as the guest is to read it, ``counters`` the file in which its agent counts; ``tell_pid``
    is told QEMU's.
    """
    config = GuestConfig(image=image, disk=disk, name=name, memory_mib=MEMORY_MIB)
    wrap = ("env", f"UDEDUP_TEST_COUNTERS={counters}", *wrapped(socket))
    async with started(config, folder, wrap) as guest:
        tell_pid(guest.pid)
        await guest.ready(PATIENCE)
        while True:
            for command in LAP:
                await guest.run(command, seconds=PATIENCE)
            ret.laps += 1
            ret.files += 2 * image.files
            if over():
                break
        await guest.shut_down()
