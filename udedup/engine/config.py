"""What an engine is told when it starts, and what it says when it serves."""

from collections.abc import Callable
from pathlib import Path

import attrs

from udedup.engine.addresses import Loopback
from udedup.engine.advisor import ScanTimeTarget
from udedup.engine.headroom import part_left
from udedup.engine.native import lib
from udedup.engine.policies import POLICIES, RATIO_MAX, Policy
from udedup.engine.service import Service
from udedup.engine.wire import HUGE_PAGES
from udedup.errors import UdedupError
from udedup.places import default_socket
from udedup.vdi.formats import FORMATS

HOLDOFF_MAX = 0xFFFFFFFF
"""What the protocol can say, ms."""


@attrs.frozen
class EngineConfig:
    """Everything that can be chosen about an engine; checked by :meth:`check`."""

    socket: Path = attrs.field(factory=default_socket)
    """Where agents and control clients connect."""

    socket_mode: int | None = None
    """Permissions of the socket; None: 0o600, or 0o660 with a group."""

    socket_group: int | None = None
    """Gid that the socket is given to; None: it stays the engine's."""

    mount: Path | None = None
    """Directory to mount the images on; None: no mount."""

    images: tuple[tuple[str | None, Path], ...] = ()
    """(name in the mount or None for the file's own, path of an image)."""

    image_format: str | None = None
    """Format of ``images``, in QEMU's words; None: found out."""

    secret_file: Path | None = None
    """File with the passphrase of ``images`` that are encrypted."""

    allow_backing: tuple[Path, ...] = ()
    """Directories in which images may have backing files, data files and parents, besides their own."""

    state_dir: Path | None = None
    """Directory in which clones and digests of images are kept; None: there are none, and digests are not kept."""

    allow_other: bool = False
    """Whether other users may read from the mount."""

    policy: str = "xlh"
    """How pages are chosen: one of POLICIES."""

    pages_to_scan: int = 1000
    """Pages visited per spurt (as in KSM)."""

    sleep_millisecs: int = 20
    """Pause between spurts, ms (as in KSM); 0: no rate limit."""

    advisor: ScanTimeTarget | None = None
    """What sets pages_to_scan from round to round, as KSM's scan-time advisor; None: it stays."""

    hint_runs: int = 1
    """Spurts spent on hints, before … (XLH, USENIX ATC 2013)."""

    scan_runs: int = 1
    """… that many spurts of the linear scan."""

    hint_slots: int = 1 << 18
    """Pages the hint stack holds."""

    smart_scan: bool = True
    """Whether the linear scan passes over pages that never change (as in KSM), or always, for up to 8 rounds."""

    zero_pages: bool = True
    """Merge all-zero pages with the kernel's zero page."""

    huge_page_threshold: int = 8
    """Split a transparent huge page only if at least so many of its 512 pages would merge; 0 or 1: always."""

    quiet_breaks: bool = False
    """Whether a write must take as long where a page was only looked at as where it is shared, in all programs.

    Otherwise in those that ask for it (`udedup run --quiet-breaks`)."""

    holdoff_millisecs: int = 1000
    """How long agents leave a page alone after it broke, ms."""

    allowed_domains: frozenset[tuple[int, str]] = frozenset()
    """(uid, label) pairs that may be used besides those of root and of the engine's own user."""

    shared_domains: frozenset[str] = frozenset()
    """Labels of ``allowed_domains`` whose users share one domain; under all others each user has one of its own."""

    agents_max: int = 4096
    """Connections served at a time."""

    answer_seconds: float = 10.0
    """How long an agent may take to answer before it is dropped, s."""

    metrics: Path | Loopback | None = None
    """Where metrics can be asked for; None: nowhere."""

    metrics_group: int | None = None
    """Gid that may do so, where that is a path; None: the engine's user alone."""

    map_count: int | None = None
    """Value to raise vm.max_map_count to while the engine runs (root only); None: leave it."""

    drop_privileges: bool = False
    """Whether to give up all rights that aren't needed (``udedup.engine.privileges``); needs a single thread."""

    service: Service = attrs.field(factory=Service)
    """What a service manager gave; its socket is used instead of opening one at ``socket``."""

    pressure_files: tuple[Path, ...] | None = None
    """Where memory pressure is read; empty: it isn't; None: wherever the kernel has it for us."""

    part_left: Callable[[], float] = part_left
    """The part of memory that can be had, between 0 and 1: there is no pressure where that is much."""

    retire_seconds: float = 2.0
    """Pause between looks for segments that are mostly dead, s."""

    @property
    def chosen_policy(self) -> Policy:
        """The policy in the scheduler's terms."""
        return POLICIES[self.policy](self.hint_runs, self.scan_runs)

    def check(self) -> None:
        """Raises UdedupError for what can't work."""
        if self.policy not in POLICIES:
            raise UdedupError(f"policy {self.policy!r} is not known: choose one of {', '.join(POLICIES)}")
        if self.pages_to_scan < 1:
            raise UdedupError(f"pages to scan is {self.pages_to_scan}: give at least 1")
        if self.sleep_millisecs < 0:
            raise UdedupError(f"sleep is {self.sleep_millisecs} ms: give 0 (no rate limit) or more")
        if self.advisor is not None:
            self._check_advisor(self.advisor)
        if min(self.hint_runs, self.scan_runs) < 0 or self.hint_runs + self.scan_runs == 0:
            raise UdedupError(f"hint ratio {self.hint_runs}:{self.scan_runs} would never look at any page")
        if max(self.hint_runs, self.scan_runs) > RATIO_MAX:
            raise UdedupError(f"hint ratio {self.hint_runs}:{self.scan_runs}: give parts of at most {RATIO_MAX}")
        if not 1 <= self.hint_slots <= 1 << 28:
            raise UdedupError(f"hint slots is {self.hint_slots}: give 1 to {1 << 28}")
        if not 0 <= self.huge_page_threshold <= HUGE_PAGES:
            raise UdedupError(f"huge page threshold is {self.huge_page_threshold} pages: give 0 to {HUGE_PAGES}")
        if not 1 <= self.agents_max < lib.UDD_AGENT_NUMBERS:
            raise UdedupError(f"agents is at most {self.agents_max}: give 1 to {lib.UDD_AGENT_NUMBERS - 1}")
        if not 0 <= self.holdoff_millisecs <= HOLDOFF_MAX:
            raise UdedupError(f"holdoff is {self.holdoff_millisecs} ms: give 0 to {HOLDOFF_MAX}")
        unused = self.shared_domains - {label for _, label in self.allowed_domains}
        if unused:
            raise UdedupError(f"domain {min(unused)!r} is shared, but no user may use it")
        if self.image_format is not None and self.image_format not in FORMATS:
            raise UdedupError(f"image format {self.image_format!r} is not known: choose one of {', '.join(FORMATS)}")
        for directory in self.allow_backing:
            if not directory.is_dir():
                raise UdedupError(f"backing directory {directory}: is no directory")
        if self.metrics_group is not None and not isinstance(self.metrics, Path):
            raise UdedupError("a group for the metrics is given, but no path of a socket that it could be the group of")
        if self.images and self.mount is None:
            raise UdedupError("images are given but no mount directory to show them in")

    def _check_advisor(self, target: ScanTimeTarget) -> None:
        if self.sleep_millisecs == 0:
            raise UdedupError("the advisor sets a rate, but a sleep of 0 ms means none: give 1 or more")
        if not target.seconds > 0:
            raise UdedupError(f"the advisor's target scan time is {target.seconds:g} s: give more than 0")
        if not 0 < target.max_cpu <= 100:
            raise UdedupError(f"the advisor's CPU limit is {target.max_cpu:g}%: give more than 0, at most 100")
        if not 1 <= target.min_pages_to_scan <= target.max_pages_to_scan:
            raise UdedupError(
                f"the advisor's pages to scan, {target.min_pages_to_scan} to {target.max_pages_to_scan},"
                " are no range: give 1 or more, and the least first"
            )


@attrs.frozen
class Ready:
    """What serves once ``on_ready`` is called."""

    socket: Path
    """Where agents and control clients connect."""

    mount: Path | None
    """Where the images are; None: no mount."""
