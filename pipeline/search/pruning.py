"""Fold pruning: end a trial early when earlier trials say that it is hopeless.

Two comparisons, both on values where lower is better:

* After each fold, a trial's score over the folds it has run (the best epoch of the mean over those
  folds) is compared with the same score of earlier trials over the same folds.  Every schedule has
  ended there, so this is fair to all of them, and it is where most of the saving comes from.
* Inside a fold, the value at an epoch is compared with earlier trials at the same fold and epoch.
  A scheme that gains late (cosine, linear, ...) looks bad in the middle beside a constant rate,
  so a decaying trial is compared with trials of its own scheme, and with the others only by a
  much more lenient rule: it must be worse than nearly all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

STARTUP_TRIALS = 5
"""Earlier trials that must have reached a point before anything is compared there."""

SAME_DECAY_TRIALS = 4
"""Earlier trials of the same scheme that make a comparison inside a fold meaningful."""

SAME_DECAY_QUANTILE = 0.75
"""Inside a fold, against the same scheme: worse than this share of them.  Not the median: a trial of the same
scheme at a higher rate gains later too."""

LENIENT_QUANTILE = 0.9
"""Inside a fold, against other schemes: worse than this share of them."""

WARM_UP_SHARE = 0.25
"""Share of a fold's epochs before which nothing is compared inside it."""


@dataclass(frozen=True)
class PastTrial:
    """What pruning needs of an earlier trial.

    Attributes:
        decay: its decay scheme.
        curves: monitored value, lower is better, one array of epochs per fold that was begun.
    """

    decay: str
    curves: tuple[NDArray[np.float64], ...]


class FoldPruner:
    """Decides on one trial at a time against the trials recorded before it.

    Args:
        quantile: prune what is worse than this share of the earlier trials; 0.5 is the median rule,
            infinity never prunes.
        epochs: epochs of a fold.
    """

    def __init__(self, quantile: float, epochs: int) -> None:
        self.quantile = quantile
        self.epochs = epochs
        self.past: list[PastTrial] = []

    @classmethod
    def named(cls, pruner: str, percentile: float, epochs: int) -> FoldPruner:
        """Return the pruner of a study file.

        Args:
            pruner: "median", "percentile" or "none".
            percentile: for "percentile": keep this share of the trials, in percent.
            epochs: epochs of a fold.
        """
        quantile = {"median": 0.5, "percentile": percentile / 100.0, "none": float("inf")}[pruner]
        return cls(quantile, epochs)

    def record(self, trial: PastTrial) -> None:
        """Remember a finished trial; a diverged one counts with the folds that it completed."""
        self.past.append(trial)

    def after_fold(self, curves: Sequence[ArrayLike]) -> bool:
        """Return whether a trial with these completed folds should end here.

        A trial that ended before completing as many folds counts as worse.  Compared only with the
        survivors, half of the trials would be lost again after every fold, whatever their worth.
        """
        folds = len(curves)
        others = [
            running_score(past.curves[:folds])
            if len(past.curves) >= folds and all(len(curve) == self.epochs for curve in past.curves[:folds])
            else float("inf")
            for past in self.past
        ]
        return self._worse(running_score(curves), others, self.quantile)

    def inside_fold(self, decay: str, fold: int, curve: ArrayLike) -> bool:
        """Return whether a trial should end in the middle of a fold.

        Args:
            decay: its decay scheme.
            fold: the fold, counted from 0.
            curve: its values in this fold so far, shape (epochs done,).
        """
        values = np.asarray(curve, dtype=float)
        epoch = len(values) - 1
        if epoch + 1 >= self.epochs or epoch + 1 < WARM_UP_SHARE * self.epochs:
            return False
        reached = [past for past in self.past if len(past.curves) > fold and len(past.curves[fold]) > epoch]
        best = float(np.nanmin(values)) if np.isfinite(values).any() else float("inf")

        def best_so_far(trials: Sequence[PastTrial]) -> list[float]:
            return [float(np.min(past.curves[fold][: epoch + 1])) for past in trials]

        same = [past for past in reached if past.decay == decay]
        strict = max(self.quantile, SAME_DECAY_QUANTILE)
        if len(same) >= SAME_DECAY_TRIALS and self._worse(best, best_so_far(same), strict):
            # And worse than the usual share of all: a scheme that is good throughout keeps its worse trials.
            return self._worse(best, best_so_far(reached), self.quantile)
        return self._worse(best, best_so_far(reached), max(self.quantile, LENIENT_QUANTILE))

    def _worse(self, value: float, others: Sequence[float], quantile: float) -> bool:
        if len(others) < STARTUP_TRIALS or not np.isfinite(self.quantile):
            return False
        if not np.isfinite(value):
            return True
        finite = np.where(np.isfinite(others), others, np.inf)
        return value > float(np.quantile(finite, quantile, method="higher"))


def running_score(curves: Sequence[ArrayLike]) -> float:
    """Return the best epoch of the mean over folds.

    Args:
        curves: monitored value per epoch, lower is better, one per fold.

    >>> running_score([[3.0, 1.0], [1.0, 2.0]])
    1.5
    """
    length = min(len(np.asarray(curve)) for curve in curves)
    mean = np.mean([np.asarray(curve, dtype=float)[:length] for curve in curves], axis=0)
    return float(np.nanmin(mean)) if np.isfinite(mean).any() else float("inf")
