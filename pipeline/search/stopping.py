"""When more search is not worth it: an optional rule on the values of the trials so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StopRule:
    """Stop after so many trials without a gain.

    Attributes:
        patience: trials without a gain.
        gain: a trial is a gain when it is better than the best by more than this share of the best value.
        from_trial: trials that were queued beforehand; patience begins after them.
        distance: a trial's fate is decided by the trials up to so many numbers before it, so that studies
            with several workers stop where those with one do.
    """

    patience: int
    gain: float
    from_trial: int
    distance: int

    def trials(self, costs: Iterable[float | None], total: int) -> int:
        """Return how many trials to run.

        Args:
            costs: cost (lower is better, infinite without a value) of each trial in the order of their
                numbers; None for one that has not ended.
            total: trials that the study asks for.

        >>> StopRule(3, 0.01, 0, 1).trials([1.0, 0.5, 0.499, 0.6, 0.7, 0.8], 100)
        5
        """
        best, last = math.inf, self.from_trial - 1
        for number, cost in enumerate(costs):
            if cost is None:
                break
            if cost < best - (self.gain * abs(best) if math.isfinite(best) else 0.0):
                best, last = cost, max(number, self.from_trial - 1)
            if number - last >= self.patience and math.isfinite(best):
                return min(total, number + self.distance)
        return total
