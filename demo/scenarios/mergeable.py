"""Runs a command with all its memory offered to KSM: ``python -m demo.scenarios.mergeable [--] COMMAND ARGUMENT…``.

The kernel passes the setting on through execve (Linux 6.7 or later).
"""

import ctypes
import os
import sys

PR_SET_MEMORY_MERGE = 67


def main() -> None:
    """Becomes the command."""
    command = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
        sys.exit(f"this kernel can't offer a process to KSM: {os.strerror(ctypes.get_errno())}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
