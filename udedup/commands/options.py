"""Options that several subcommands share, and the values they take."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from udedup.engine.policies import RATIO_MAX
from udedup.labels import LABEL_BYTES_MAX, RESERVED
from udedup.places import engine_socket, state_directory
from udedup.vdi.formats import FORMATS

if TYPE_CHECKING:
    from udedup.engine.addresses import Loopback

    Container = argparse.ArgumentParser | argparse._ArgumentGroup
    """What options can be added to."""


def add_socket_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--socket PATH`` of the engine to talk to."""
    parser.add_argument(
        "--socket",
        type=Path,
        default=engine_socket(),
        metavar="PATH",
        help="the engine's socket (default: $UDEDUP_SOCKET, else %(default)s)",
    )


def add_agent_flags(parser: argparse.ArgumentParser) -> None:
    """Adds as what a program is to join: ``domain``, ``quiet_breaks`` and ``keep_ksm``."""
    parser.add_argument(
        "--domain",
        type=domain_label,
        metavar="LABEL",
        help="share only with programs of this trust domain (the engine must allow it; default: the user's own); "
        "private: with nobody but itself; off: not at all",
    )
    parser.add_argument(
        "--quiet-breaks",
        action="store_true",
        help="let the program's writes take as long where a page was only looked at as where it is shared, so that "
        "their time tells whoever is at work inside of it nothing about others' memory",
    )
    parser.add_argument(
        "--keep-ksm",
        action="store_true",
        help="let the program give its memory to KSM as well (otherwise its MADV_MERGEABLE has no effect)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``[PID]`` and ``--resume`` to a command that stops merging."""
    parser.add_argument(
        "pid", type=count(1), nargs="?", metavar="PID", help="only in this process (default: in every one)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="the contrary: let the merging go on that pause or unmerge stopped",
    )


def add_advisor_options(parser: "Container") -> None:
    """Adds what sets the rate of the scan by itself, under KSM's names and with KSM's defaults."""
    parser.add_argument(
        "--advisor-mode",
        choices=("none", "scan-time"),
        default="none",
        help="scan-time: change --pages-to-scan so that a scan of all memory takes as long as wanted (default: none)",
    )
    parser.add_argument(
        "--advisor-target-scan-time",
        type=float,
        default=200.0,
        metavar="SECONDS",
        help="how long a scan of all memory should take (default: %(default)g)",
    )
    parser.add_argument(
        "--advisor-max-cpu",
        type=float,
        default=70.0,
        metavar="PERCENT",
        help="of one processor, for engine and agents together; goes before the scan time (default: %(default)g)",
    )
    parser.add_argument(
        "--advisor-min-pages-to-scan", type=count(1), default=500, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--advisor-max-pages-to-scan", type=count(1), default=30000, metavar="N", help="default: %(default)s"
    )


def add_agent_options(parser: "Container") -> None:
    """Adds what an engine grants the programs it serves."""
    parser.add_argument(
        "--agents-max",
        type=count(1),
        default=4096,
        metavar="N",
        help="programs served at a time; one user may have a quarter of that (default: %(default)s)",
    )
    parser.add_argument(
        "--answer-seconds",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long a program's agent may take to answer before it is left to itself (default: %(default)g)",
    )
    parser.add_argument(
        "--holdoff-millisecs",
        type=count(0),
        default=1000,
        metavar="N",
        help="how long a page that was written to is not merged again (default: %(default)s)",
    )
    parser.add_argument(
        "--retire-seconds",
        type=seconds,
        default=2.0,
        metavar="SECONDS",
        help="pause between two looks for parts of the store that are hardly used any more (default: %(default)g)",
    )


def add_metrics_options(parser: argparse.ArgumentParser) -> None:
    """Adds where metrics can be asked for, and by whom."""
    parser.add_argument(
        "--metrics",
        type=metrics_address,
        metavar="ADDRESS",
        help="answer Prometheus there: at the PATH of a Unix socket, for the engine's user alone, or at [HOST:]PORT of "
        "this machine, where all its users see pids, names and figures of all programs (default: nowhere; "
        "`udedup help metrics`)",
    )
    parser.add_argument(
        "--metrics-group", type=group, metavar="GROUP", help="let this group's users connect to the socket at PATH"
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Adds how images are to be opened: ``image_format`` and ``secret_file``."""
    parser.add_argument(
        "--image-format",
        choices=FORMATS,
        help="of the images; by default a block device and a file called .raw are raw, and the first bytes of others"
        " tell (vpc: VHD). Say raw where a guest could write them",
    )
    parser.add_argument(
        "--secret-file", type=Path, metavar="FILE", help="the passphrase of encrypted images, without a newline"
    )


def add_state_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--state-dir DIR``."""
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=state_directory(),
        metavar="DIR",
        help="where clones and the digests of images are kept (default: $STATE_DIRECTORY, else %(default)s)",
    )


def add_backing_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow-backing DIR``."""
    parser.add_argument(
        "--allow-backing",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="let images have their backing files, data files and parents below DIR too, not only below the directory"
        " they are in themselves; may be repeated",
    )


def image_argument(text: str) -> tuple[str | None, Path]:
    """Parses ``[NAME=]PATH`` into (name, absolute path). A ``=`` behind a slash belongs to the path."""
    name, separator, path = text.partition("=")
    if not separator or "/" in name:
        name, path = "", text
    elif not name:
        raise argparse.ArgumentTypeError(f"{text!r}: the name before = is empty")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r}: no path")
    return name or None, Path(path).absolute()


class Count:
    """Parses whole numbers not below ``minimum``."""

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum

    def __call__(self, text: str) -> int:
        """Raises ArgumentTypeError for anything else."""
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < self.minimum:
            raise argparse.ArgumentTypeError(f"{value} is below the least value, {self.minimum}")
        return value


def count(minimum: int) -> Count:
    """Returns a parser of whole numbers not below ``minimum``."""
    return Count(minimum)


def seconds(text: str) -> float:
    """Parses a time above 0 and not endless, s."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait: give more than 0")
    return value


def ratio(text: str) -> tuple[int, int]:
    """Parses ``H:S``, two whole numbers up to RATIO_MAX of which at least one is not zero."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio such as 1:1")
    hints, scans = int(parts[0]), int(parts[1])
    if hints + scans == 0:
        raise argparse.ArgumentTypeError("0:0 would never look at any page")
    if max(hints, scans) > RATIO_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} has a part above the greatest value, {RATIO_MAX}")
    return hints, scans


def allowed_domain(text: str) -> tuple[int, str]:
    """Parses ``UID:LABEL``."""
    uid, separator, label = text.partition(":")
    if not (separator and uid.isascii() and uid.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not UID:LABEL")
    return int(uid), named_label(label)


def named_label(text: str) -> str:
    """Parses a label that a configuration can give: not a reserved one."""
    label = domain_label(text)
    if label in RESERVED:
        raise argparse.ArgumentTypeError(
            f"{text!r} has a meaning of its own, and every user may take it: choose another"
        )
    return label


def socket_mode(text: str) -> int:
    """Parses permissions of the socket, octal: those of a file without any that execute."""
    if not (text and set(text) <= set("01234567") and int(text, 8) & ~0o666 == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no mode of a socket: give three octal digits such as 660 or 666")
    return int(text, 8)


def metrics_address(text: str) -> "Path | Loopback":
    """Parses a path, which has a slash, or ``[HOST:]PORT`` of this machine."""
    if "/" in text:
        return Path(text)
    from udedup.engine.addresses import Loopback

    try:
        return Loopback.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} {error}: give the path of a socket, with a slash, or [HOST:]PORT"
        ) from None


def group(text: str) -> int:
    """Parses a group's name or number."""
    import grp

    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {text!r}") from None


def domain_label(text: str) -> str:
    """Parses the label of a trust domain: short, and fit for a line of a table."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no label: it must have characters, all printable")
    if len(text.encode()) > LABEL_BYTES_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is longer than {LABEL_BYTES_MAX} bytes")
    return text
