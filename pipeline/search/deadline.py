"""The time that a study has in all: kept to within an epoch, and shared by trials and confirmation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


class TimeUp(Exception):
    """The time of a study is used up: what runs is kept where it is."""


@dataclass(frozen=True)
class Deadline:
    """When a study must have come to its answer.

    Attributes:
        seconds: what the study has in all, in seconds; infinite where nothing limits it.
        until: when that is used up, by `time.time()`, which processes of one machine share.
    """

    seconds: float = math.inf
    until: float = math.inf

    @property
    def left(self) -> float:
        """Return the seconds left, below zero when the time is up."""
        return self.until - time.time()

    def passed(self, reserved: float = 0.0) -> bool:
        """Return whether the time is up, but for a part that is kept for something else.

        Args:
            reserved: that part in seconds.
        """
        return math.isfinite(self.until) and self.left <= reserved


ENDLESS = Deadline()
"""The deadline of a study that nothing limits."""
