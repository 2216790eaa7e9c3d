"""Run a command so that its memory can be shared.

With no engine running, one is started for the command's life. The exit status is the command's.
"""

import argparse
import os
import sys
from pathlib import Path

from udedup.commands.host import AGENT_NAME, agent_library, kernel_refusal, require_host
from udedup.commands.options import add_agent_flags, add_socket_option
from udedup.commands.program import ProgramError, execute, find_program
from udedup.errors import UdedupError
from udedup.labels import OFF
from udedup.places import temporary_socket


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup run``."""
    parser.usage = "udedup run [-h] [--socket PATH] [--domain LABEL] [--quiet-breaks] [--keep-ksm] [--] CMD [ARG ...]"
    add_socket_option(parser)
    add_agent_flags(parser)
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD ARG", help="the command and its arguments")


def run(args: argparse.Namespace) -> int:
    """Becomes the command, or stays beside it while an engine of its own lives."""
    argv: list[str] = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        args.subparser.error("no command given")
    environment = dict(os.environ)
    if args.domain == OFF:
        environment = unwrapped_environment(environment)
    try:
        program = find_program(argv, environment)
    except ProgramError as error:
        print(f"udedup: {error}", file=sys.stderr)
        return error.status
    if args.domain == OFF:
        return execute(program, environment)
    if program.obstacle:
        print(
            f"udedup: {program.path} {program.obstacle}: the agent cannot enter it, it runs without sharing memory",
            file=sys.stderr,
        )
        return execute(program, environment)
    refusal = kernel_refusal(os.uname().release)
    if refusal:
        raise UdedupError(refusal)
    library = agent_library()

    socket: Path = args.socket
    if engine_listens(socket):
        if args.domain is not None:
            from udedup.engine.control import request

            request(socket, {"op": "check_domain", "label": args.domain})
        return execute(program, wrapped_environment(environment, args, library, socket))

    require_host()
    from udedup.commands.embedded import run_beside_engine

    return run_beside_engine(program, args.domain, lambda own: wrapped_environment(environment, args, library, own))


def engine_listens(path: Path) -> bool:
    """Whether an engine takes connections at ``path``. Raises UdedupError if there is something we may not use."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(str(path))
        except FileNotFoundError:
            return False
        except ConnectionRefusedError:
            # Files of other types refuse as well.
            if path.is_socket() or not path.exists():
                return False
            raise UdedupError(f"{path} is no socket: name the engine's with --socket") from None
        except OSError as error:
            from udedup.engine.control import explain

            raise UdedupError(explain(path, error)) from None
        if path == temporary_socket():
            from udedup.engine.control import require_trusted

            require_trusted(connection, path)
    return True


def wrapped_environment(
    environment: dict[str, str], args: argparse.Namespace, library: Path, socket: Path
) -> dict[str, str]:
    """Returns ``environment`` with what makes the loader bring in the agent, and the agent find its engine."""
    added = {"LD_PRELOAD": ":".join([str(library), *_preloads(environment)]), "UDEDUP_SOCKET": str(socket.absolute())}
    if args.domain is not None:
        added["UDEDUP_DOMAIN"] = args.domain
    if args.quiet_breaks:
        added["UDEDUP_QUIET_BREAKS"] = "1"
    if args.keep_ksm:
        added["UDEDUP_KEEP_KSM"] = "1"
    return environment | added


def unwrapped_environment(environment: dict[str, str]) -> dict[str, str]:
    """Returns ``environment`` without what an outer ``udedup run`` has put there."""
    removed = {"LD_PRELOAD", "UDEDUP_DOMAIN", "UDEDUP_QUIET_BREAKS", "UDEDUP_KEEP_KSM"}
    left = {name: value for name, value in environment.items() if name not in removed}
    preloads = _preloads(environment)
    return left | {"LD_PRELOAD": ":".join(preloads)} if preloads else left


def _preloads(environment: dict[str, str]) -> list[str]:
    """What ``environment`` preloads besides the agent."""
    items = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    return [item for item in items if Path(item).name != AGENT_NAME]
