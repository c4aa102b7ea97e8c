"""Confirmation: the finalists and the Keras default again, on fresh seeds and splits, side by side.

The best of many noisy trials is optimistic.  Here every candidate trains for a number of epochs
that was fixed beforehand, on the same fresh splits and seeds as the others, so that differences
are paired.  The winner is the best of several on these numbers, so its intervals hold for all
comparisons at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def separates(self) -> bool:
        """Return whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Verdict:
    """What the confirmation says.

    Attributes:
        winner: key of the candidate with the best mean.
        improvement: baseline minus winner in cost; above zero the winner is better.  None without
            a baseline that ran through.
        tied_with: keys of the candidates whose difference from the winner is not distinguishable from zero.
    """

    winner: int
    improvement: Interval | None
    tied_with: tuple[int, ...]


def paired_interval(differences: ArrayLike, validation_over_training: float, comparisons: int = 1) -> Interval:
    """Return the corrected resampled t interval of a mean difference (Nadeau and Bengio 2003).

    Runs on overlapping training sets are not independent; the correction widens the variance of
    the mean from s^2 / n to s^2 (1 / n + n_validation / n_training).

    Args:
        differences: one per fold of every repeat, shape (n,), n at least 2.
        validation_over_training: validation samples over training samples of one fold.
        comparisons: intervals that must all hold at once in 95% of studies (Bonferroni; Dunn 1961).

    Returns:
        The mean and its 95% interval.
    """
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, float("-inf"), float("inf"))
    error = np.sqrt(values.var(ddof=1) * (1.0 / len(values) + validation_over_training))
    margin = float(stats.t.ppf(1.0 - (1.0 - CONFIDENCE) / (2 * comparisons), len(values) - 1) * error)
    return Interval(mean, mean - margin, mean + margin)


def judge(costs: Mapping[int, Sequence[float]], baseline: int, validation_over_training: float) -> Verdict:
    """Choose the winner and say how sure that is.

    Args:
        costs: per candidate, one cost (lower is better) per fold of every repeat, paired by position;
            not finite where the candidate diverged.
        baseline: key of the Keras default; it need not be among the candidates.
        validation_over_training: see `paired_interval`.

    Returns:
        The verdict.  A candidate that diverged once can neither win nor tie.
    """
    sound = {key: np.asarray(values, dtype=float) for key, values in costs.items() if np.isfinite(values).all()}
    if not sound:
        raise ValueError("judge: every candidate diverged on a fresh seed")
    winner = min(sound, key=lambda key: (float(sound[key].mean()), key))
    worse = {
        key: paired_interval(sound[key] - sound[winner], validation_over_training, max(1, len(sound) - 1))
        for key in sound
    }
    tied = tuple(key for key in sound if key != winner and not worse[key].separates)
    return Verdict(winner, worse.get(baseline), tied)
