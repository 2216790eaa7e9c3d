"""Image formats: each tells where the bytes of a disk are; reading them is the same for all.

``probe`` finds out what a file is and opens it with all it rests on; ``layer`` says what an opened image can do.
"""

from typing import Final

FORMATS: Final = ("raw", "qcow2", "vdi", "vmdk", "vpc", "vhdx")
"""QEMU's names; vpc is VHD."""
