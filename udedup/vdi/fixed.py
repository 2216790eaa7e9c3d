"""A directory in which nothing can be made, removed or renamed: the answers to who tries.

The mount itself is not read-only, since clones can be written.
"""

import errno
from typing import NoReturn

import pyfuse3
from pyfuse3 import FileHandleT, FileInfo, FlagT, InodeT, ModeT


def refuse() -> NoReturn:
    """What a read-only file system answers."""
    raise pyfuse3.FUSEError(errno.EROFS)


class FixedDirectory(pyfuse3.Operations):
    """Refuses whatever changes a directory."""

    async def create(
        self, parent_inode: InodeT, name: bytes, mode: ModeT, flags: FlagT, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, pyfuse3.EntryAttributes]:
        refuse()

    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: ModeT, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        refuse()

    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        refuse()

    async def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        refuse()

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        refuse()

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        refuse()

    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        refuse()

    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        refuse()

    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        refuse()

    async def removexattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        refuse()

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """There is nothing that could be lost."""
