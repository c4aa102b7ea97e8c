"""Decay schemes as shapes over progress: the rate at each share of the run over the rate at its start.

A run of N steps has progress p = t / (N - 1) at step t, so that every scheme holds exactly at
both ends: 1 at the first step, `final_fraction` at the last.  Where Keras has the scheme, the
table equals Keras's own schedule with `decay_steps = N - 1` at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SettingError, did_you_mean

Array = NDArray[np.float64]

LOWEST_RATE = 1e-30
"""Training counts with 32 bits, which hold no rate much below this, nor one much above its inverse."""

LOWEST_FRACTION = 1e-12
"""No scheme falls further than this."""

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


def polynomial(progress: Array, final_fraction: float) -> Array:
    """Fall along a parabola that is flat at its end: f + (1 - f)(1 - p)^2.

    >>> polynomial(np.array([0.0, 0.5, 1.0]), 0.2).round(4)
    array([1. , 0.4, 0.2])
    """
    return final_fraction + (1.0 - final_fraction) * (1.0 - progress) ** 2


def cosine(progress: Array, final_fraction: float) -> Array:
    """Fall along half a cosine (Loshchilov and Hutter 2017): f + (1 - f)(1 + cos(pi p)) / 2.

    >>> cosine(np.array([0.0, 0.5, 1.0]), 0.5).round(4)
    array([1.  , 0.75, 0.5 ])
    """
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + np.cos(np.pi * progress))


RESTARTS = 3
"""Cycles of the `cosine-restarts` scheme, each twice as long as the one before."""

RESTART_EDGE = 1.0 + 1e-5
"""Cycles are longer by this factor, so that the last one ends with the run and does not begin anew."""


def cosine_restarts(progress: Array, final_fraction: float) -> Array:
    """Fall along three half cosines, each twice as long as the one before (Loshchilov and Hutter 2017).

    >>> cosine_restarts(np.array([0.0, 1 / 7 + 1e-4, 1.0]), 0.5).round(3)
    array([1. , 1. , 0.5])
    """
    cycles = progress * (2**RESTARTS - 1) / RESTART_EDGE
    begun = np.floor(np.log2(1.0 + cycles))
    share = (cycles - (2.0**begun - 1.0)) / 2.0**begun
    return cosine(share, final_fraction)


ONE_CYCLE_WARM_UP = 0.3
"""Share of the run in which 1cycle rises ..."""

ONE_CYCLE_START = 1 / 25
"""... from this share of its highest rate."""


def one_cycle(progress: Array, final_fraction: float) -> Array:
    """Rise along a straight line for 30% of the run, then fall along half a cosine (1cycle, Smith 2018).

    The learning rate is the highest one; the run starts at 1/25 of it.

    >>> one_cycle(np.array([0.0, 0.3, 1.0]), 0.001).round(3)
    array([0.04 , 1.   , 0.001])
    """
    rise = ONE_CYCLE_START + (1.0 - ONE_CYCLE_START) * progress / ONE_CYCLE_WARM_UP
    fall = cosine((progress - ONE_CYCLE_WARM_UP) / (1.0 - ONE_CYCLE_WARM_UP), final_fraction)
    return np.where(progress < ONE_CYCLE_WARM_UP, rise, fall)


def plateau(progress: Array, final_fraction: float) -> Array:
    """Keep the rate; `Plateau` lowers it between epochs.

    >>> plateau(np.array([0.0, 1.0]), 0.1)
    array([1., 1.])
    """
    return np.ones_like(progress)


DECAYS: dict[str, Callable[[Array, float], Array]] = {
    "constant": constant,
    "linear": linear,
    "step": step,
    "exponential": exponential,
    "time": time,
    "cosine": cosine,
    "polynomial": polynomial,
    "cosine-restarts": cosine_restarts,
    "1cycle": one_cycle,
    "plateau": plateau,
}

DEFAULT_DECAYS = ("constant", "linear", "step", "exponential", "time", "cosine")
"""What a study searches when its file names no decays."""


@dataclass
class Plateau:
    """Lowers the rate between epochs when the monitored value stops improving, as Keras's ReduceLROnPlateau does.

    Attributes:
        final_fraction: the lowest rate over the first.
        epochs: epochs of the run.
        share: the present rate over the first.
        best: the lowest cost so far.
        waited: epochs since.
    """

    final_fraction: float
    epochs: int
    share: float = 1.0
    best: float = np.inf
    waited: int = 0

    @property
    def factor(self) -> float:
        """Return what one drop multiplies the rate by: three drops reach the lowest rate."""
        return float(self.final_fraction ** (1.0 / PLATEAU_DROPS))

    @property
    def patience(self) -> int:
        """Return the epochs without improvement that make a drop: a tenth of the run."""
        return max(1, round(self.epochs / 10))

    def after_epoch(self, cost: float) -> None:
        """Take note of an epoch's monitored value, lower is better."""
        if cost < self.best:
            self.best, self.waited = cost, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.share = max(self.share * self.factor, self.final_fraction)
            self.waited = 0

    def state(self) -> dict[str, float]:
        """Return what the next epochs depend on."""
        return {"share": self.share, "best": self.best, "waited": self.waited}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state."""
        self.share, self.best, self.waited = state["share"], state["best"], int(state["waited"])


PLATEAU_DROPS = 3
"""Drops of the `plateau` scheme from the first rate to the lowest."""


def warm_up_steps(warmup_fraction: float, total_steps: int) -> int:
    """Return the steps of a linear warm-up, at most all but one.

    >>> warm_up_steps(0.1, 50)
    5
    """
    return min(round(warmup_fraction * total_steps), max(total_steps - 1, 0))


def rate_table(
    decay: str, learning_rate: float, final_fraction: float, total_steps: int, warmup_fraction: float = 0.0
) -> Array:
    """Return the learning rate of every step of a run.

    Args:
        decay: a name in `DECAYS`.
        learning_rate: rate at the first step, from `LOWEST_RATE` to its inverse.
        final_fraction: rate at the last step over the rate at the first, in [`LOWEST_FRACTION`, 1].
        total_steps: length of the run in steps, at least 1.
        warmup_fraction: share of the run, in [0, 1), in which the rate rises linearly to the first
            rate of the scheme; the scheme then spans what is left.

    Returns:
        Array of shape (total_steps,).

    Raises:
        SettingError: for an unknown decay or a value outside its range.

    >>> rate_table("linear", 0.1, 0.5, 3)
    array([0.1  , 0.075, 0.05 ])
    """
    if decay not in DECAYS:
        raise SettingError(f"rate_table: decay: '{decay}' is not a decay scheme{did_you_mean(decay, DECAYS)}")
    if not LOWEST_RATE <= learning_rate <= 1 / LOWEST_RATE:
        rule = f"in [{LOWEST_RATE:g}, {1 / LOWEST_RATE:g}]"
        raise SettingError(f"rate_table: learning_rate must be {rule}, got {learning_rate}")
    if not LOWEST_FRACTION <= final_fraction <= 1:
        raise SettingError(f"rate_table: final_fraction must be in [{LOWEST_FRACTION:g}, 1], got {final_fraction}")
    if total_steps < 1:
        raise SettingError(f"rate_table: total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_fraction < 1:
        raise SettingError(f"rate_table: warmup_fraction must be in [0, 1), got {warmup_fraction}")
    warm = warm_up_steps(warmup_fraction, total_steps)
    left = total_steps - warm
    table = learning_rate * DECAYS[decay](np.arange(left) / max(left - 1, 1), final_fraction)
    rise = table[0] * np.arange(1, warm + 1) / (warm + 1)
    return np.concatenate([rise, table])


def keras_schedule_code(
    decay: str, learning_rate: float, final_fraction: float, total_steps: int, warmup_fraction: float = 0.0
) -> str:
    """Return the Keras expression that gives the same rate at every step.

    Args: as `rate_table`.

    Returns:
        Python source: a number for `constant` and `plateau`, else a `keras.optimizers.schedules`
        object; with a warm-up before any scheme but `cosine`, a `WarmUp` as in `WARM_UP_CODE`.

    >>> keras_schedule_code("cosine", 0.1, 0.01, 101)
    'keras.optimizers.schedules.CosineDecay(initial_learning_rate=0.1, decay_steps=100, alpha=0.01)'
    """
    schedules = "keras.optimizers.schedules"
    warm = warm_up_steps(warmup_fraction, total_steps)
    if warm and decay == "cosine":
        first, alpha = float(learning_rate / (warm + 1)), float(final_fraction)
        return (
            f"{schedules}.CosineDecay(initial_learning_rate={first!r}, decay_steps={max(total_steps - warm - 1, 1)}, "
            f"alpha={alpha!r}, warmup_target={float(learning_rate)!r}, warmup_steps={warm})"
        )
    if warm:
        return f"WarmUp({keras_schedule_code(decay, learning_rate, final_fraction, total_steps - warm)}, steps={warm})"
    rate, last = repr(float(learning_rate)), max(total_steps - 1, 1)
    if decay in ("constant", "plateau"):
        return rate
    if decay == "polynomial":
        end = repr(float(learning_rate * final_fraction))
        return (
            f"{schedules}.PolynomialDecay(initial_learning_rate={rate}, decay_steps={last}, end_learning_rate={end}, "
            "power=2.0)"
        )
    if decay == "cosine-restarts":
        cycle = repr(last * RESTART_EDGE / (2**RESTARTS - 1))
        return (
            f"{schedules}.CosineDecayRestarts(initial_learning_rate={rate}, first_decay_steps={cycle}, t_mul=2.0, "
            f"m_mul=1.0, alpha={float(final_fraction)!r})"
        )
    if decay == "1cycle":
        low, rising = repr(float(learning_rate * ONE_CYCLE_START)), last * ONE_CYCLE_WARM_UP
        return (
            f"{schedules}.CosineDecay(initial_learning_rate={low}, decay_steps={last - rising!r}, "
            f"alpha={float(final_fraction)!r}, warmup_target={rate}, warmup_steps={rising!r})"
        )
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
        end = repr(float(final_fraction))
        return f"{schedules}.CosineDecay(initial_learning_rate={rate}, decay_steps={last}, alpha={end})"
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


WARM_UP_CODE = """
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    \"\"\"A linear rise over some steps to the first rate of a schedule, and then that schedule.\"\"\"

    def __init__(self, schedule, steps):
        self.schedule, self.steps = schedule, steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        after = keras.ops.maximum(step - self.steps, 0.0)
        rate = self.schedule(after) if callable(self.schedule) else self.schedule
        return rate * keras.ops.minimum((step + 1.0) / (self.steps + 1.0), 1.0)

    def get_config(self):
        return {"schedule": self.schedule, "steps": self.steps}
"""
"""Python source of the schedule that `keras_schedule_code` names where Keras has none."""


def plateau_callback_code(final_fraction: float, learning_rate: float, epochs: int, monitor: str, mode: str) -> str:
    """Return the Keras callback that lowers the rate as `Plateau` does.

    Args:
        final_fraction, learning_rate: as `rate_table`.
        epochs: epochs of the run.
        monitor, mode: what it watches, and "min" or "max".
    """
    rule = Plateau(final_fraction, epochs)
    return (
        f"keras.callbacks.ReduceLROnPlateau(monitor={monitor!r}, mode={mode!r}, factor={rule.factor!r}, "
        f"patience={rule.patience}, min_delta=0.0, min_lr={float(learning_rate * final_fraction)!r})"
    )
