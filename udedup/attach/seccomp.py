"""What a thread's seccomp filter would do to the agent."""

from pathlib import Path


def forbidden_call(tid: int) -> str | None:
    """Returns what is in the way, in some words behind the program's name; None if nothing is."""
    try:
        lines = Path(f"/proc/{tid}/status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None  # it has ended
    mode = next((line.split()[1] for line in lines if line.startswith("Seccomp:")), "0")
    return None if mode == "0" else "has a seccomp filter, and it can't be known whether it lets the agent in"
