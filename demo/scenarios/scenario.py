"""What a scenario is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from demo.scenarios.stage import Stage


class Scenario(ABC):
    """Work whose memory has something, or nothing, in common."""

    summary: str
    """One line for people."""

    last_start: str = ""
    """The mark at which the last guest or program had been started: times are counted from it; "": the beginning."""

    @abstractmethod
    def prepare(self, cache: Path) -> Mapping[str, Path]:
        """Makes its images, kept in ``cache``, and returns the raw disks by the name they get in the mount."""

    @abstractmethod
    async def play(self, stage: Stage) -> float:
        """Does the work once and returns how long it took, in seconds, without the waiting for merges."""
