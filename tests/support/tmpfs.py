"""A file system of its own for a test, as small as is wanted."""

import subprocess
from pathlib import Path

from support.ledger import Ledger


def mount_tmpfs(directory: Path, options: str, ledger: Ledger) -> Path:
    """Makes the directory and mounts an empty tmpfs there, with mount(8)'s ``options``; it goes with the test."""
    directory.mkdir()
    ledger.add_mount(directory)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", directory], check=True)
    return directory
