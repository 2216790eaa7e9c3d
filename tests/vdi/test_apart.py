"""An engine that is killed while it waits for an answer of its own, from its own mount, ends, and so does the mount."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

# Serves one file which can't be opened in finite time, opens it, and says so once the kernel waits for us.
PROGRAM = """
import os, stat, sys
import pyfuse3, trio
from udedup._native import ffi, lib

class Stuck(pyfuse3.Operations):
    def attributes(self, inode):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_size = inode, 4096
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o444
        return entry

    async def getattr(self, inode, ctx):
        return self.attributes(inode)

    async def lookup(self, parent, name, ctx):
        return self.attributes(2)

    async def open(self, inode, flags, ctx):
        assert ctx.pid == THREAD[0] != 0
        print("waits", flush=True)
        await trio.sleep_forever()

THREAD = ffi.new("uint32_t *")
STRETCHES = ffi.new("struct udd_stretch[]", [(0, 4096, 0)])

def use():
    lib.udd_apart_read(os.fsencode(sys.argv[1]) + b"/file", STRETCHES, 1, ffi.new("char[4096]"), THREAD)

async def main():
    pyfuse3.init(Stuck(), sys.argv[1], {"fsname=udedup", "subtype=udedup", *pyfuse3.default_options})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        nursery.start_soon(trio.to_thread.run_sync, use)

trio.run(main)
"""


@pytest.mark.usefixtures("fuse")
def test_a_killed_engine_waits_for_nobody(place: Path) -> None:
    mount = place / "mount"
    mount.mkdir()
    with subprocess.Popen([sys.executable, "-c", PROGRAM, mount], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "waits\n"
        engine.kill()
        engine.wait(20)
    with pytest.raises(OSError, match="not connected") as caught:
        (mount / "other").stat()
    assert caught.value.errno == errno.ENOTCONN
