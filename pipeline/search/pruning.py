"""Fold pruning: end a trial early when earlier trials say that it is hopeless.

With K folds a trial is judged after each fold: its score over the folds it has run (the best epoch
of the mean over those folds) is compared with the same score of earlier trials over the same
folds.  Every schedule has ended there, so this is fair to all of them.  Nothing is judged inside a
fold: in replayed studies of a network with batch normalization the eventual winner, at a high rate
that falls late, was among the worst of all in the middle of nearly every study, and rules there,
however lenient, threw it away (`benchmarks/pruning_replay.py`).

A hold-out has one fold only.  There a trial is judged in the last quarter of its epochs, when it
is worse than three quarters of the earlier trials by a margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

STARTUP_TRIALS = 5
"""Earlier trials that must have reached a point before anything is compared there."""

LATE_SHARE = 0.75
"""Share of a hold-out's epochs before which nothing is compared."""

LATE_QUANTILE, LATE_MARGIN = 0.75, 0.5
"""In a hold-out, end what is worse than this quantile of the earlier trials by this share of its distance
from their median."""

REDUCTION = 3
"""Successive halving lets one trial in so many pass each rung."""


@dataclass(frozen=True)
class PastTrial:
    """What pruning needs of an earlier trial.

    Attributes:
        curves: monitored value, lower is better, one array of epochs per fold that was begun.
    """

    curves: tuple[NDArray[np.float64], ...]


class FoldPruner:
    """Decides on one trial at a time against the trials recorded before it.

    Args:
        quantile: prune what is worse than this share of the earlier trials; 0.5 is the median rule,
            infinity never prunes.
        epochs: epochs of a fold.
        folds: folds of a trial; 1 is a hold-out.
    """

    def __init__(self, quantile: float, epochs: int, folds: int) -> None:
        self.quantile, self.epochs, self.folds = quantile, epochs, folds
        self.past: list[PastTrial] = []

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
            running_score(past.curves[:folds]) if self._completed(past, folds) else float("inf") for past in self.past
        ]
        if len(others) < STARTUP_TRIALS or not math.isfinite(self.quantile):
            return False
        value = running_score(curves)
        return not math.isfinite(value) or value > float(np.quantile(others, self.quantile, method="higher"))

    def inside_fold(self, curve: ArrayLike) -> bool:
        """Return whether a trial should end before its hold-out run does.

        Args:
            curve: its values so far, shape (epochs done,).
        """
        values = np.asarray(curve, dtype=float)
        done = len(values)
        if self.folds > 1 or not math.isfinite(self.quantile) or not LATE_SHARE * self.epochs <= done < self.epochs:
            return False
        others = self._best_so_far(done)
        if len(others) < STARTUP_TRIALS:
            return False
        quantile, median = (float(np.quantile(others, q, method="higher")) for q in (LATE_QUANTILE, 0.5))
        margin = LATE_MARGIN * (quantile - median) if math.isfinite(quantile) else 0.0
        return not np.isfinite(values).any() or float(np.nanmin(values)) > quantile + margin

    def _best_so_far(self, epochs: int) -> list[float]:
        """Return the best value of the first fold's first epochs, of every earlier trial that trained so many."""
        return [float(np.min(p.curves[0][:epochs])) for p in self.past if p.curves and len(p.curves[0]) >= epochs]

    def _completed(self, past: PastTrial, folds: int) -> bool:
        return len(past.curves) >= folds and all(len(curve) == self.epochs for curve in past.curves[:folds])


class HalvingPruner(FoldPruner):
    """Successive halving (Karnin et al. 2013) without waiting (Li et al. 2020), over folds or a hold-out's epochs.

    At each rung only the best third of all trials that have reached it goes on.

    Args:
        epochs, folds: as `FoldPruner`.
        first_rung: rungs to leave out; hyperband (Li et al. 2018) varies it from trial to trial.
    """

    def __init__(self, epochs: int, folds: int, first_rung: int = 0) -> None:
        super().__init__(1.0 / REDUCTION, epochs, folds)
        self.rungs = rungs(epochs, folds)[first_rung:]

    def after_fold(self, curves: Sequence[ArrayLike]) -> bool:
        """Return whether a trial fails the rung after these folds."""
        folds = len(curves)
        if folds not in self.rungs:
            return False
        reached = [running_score(past.curves[:folds]) for past in self.past if self._completed(past, folds)]
        return self._fails(running_score(curves), reached)

    def inside_fold(self, curve: ArrayLike) -> bool:
        """Return whether a hold-out trial fails the rung at this epoch."""
        values = np.asarray(curve, dtype=float)
        if self.folds > 1 or len(values) not in self.rungs:
            return False
        best = float(np.nanmin(values)) if np.isfinite(values).any() else float("inf")
        return self._fails(best, self._best_so_far(len(values)))

    def _fails(self, value: float, reached: Sequence[float]) -> bool:
        if len(reached) < STARTUP_TRIALS:
            return False
        pass_on = math.ceil((len(reached) + 1) / REDUCTION)
        return not math.isfinite(value) or sum(other <= value for other in reached) >= pass_on


def rungs(epochs: int, folds: int) -> list[int]:
    """Return where successive halving compares: after these folds, or these epochs of a hold-out.

    >>> rungs(20, 5), rungs(20, 1), rungs(1, 1)
    ([1, 2], [1, 3, 7], [])
    """
    total = folds if folds > 1 else epochs
    found, size = set(), total
    while size > 1:
        size = math.ceil(size / REDUCTION)
        found.add(size)
    return sorted(found - {total})


def make_pruner(name: str, percentile: float, *, epochs: int, folds: int, number: int = 0) -> FoldPruner:
    """Return the pruner of one trial.

    Args:
        name: "median", "percentile", "successive-halving", "hyperband" or "none".
        percentile: for "percentile": keep this share of the trials, in percent.
        epochs: epochs of a fold.
        folds: folds of a trial; 1 is a hold-out.
        number: number of the trial, which chooses its bracket of "hyperband".
    """
    if name == "successive-halving":
        return HalvingPruner(epochs, folds)
    if name == "hyperband":
        return HalvingPruner(epochs, folds, number % (len(rungs(epochs, folds)) + 1))
    quantile = {"median": 0.5, "percentile": percentile / 100.0, "none": float("inf")}[name]
    return FoldPruner(quantile, epochs, folds)


def pruning_note(name: str, *, epochs: int, folds: int) -> str | None:
    """Return what must be said of a rule that can do little or nothing on so few folds or epochs, or None."""
    if name == "none":
        return None
    if folds == 1 and name in ("median", "percentile"):
        if math.ceil(LATE_SHARE * epochs) >= epochs:
            return f"{name} pruning ends nothing early: a hold-out is judged in its last quarter, of {epochs} epochs"
        return None
    if name in ("successive-halving", "hyperband"):
        points, unit = rungs(epochs, folds), "folds" if folds > 1 else "epochs"
        if len(points) < (2 if name == "hyperband" else 1):
            return f"{name} has {len(points) or 'no'} rung on {folds if folds > 1 else epochs} {unit}; use more {unit}"
    return None


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
