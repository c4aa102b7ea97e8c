"""Decay schemes as shapes over progress: the rate at each share of the run over the rate at its start.

A run of N steps has progress p = t / (N - 1) at step t, so that every scheme holds exactly at
both ends: 1 at the first step, `final_fraction` at the last.  Where Keras has the scheme, the
table equals Keras's own schedule with `decay_steps = N - 1` at every step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SettingError, did_you_mean

Array = NDArray[np.float64]

STEP_STAGES = 4
"""Plateaus of the `step` scheme: three drops, after each quarter of the run."""


def constant(progress: Array, final_fraction: float) -> Array:
    """Keep the rate.

    >>> constant(np.array([0.0, 1.0]), 0.1)
    array([1., 1.])
    """
    return np.ones_like(progress)


def linear(progress: Array, final_fraction: float) -> Array:
    """Fall along a straight line: 1 - (1 - final_fraction) p.

    >>> linear(np.array([0.0, 0.5, 1.0]), 0.5)
    array([1.  , 0.75, 0.5 ])
    """
    return 1.0 - (1.0 - final_fraction) * progress


def step(progress: Array, final_fraction: float) -> Array:
    """Drop three times by the same factor, after each quarter of the run.

    >>> step(np.array([0.0, 0.25, 0.5, 1.0]), 0.001).round(6)
    array([1.   , 0.1  , 0.01 , 0.001])
    """
    # A quarter that falls on a step exactly belongs to the next plateau, whatever rounding says.
    stage = np.floor(progress * STEP_STAGES + 1e-9)
    return np.asarray(final_fraction ** (np.minimum(stage, STEP_STAGES - 1) / (STEP_STAGES - 1)))


def exponential(progress: Array, final_fraction: float) -> Array:
    """Multiply the rate by a constant factor per step: final_fraction ** p.

    >>> exponential(np.array([0.0, 0.5, 1.0]), 0.01)
    array([1.  , 0.1 , 0.01])
    """
    return np.asarray(final_fraction**progress)


def time(progress: Array, final_fraction: float) -> Array:
    """Divide the rate by a straight line (inverse time decay): 1 / (1 + (1 / final_fraction - 1) p).

    >>> time(np.array([0.0, 0.5, 1.0]), 0.5).round(4)
    array([1.    , 0.6667, 0.5   ])
    """
    return 1.0 / (1.0 + (1.0 / final_fraction - 1.0) * progress)


def cosine(progress: Array, final_fraction: float) -> Array:
    """Fall along half a cosine (Loshchilov and Hutter 2017): f + (1 - f)(1 + cos(pi p)) / 2.

    >>> cosine(np.array([0.0, 0.5, 1.0]), 0.5).round(4)
    array([1.  , 0.75, 0.5 ])
    """
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + np.cos(np.pi * progress))


DECAYS: dict[str, Callable[[Array, float], Array]] = {
    "constant": constant,
    "linear": linear,
    "step": step,
    "exponential": exponential,
    "time": time,
    "cosine": cosine,
}


def rate_table(decay: str, learning_rate: float, final_fraction: float, total_steps: int) -> Array:
    """Return the learning rate of every step of a run.

    Args:
        decay: a name in `DECAYS`.
        learning_rate: rate at the first step, above 0.
        final_fraction: rate at the last step over the rate at the first, in (0, 1].
        total_steps: length of the run in steps, at least 1.

    Returns:
        Array of shape (total_steps,).

    Raises:
        SettingError: for an unknown decay or a value outside its range.

    >>> rate_table("linear", 0.1, 0.5, 3)
    array([0.1  , 0.075, 0.05 ])
    """
    if decay not in DECAYS:
        raise SettingError(f"rate_table: decay: '{decay}' is not a decay scheme{did_you_mean(decay, DECAYS)}")
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise SettingError(f"rate_table: learning_rate must be above 0, got {learning_rate}")
    if not 0 < final_fraction <= 1:
        raise SettingError(f"rate_table: final_fraction must be in (0, 1], got {final_fraction}")
    if total_steps < 1:
        raise SettingError(f"rate_table: total_steps must be at least 1, got {total_steps}")
    progress = np.arange(total_steps) / max(total_steps - 1, 1)
    return learning_rate * DECAYS[decay](progress, final_fraction)


def keras_schedule_code(decay: str, learning_rate: float, final_fraction: float, total_steps: int) -> str:
    """Return the Keras expression that gives the same rate at every step.

    Args: as `rate_table`.

    Returns:
        Python source: a number for `constant`, else a `keras.optimizers.schedules` object.

    >>> keras_schedule_code("cosine", 0.1, 0.01, 101)
    'keras.optimizers.schedules.CosineDecay(initial_learning_rate=0.1, decay_steps=100, alpha=0.01)'
    """
    rate, last = repr(float(learning_rate)), max(total_steps - 1, 1)
    schedules = "keras.optimizers.schedules"
    if decay == "constant":
        return rate
    if decay == "linear":
        end = repr(float(learning_rate * final_fraction))
        return f"{schedules}.PolynomialDecay(initial_learning_rate={rate}, decay_steps={last}, end_learning_rate={end})"
    if decay == "exponential":
        return (
            f"{schedules}.ExponentialDecay(initial_learning_rate={rate}, decay_steps={last}, "
            f"decay_rate={float(final_fraction)!r})"
        )
    if decay == "time":
        factor = repr(float(1.0 / final_fraction - 1.0))
        return f"{schedules}.InverseTimeDecay(initial_learning_rate={rate}, decay_steps={last}, decay_rate={factor})"
    if decay == "cosine":
        alpha = repr(float(final_fraction))
        return f"{schedules}.CosineDecay(initial_learning_rate={rate}, decay_steps={last}, alpha={alpha})"
    if decay == "step":
        table = rate_table(decay, learning_rate, final_fraction, total_steps)
        # Keras keeps values[i] up to and including step boundaries[i].
        drops = np.flatnonzero(np.diff(table))
        if not len(drops):
            return rate
        values = [float(table[0]), *(float(table[i + 1]) for i in drops)]
        boundaries = [int(i) for i in drops]
        return f"{schedules}.PiecewiseConstantDecay(boundaries={boundaries}, values={values})"
    raise SettingError(f"keras_schedule_code: '{decay}' is not a decay scheme{did_you_mean(decay, DECAYS)}")
