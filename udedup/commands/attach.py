"""Let a program that runs already share its memory, without a restart.

One thread of it is held for some milliseconds while the agent is loaded, and then all of them for some more. A program
that can't be entered safely is left as it is, and one line says why. `udedup detach` is the way back; `udedup help
limits` tells what is different from a program started by `udedup run`.
"""

import argparse
import os

from udedup.commands.host import agent_library, kernel_refusal
from udedup.commands.options import add_agent_flags, add_socket_option, count
from udedup.errors import UdedupError
from udedup.labels import OFF


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup attach``."""
    add_socket_option(parser)
    add_agent_flags(parser)
    parser.add_argument("pid", type=count(1), metavar="PID", help="the program's process")


def run(args: argparse.Namespace) -> int:
    """Attaches and prints for how long the program did not run."""
    from udedup.attach.session import attach
    from udedup.commands.run import engine_listens
    from udedup.engine.control import explain

    refusal = kernel_refusal(os.uname().release)
    if refusal:
        raise UdedupError(refusal)
    if args.domain == OFF:
        raise UdedupError("a program in the domain off shares nothing: use `udedup detach`")
    if not engine_listens(args.socket):
        raise UdedupError(explain(args.socket, FileNotFoundError(2, "")))
    held = attach(args.pid, agent_library(), args.socket, args.domain, quiet=args.quiet_breaks, keep_ksm=args.keep_ksm)
    print(
        f"process {args.pid} shares its memory from now on. It was held for {held.all * 1e3:.1f} ms "
        f"({held.threads} threads), and one thread for {held.one * 1e3:.1f} ms"
    )
    return 0
