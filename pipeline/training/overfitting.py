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
        values: shape (n,).
        window: values per average, at least 1.

    >>> smooth([1.0, 2.0, 6.0], 3)
    array([1.5, 3. , 4. ])
    """
    series = np.asarray(values, dtype=float)
    half = max(window, 1) // 2
    total = np.concatenate([[0.0], np.cumsum(series)])
    index = np.arange(len(series))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(series))
    return np.asarray((total[high] - total[low]) / (high - low))


def noise_level(values: ArrayLike) -> float:
    """Return the standard deviation of a curve's noise, robust against its trend.

    Second differences cancel a straight trend; their median absolute size over sqrt(6) estimates
    the deviation of independent noise.

    >>> noise_level([1.0, 2.0, 3.0, 4.0])
    0.0
    """
    series = np.asarray(values, dtype=float)
    if len(series) < 3:
        return 0.0
    return float(1.4826 * np.median(np.abs(np.diff(series, 2))) / np.sqrt(6.0))


def analyse_fit(train_loss: ArrayLike, validation_loss: ArrayLike, *, diverged: bool = False) -> FitAnalysis:
    """Diagnose a pair of loss curves.

    Args:
        train_loss: training loss per epoch, shape (epochs,).
        validation_loss: validation loss per epoch, same shape.
        diverged: whether the run was stopped by the divergence rule.

    Returns:
        The diagnosis.
    """
    train, validation = np.asarray(train_loss, dtype=float), np.asarray(validation_loss, dtype=float)
    finite = np.isfinite(train) & np.isfinite(validation)
    if diverged or not len(validation) or not finite.all():
        best = int(np.nanargmin(np.where(np.isfinite(validation), validation, np.inf))) + 1 if len(validation) else 0
        return FitAnalysis("diverged", best, None, float("nan"), float("nan"))
    window = max(3, round(SMOOTHING_SHARE * len(validation))) if len(validation) >= MINIMUM_EPOCHS else 1
    smooth_validation, smooth_train = smooth(validation, window), smooth(train, window)
    best = int(np.argmin(smooth_validation))
    gaps = smooth_validation - smooth_train
    noise = noise_level(validation)
    rise = smooth_validation[-1] - smooth_validation[best]
    descent = max(smooth_validation[0] - smooth_validation[best], 0.0)
    # A smoothed value of three epochs carries 0.6 of the noise; the floors keep a rise that no
    # eye would see, a thousandth of what was learned, from being called overfitting.
    threshold = max(2.0 * noise, 0.01 * descent, 1e-3 * abs(smooth_validation[best]))
    train_falls = smooth_train[-1] < smooth_train[best]
    verdict, overfit_epoch = "good", None
    if best < len(validation) - 1 and rise > threshold and train_falls:
        verdict, overfit_epoch = "overfit", best + 1
    elif len(validation) >= MINIMUM_EPOCHS:
        quarter = max(1, len(validation) // 4)
        gain = smooth_validation[-1 - quarter] - smooth_validation[-1]
        if best >= len(validation) - 2 and gain > max(STILL_IMPROVING * descent, 3.0 * noise):
            verdict = "underfit"
    return FitAnalysis(verdict, best + 1, overfit_epoch, float(gaps[best]), float(gaps[-1]))
