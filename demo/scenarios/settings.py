"""What can be chosen about a run of a scenario."""

from enum import Enum

from attrs import frozen


class Side(Enum):
    """Who merges."""

    BARE = "bare"
    """Nobody: what the work costs by itself."""

    OURS = "ours"
    """udedup, KSM off."""

    KSM = "ksm"
    """The kernel's same-page merging, no engine."""


@frozen
class Rate:
    """Of scanning, in KSM's terms."""

    pages_to_scan: int
    """Per spurt."""

    sleep_millisecs: int
    """Between spurts; 0: as fast as it goes."""

    def __str__(self) -> str:
        return f"{self.pages_to_scan}/{self.sleep_millisecs}"


@frozen
class Settings:
    """The same for all sides, as far as it concerns them. Units as in `udedup engine --help`."""

    policy: str = "xlh"
    """How udedup chooses pages."""

    rate: Rate = Rate(100, 20)
    """udedup's and KSM's: KSM's default, and the paper's rate."""

    ksm_rate: Rate | None = None
    """KSM's, where it is not to have the same; None: ``rate``."""

    hint_ratio: str = "1:1"
    """Spurts for hints to spurts for the linear scan."""

    hint_slots: int | None = None
    """Size of the hint stack, None: the engine's default."""

    memory_mib: int = 512
    """RAM of a guest; as in the paper."""

    guests: int | None = None
    """How many, None: as many as the scenario has of its own."""

    stagger_seconds: float = 5.0
    """From one guest's start to the next."""

    settle_seconds: float = 300.0
    """How long at most sharing may go on growing after the work, in scenarios that wait for it."""

    sample_seconds: float = 1.0
    """From one look of the recorder to the next. Looks take CPU: with rare ones the work takes as long as without."""
