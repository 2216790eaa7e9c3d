"""Run the engine in the foreground: it tells wrapped programs which pages to share, and serves disk images.

SIGTERM and SIGINT end it in order, SIGHUP has it read its settings again, and SIGUSR1 has it write what
`udedup status --json` shows to status.json in its state directory.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from udedup.commands.host import require_host
from udedup.commands.options import (
    add_advisor_options,
    add_agent_options,
    add_backing_option,
    add_image_options,
    add_metrics_options,
    add_state_option,
    allowed_domain,
    count,
    group,
    image_argument,
    named_label,
    ratio,
    socket_mode,
)
from udedup.engine.policies import POLICIES
from udedup.errors import UdedupError
from udedup.places import default_socket

if TYPE_CHECKING:
    from udedup.engine.config import Ready

COLLECT_AFTER = 20_000
"""Objects made until Python looks for garbage; its default is 700."""

_PR_SET_PDEATHSIG = 1


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``udedup engine``, which are those of the file as well (``udedup.commands.settings``)."""
    limits = parser.add_argument_group("limits")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings; options given here go before them (default: /etc/udedup.toml for root, "
        "$XDG_CONFIG_HOME/udedup/udedup.toml for others, if it is there)",
    )
    parser.add_argument(
        "--socket",
        type=Path,
        default=default_socket(),
        metavar="PATH",
        help="where to listen (default: $UDEDUP_SOCKET, else %(default)s)",
    )
    parser.add_argument(
        "--socket-mode",
        type=socket_mode,
        metavar="MODE",
        help="permissions of the socket: who may connect. 666 serves all users (default: 600, with a group 660)",
    )
    parser.add_argument("--socket-group", type=group, metavar="GROUP", help="let this group's users connect")
    parser.add_argument("--mount", type=Path, metavar="DIR", help="an empty directory to show the images in")
    parser.add_argument(
        "--image",
        type=image_argument,
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="show this disk image as a raw one, read-only, as DIR/NAME (default: its own name, which ends in .raw"
        " unless the image is raw itself); may be repeated",
    )
    add_image_options(parser)
    add_backing_option(parser)
    add_state_option(parser)
    parser.add_argument(
        "--allow-other",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let other users read those images in the mount whose files they may read (default: no)",
    )
    parser.add_argument(
        "--policy",
        choices=tuple(POLICIES),
        default="xlh",
        help="linear: scan memory in turns; xlh: look first where I/O just put content; eager: the same at once, and"
        " share image blocks from their first read on (default: %(default)s)",
    )
    limits.add_argument(
        "--pages-to-scan",
        type=count(1),
        default=1000,
        metavar="N",
        help="pages to look at before each sleep (default: %(default)s)",
    )
    limits.add_argument(
        "--sleep-millisecs",
        type=count(0),
        default=20,
        metavar="N",
        help="how long to sleep between; 0: no limit on the rate (default: %(default)s)",
    )
    parser.add_argument(
        "--smart-scan",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pass over pages that never change, or always, for up to 8 rounds (default: yes)",
    )
    add_advisor_options(limits)
    add_agent_options(limits)
    parser.add_argument(
        "--hint-ratio",
        type=ratio,
        default="1:1",
        metavar="H:S",
        help="spurts spent on hinted pages to spurts of the linear scan (default: %(default)s)",
    )
    parser.add_argument(
        "--huge-page-threshold",
        type=count(0),
        default=8,
        metavar="PAGES",
        help="split a transparent huge page only if at least PAGES of its 512 pages would merge or are zero; "
        "0 or 1: always, as KSM does (default: %(default)s)",
    )
    parser.add_argument(
        "--quiet-breaks",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let writes take as long where a page was only looked at as where it is shared, so that their time tells "
        "nothing about others' memory; for all programs, not only those started with `udedup run --quiet-breaks` "
        "(default: no)",
    )
    limits.add_argument(
        "--hint-slots",
        type=count(1),
        default=1 << 18,
        metavar="N",
        help="hints remembered, the oldest are forgotten (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-domain",
        type=allowed_domain,
        action="append",
        default=[],
        metavar="UID:LABEL",
        help="let programs of user UID join the trust domain LABEL; may be repeated",
    )
    parser.add_argument(
        "--shared-domain",
        type=named_label,
        action="append",
        default=[],
        metavar="LABEL",
        help="let all users named for LABEL with --allow-domain be in one domain, not in one each; may be repeated",
    )
    parser.add_argument(
        "--zero-pages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave pages of zeros to the kernel's own page of zeros (default: yes)",
    )
    parser.add_argument(
        "--pressure",
        choices=("auto", "off"),
        default="auto",
        help="watch the memory pressure of the machine and of the engine's control group, where the kernel tells: "
        "scan faster when programs wait for memory, and drop caches when they wait for long (default: %(default)s)",
    )
    limits.add_argument(
        "--max-map-count",
        type=count(1),
        metavar="N",
        help="raise vm.max_map_count to N while the engine runs: each run of shared pages is a mapping (root only)",
    )
    add_metrics_options(parser)
    parser.add_argument(
        "--log-level",
        choices=("error", "warning", "info", "debug"),
        default="warning",
        help="what to log on stderr (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: each line is an object with time, level, logger and message (default: %(default)s)",
    )
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # end when this process does (`udedup run`)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT, then leaves the programs merged and on their own."""
    if args.parent is None:
        return _serve(args)
    try:
        _end_with(args.parent)
        return _serve(args)
    finally:
        if os.getppid() != args.parent:
            _remove(args.socket.parent)


def _serve(args: argparse.Namespace) -> int:
    import logging

    from udedup.commands import logs

    chosen = choose(args)
    if chosen.image and chosen.mount is None:
        args.subparser.error("--image needs --mount DIR to show it in")
    logs.configure(chosen.log_level, chosen.log_format)
    try:
        _run_engine(args, chosen)
    except UdedupError as error:
        # In the log's format: who reads it need not know two.
        logging.getLogger(__name__).critical("%s", error)
        return 1
    return 0


def _run_engine(args: argparse.Namespace, chosen: argparse.Namespace) -> None:
    require_host()

    import gc

    import trio

    from udedup.commands.configuration import engine_config
    from udedup.commands.reloading import Reloading
    from udedup.engine.server import run_engine
    from udedup.engine.service import Service

    # What is set there is not meant for an engine that a command started for itself.
    service = Service() if args.parent is not None else Service.take(os.environ)

    config = engine_config(chosen, service)

    def announce(ready: "Ready") -> None:
        print(f"ready socket={ready.socket} mount={ready.mount or ''}", flush=True)

    async def serve() -> None:
        # open_signal_receiver comes first: a signal during the start must already end it in order.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            # Whatever mask was inherited, a service has to be stoppable.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
            async with trio.open_nursery() as nursery:

                async def end_when_told() -> None:
                    async for _ in signals:
                        nursery.cancel_scope.cancel()

                nursery.start_soon(end_when_told)
                with reloading.listening() as reloads, trio.open_signal_receiver(signal.SIGUSR1) as dumps:
                    await run_engine(config, on_ready=announce, reloads=reloads, dumps=dumps)
                nursery.cancel_scope.cancel()

    reloading = Reloading(lambda: choose(args), service)
    # Modules and classes are forever. Collecting young objects less often halves the collector's share of the CPU.
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)
    try:
        trio.run(serve)
    except BaseExceptionGroup as group:
        mendable, other = group.split(UdedupError)
        if mendable is None or other is not None:
            raise
        raise _first(mendable) from None


def choose(args: argparse.Namespace) -> argparse.Namespace:
    """Returns what the command line says, and beneath that what the file says, if there is one. Raises UdedupError."""
    from udedup.commands.settings import words_of

    # An engine for one command's life has nobody to ask for domains, and nothing of the usual file is meant for it.
    words = () if args.config is None and args.parent is not None else words_of(args.config, prepare_parser)
    # What the command line sets is set last.
    chosen: argparse.Namespace = args.subparser.parse_args(args.words, args.subparser.parse_args(words))
    return chosen


def _first(group: BaseExceptionGroup[UdedupError]) -> UdedupError:
    """Returns the first leaf: what failed first is what the user can mend."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UdedupError)
    return error


def _end_with(parent: int) -> None:
    """Asks the kernel for SIGTERM once the parent dies. Raises UdedupError if it is dead already."""
    from udedup.prctl import prctl

    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise UdedupError(f"the process {parent} that wanted this engine has ended")


def _remove(folder: Path) -> None:
    """Removes what a parent that was killed had made for the socket, and cannot remove itself."""
    try:
        folder.rmdir()
    except OSError as error:
        print(f"udedup: the folder {folder} stays there: {error.strerror}", file=sys.stderr)
