"""Where a run begins to overfit, and what its curves say about it: pure functions on learning curves.

The overfitting point is the epoch at which the smoothed validation loss is lowest, if the loss
thereafter rises beyond its own noise while the training loss still falls.  It is a diagnosis,
never the objective: the smallest gap between training and validation belongs to a rate that
learns nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

VERDICTS = ("underfit", "good", "overfit", "diverged")

SMOOTHING_SHARE = 1 / 6
"""Window of the centred moving average as a share of the epochs; at least three epochs."""

MINIMUM_EPOCHS = 4
"""Shorter curves show no trend; their verdict is "good" unless they still improve fast."""

STILL_IMPROVING = 0.02
"""A last quarter that gains more than this share of the whole descent, and more than noise, is underfit."""

STEADY = 5
"""A loss that fell from each of the last so many epochs to the next is falling: noise does so once in 120 times, and
once in 24 where there are only four."""


@dataclass(frozen=True)
class FitAnalysis:
    """The diagnosis of one pair of curves.

    Attributes:
        verdict: one of `VERDICTS`.
        best_epoch: epoch of the lowest smoothed validation loss, counted from 1.
        overfit_epoch: the same where the run overfits, else None.
        gap_at_best: validation minus training loss at the best epoch.
        gap_at_end: the same at the last epoch.
    """

    verdict: str
    best_epoch: int
    overfit_epoch: int | None
    gap_at_best: float
    gap_at_end: float


@dataclass(frozen=True)
class Trend:
    """How the overfitting point moves with the learning rate.

    Attributes:
        factor: the overfitting epoch at ten times the rate over the epoch at the rate.
        low, high: its 95% interval.
        runs: number of runs that overfit.
    """

    factor: float
    low: float
    high: float
    runs: int

    @property
    def direction(self) -> str:
        """Return "earlier", "later", or "unclear" where the interval holds 1."""
        return "earlier" if self.high < 1 else "later" if self.low > 1 else "unclear"


MINIMUM_RUNS = 5
"""Fewer runs that overfit show no trend."""


def overfitting_trend(learning_rates: ArrayLike, overfit_epochs: ArrayLike) -> Trend | None:
    """Return how the overfitting point moves with the learning rate: a line through the logarithms of both.

    The slope is the median of the slopes between all pairs of runs (Theil 1950, Sen 1968), so that
    single runs do not bend it.

    Args:
        learning_rates: rate of each run that overfits, shape (runs,).
        overfit_epochs: epoch from which each overfits, same shape.

    Returns:
        The trend, or None for fewer than five runs or rates that are all the same.

    >>> overfitting_trend([0.1, 0.01, 0.001, 0.0001, 0.00001], [2, 4, 8, 16, 32]).factor
    0.5
    """
    from scipy import stats

    rate, epoch = np.log10(np.asarray(learning_rates, dtype=float)), np.log10(np.asarray(overfit_epochs, dtype=float))
    if len(rate) < MINIMUM_RUNS or np.ptp(rate) == 0:
        return None
    slope, _, low, high = stats.theilslopes(epoch, rate, alpha=0.95)
    factor, lowest, highest = (float(f"{10.0**value:.6g}") for value in (slope, low, high))
    return Trend(factor, lowest, highest, len(rate))


def smooth(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Return the centred moving average; at the ends the window is cut, so nothing shifts.

    Args:
        values: shape (..., n).
        window: values per average, at least 1.

    >>> smooth([1.0, 2.0, 6.0], 3)
    array([1.5, 3. , 4. ])
    """
    series = np.asarray(values, dtype=float)
    half = max(window, 1) // 2
    total = np.concatenate([np.zeros((*series.shape[:-1], 1)), np.cumsum(series, axis=-1)], axis=-1)
    index = np.arange(series.shape[-1])
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, series.shape[-1])
    return np.asarray((total[..., high] - total[..., low]) / (high - low))


def noise_level(values: ArrayLike) -> NDArray[np.float64]:
    """Return the standard deviation of a curve's noise, robust against its trend.

    Second differences cancel a straight trend; their median absolute size over sqrt(6) estimates
    the deviation of independent noise.

    Args:
        values: one curve of shape (epochs,), or many of shape (runs, epochs).

    >>> float(noise_level([1.0, 2.0, 3.0, 4.0]))
    0.0
    """
    series = np.asarray(values, dtype=float)
    if series.shape[-1] < 3:
        return np.zeros(series.shape[:-1])
    return np.asarray(1.4826 * np.median(np.abs(np.diff(series, 2, axis=-1)), axis=-1) / np.sqrt(6.0))


def analyse_fit(train_loss: ArrayLike, validation_loss: ArrayLike, *, diverged: bool = False) -> FitAnalysis:
    """Diagnose a pair of loss curves.

    Args:
        train_loss: training loss per epoch, shape (epochs,).
        validation_loss: validation loss per epoch, same shape.
        diverged: whether the run was stopped by the divergence rule.

    Returns:
        The diagnosis.
    """
    one = np.asarray(train_loss, dtype=float)[None], np.asarray(validation_loss, dtype=float)[None]
    return analyse_fits(*one, [diverged])[0]


def analyse_fits(train_loss: ArrayLike, validation_loss: ArrayLike, diverged: ArrayLike) -> list[FitAnalysis]:
    """Diagnose many pairs of loss curves of one length at once, as `analyse_fit` does one.

    Args:
        train_loss: training loss per epoch, shape (runs, epochs).
        validation_loss: validation loss per epoch, same shape.
        diverged: whether each run was stopped by the divergence rule, shape (runs,).

    Returns:
        A diagnosis per run.
    """
    train, validation = np.asarray(train_loss, dtype=float), np.asarray(validation_loss, dtype=float)
    runs, epochs = validation.shape
    if not epochs:
        return [FitAnalysis("diverged", 0, None, float("nan"), float("nan"))] * runs
    gone = np.asarray(diverged, dtype=bool) | ~(np.isfinite(train) & np.isfinite(validation)).all(axis=1)
    lowest = np.argmin(np.where(np.isfinite(validation), validation, np.inf), axis=1)
    train, validation = np.where(gone[:, None], 0.0, train), np.where(gone[:, None], 0.0, validation)
    window = max(3, round(SMOOTHING_SHARE * epochs)) if epochs >= MINIMUM_EPOCHS else 1
    smooth_validation, smooth_train = smooth(validation, window), smooth(train, window)
    best = np.argmin(smooth_validation, axis=1)
    each = np.arange(runs)
    gaps, bottom = smooth_validation - smooth_train, smooth_validation[each, best]
    noise = noise_level(validation)
    rise = smooth_validation[:, -1] - bottom
    descent = np.maximum(smooth_validation[:, 0] - bottom, 0.0)
    # A smoothed value of three epochs carries 0.6 of the noise; the floors keep a rise that no
    # eye would see, a thousandth of what was learned, from being called overfitting.
    threshold = np.maximum(np.maximum(2.0 * noise, 0.01 * descent), 1e-3 * np.abs(bottom))
    train_falls = smooth_train[:, -1] < smooth_train[each, best]
    overfit = (best < epochs - 1) & (rise > threshold) & train_falls
    underfit = np.zeros(runs, dtype=bool)
    if epochs >= MINIMUM_EPOCHS:
        gain = smooth_validation[:, -1 - max(1, epochs // 4)] - smooth_validation[:, -1]
        # A curve that fell at every step has a trend; its bend is not noise, as it seems where points are few.
        steady = (np.diff(validation[:, -STEADY:], axis=1) < 0).all(axis=1)
        enough = np.maximum(STILL_IMPROVING * descent, np.where(steady, 0.0, 3.0 * noise))
        underfit = ~overfit & (best >= epochs - 2) & (gain > enough)
    return [
        FitAnalysis("diverged", int(lowest[i]) + 1, None, float("nan"), float("nan"))
        if gone[i]
        else FitAnalysis(
            "overfit" if overfit[i] else "underfit" if underfit[i] else "good",
            int(best[i]) + 1,
            int(best[i]) + 1 if overfit[i] else None,
            float(gaps[i, best[i]]),
            float(gaps[i, -1]),
        )
        for i in range(runs)
    ]
