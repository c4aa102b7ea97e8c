"""The learning rate range test (Smith 2015, 2018): a short run in which the rate rises at every step.

The curve analysis is a pure function from (rates, losses) to bounds with a named status; it never
fails on a curve, however short or odd.  Running the ramp on an engine is the thin part below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.search.stored import SIGNIFICANT_DIGITS
from pipeline.training.divergence import RANGE_TEST_RULE
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.overfitting import noise_level, smooth

if TYPE_CHECKING:
    from pipeline.training.engine import Engine
    from pipeline.training.sources import AnySplit

OK = "ok"
NO_SIGNAL = "no_signal"
NEVER_ROSE = "never_rose"
DIVERGED_AT_START = "diverged_at_start"
TOO_SHORT = "too_short"

MEANINGS = {
    OK: "the loss fell and rose again",
    NO_SIGNAL: "the loss did not fall by three times its noise",
    NEVER_ROSE: "the loss was still falling at the highest rate",
    DIVERGED_AT_START: "the loss blew up before it fell",
    TOO_SHORT: "too few steps to judge",
}

MINIMUM_STEPS = 8
"""Shorter curves are `too_short`."""

INITIAL_STEPS = 5
"""The initial loss is the mean over this many first steps, or a tenth of all, at rates too small to learn."""

CLIP = 3.0
"""Losses are clipped at this multiple of the initial loss before smoothing, so that one explosion
does not bend the curve around it."""

LEFT_OF_DROP = 0.25
"""Right of the minimum, the ramp ends where only this share of the loss's drop is left."""

HALF_WIDTH = 1.05
"""The bounds reach so many decades to either side of their middle."""

ABOVE_RISE = 1.5
"""But not beyond this times the rate at which the smoothed loss is above its start again."""

PER_DECADE_OF_STEPS = -0.25
"""Decades by which the best rate of optimizers that settle moves for every tenfold number of steps ..."""

LONGEST = 1.5
"""... up to so many decades more than the ramp's reference ..."""

SHORTEST = -0.5
"""... and down to so many fewer."""

REFERENCE_RAMP = 60
"""Steps at which nothing moves: those of the ramps on which the constants were fitted."""

BELOW_RISE = 0.55
"""Without a fall but with a rise, the middle of the bounds lies so many decades below the rise."""

RIDGE = 0.1
"""Two valleys are told apart by a ridge of at least this share of the loss's drop."""

ODD = 1.0
"""Suggestions of siblings that lie further apart than this, in decades, are tested again."""

FALLBACK = (1 / 30.0, 10.0)
"""Bounds around the optimizer's default rate, as multiples of it, where the curve gives none ..."""

FALLBACK_ABOVE = (1 / 5.0, 30.0)
"""... and where the loss was still falling at the highest rate."""


@dataclass(frozen=True)
class RangeTest:
    """What the range test of one optimizer found.

    Attributes:
        optimizer: name of the optimizer.
        rates: learning rate of each step, shape (steps,).
        losses: batch loss of each step, shape (steps,); the last may be infinite or NaN.
        smoothed: clipped and smoothed loss, shape (steps,).
        low, suggested, high: the learning rates that bound the search, and the first to try.
        status: a key of `MEANINGS`.
        extended: whether a second ramp was needed.
    """

    optimizer: str
    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    low: float
    suggested: float
    high: float
    status: str
    extended: bool = False

    def as_record(self) -> dict[str, Any]:
        """Return it as it is stored and written to tables, with so many digits as curves have."""

        def plain(values: Any) -> list[float | None]:
            return [float(f"{v:.{SIGNIFICANT_DIGITS}g}") if np.isfinite(v) else None for v in values]

        return {
            "low": self.low,
            "suggested": self.suggested,
            "high": self.high,
            "status": self.status,
            "extended": self.extended,
            "rates": plain(self.rates),
            "losses": plain(self.losses),
            "smoothed": plain(self.smoothed),
        }

    @property
    def note(self) -> str:
        """Say what the status means for the bounds."""
        return describe_bounds(self.optimizer, self.status, self.suggested)


def describe_bounds(optimizer: str, status: str, suggested: float) -> str:
    """Say for people what the bounds of an optimizer rest on."""
    spec, meaning = OPTIMIZERS[optimizer], MEANINGS[status]
    if spec.from_ramp is None:
        return "a ramp says little of whole runs here; bounds around the usual rate"
    if status == OK:
        return meaning
    if suggested == spec.default_learning_rate:
        return f"{meaning}; bounds around the usual rate instead"
    return f"{meaning}; bounds below the rate at which it rose instead"


def analyse_ramp(
    optimizer: str,
    rates: ArrayLike,
    losses: ArrayLike,
    *,
    total_steps: int | None = None,
    window: int | None = None,
) -> RangeTest:
    """Turn a ramp's losses into bounds, a suggestion and a status.

    The ramp shows two rates: a, at the smoothed minimum, and r, right of it, where only a quarter of
    the drop is left.  The best rates of whole runs lie around sqrt(a r), moved by the optimizer's
    `from_ramp` and down for longer runs where the optimizer settles: the suggestion.  The bounds
    reach 1.05 decades to either side, but not beyond 1.5 d, where d is the first rate at which the
    smoothed loss is above its start again, nor beyond 1.5 times the ramp's last rate.  A curve that
    only rises has its bounds around a rate below the rise.  Where the curve supports neither, they are
    [default / 30, 10 default], or [default / 5, 30 default] where it was still falling at the end.

    Args:
        optimizer: a name in `OPTIMIZERS`.
        rates: learning rate of each step, rising, shape (steps,).
        losses: batch loss of each step; may end in infinity or NaN.
        total_steps: steps of the runs that the bounds are for; None takes ten times the usual ramp's.
        window: steps of the centred moving average; None takes a tenth of the ramp, at least five.

    Returns:
        The result; a curve of any length or shape has one.
    """
    rate, loss = np.asarray(rates, dtype=float), np.asarray(losses, dtype=float)
    spec = OPTIMIZERS[optimizer]
    default = spec.default_learning_rate
    steps = min(len(rate), len(loss))
    rate, loss = rate[:steps], loss[:steps]
    finite = np.isfinite(loss)
    usable = int(np.argmin(finite)) if not finite.all() else steps

    def result(status: str, smoothed: NDArray[np.float64], middle: float = 0.0, d: float = np.inf) -> RangeTest:
        reach = 10.0**HALF_WIDTH
        if spec.from_ramp is None:
            low, suggested, high = default / reach, default, default * reach
        elif status == OK:
            moved = spec.from_ramp
            if spec.settles:
                longer = np.log10((total_steps or 10 * REFERENCE_RAMP) / REFERENCE_RAMP)
                moved += PER_DECADE_OF_STEPS * float(np.clip(longer, SHORTEST, LONGEST))
            suggested = middle * 10.0**moved
            # Beyond the ramp's last rate nothing was seen.
            low, high = suggested / reach, min(suggested * reach, ABOVE_RISE * min(d, float(rate[-1])))
            suggested = min(suggested, high)
        elif middle:
            low, suggested, high = middle / reach, middle, middle * reach
        else:
            below, above = FALLBACK_ABOVE if status == NEVER_ROSE else FALLBACK
            low, suggested, high = default * below, default, default * above
        return RangeTest(optimizer, rate, loss, smoothed, float(low), float(suggested), float(high), status)

    if usable == 0:
        return result(DIVERGED_AT_START if steps else TOO_SHORT, np.full(steps, np.nan))
    window = window or max(5, steps // 10)
    first = min(max(INITIAL_STEPS, steps // 10), usable)
    initial = float(loss[:first].mean())
    limit = initial + (CLIP - 1.0) * abs(initial)
    clipped = np.where(np.isfinite(loss), np.minimum(loss, limit), limit)
    smoothed = smooth(clipped, window)
    if steps < MINIMUM_STEPS:
        return result(DIVERGED_AT_START if usable < steps else TOO_SHORT, smoothed)
    # Standard error of a difference between the initial mean and a smoothed value.
    noise = noise_level(clipped[:usable]) * np.sqrt(1.0 / window + 1.0 / first)
    lowest = first_valley(smoothed[:usable], 3.0 * noise)
    drop = initial - smoothed[lowest]
    fell = drop > max(3.0 * noise, 1e-9 * abs(initial))
    rose = usable < steps or bool((smoothed[lowest:] > initial).any()) or loss[-1] > initial
    if not fell:
        ended_high = usable < steps or smoothed[-1] > initial + 0.5 * abs(initial)
        if ended_high and usable < max(MINIMUM_STEPS, steps // 3):
            return result(DIVERGED_AT_START, smoothed)
        low_again = np.flatnonzero(smoothed <= initial + max(3.0 * noise, 1e-9 * abs(initial)))
        rise = int(low_again[-1]) + 1 if len(low_again) else 0
        # At its ends the average rests on half a window: a rise must last longer, or end in a stop.
        clear = 0 < rise < (steps - window // 2 if usable == steps else steps)
        middle = float(rate[rise]) / 10.0**BELOW_RISE if clear else 0.0
        return result(NO_SIGNAL, smoothed, middle)
    if not rose and lowest >= steps - max(3, steps // 20):
        return result(NEVER_ROSE, smoothed)
    above = np.flatnonzero(smoothed[lowest:] > initial)
    d = float(rate[lowest + above[0]]) if len(above) else (float(rate[usable]) if usable < steps else np.inf)
    returned = np.flatnonzero(smoothed[lowest:] > initial - LEFT_OF_DROP * drop)
    r = float(rate[lowest + returned[0]]) if len(returned) else float(rate[-1])
    return result(OK, smoothed, float(np.sqrt(rate[lowest] * r)), d)


def first_valley(smoothed: NDArray[np.float64], noise: float) -> int:
    """Return the step of the first valley of a ramp, unless a later one is deeper beyond noise.

    Far right of where a model learns, units die or saturate and the loss may fall a second time.

    Args:
        smoothed: smoothed loss of each step, shape (steps,).
        noise: difference of two smoothed losses that means nothing.

    >>> first_valley(np.array([2.0, 1.0, 1.5, 0.99]), 0.1), first_valley(np.array([2.0, 1.0, 1.5, 0.5]), 0.1)
    (1, 3)
    """
    lowest = int(np.argmin(smoothed))
    margin = max(noise, RIDGE * float(smoothed[0] - smoothed[lowest]))
    as_deep = np.flatnonzero(smoothed[:lowest] <= smoothed[lowest] + noise)
    if not len(as_deep):
        return lowest
    begin = int(as_deep[0])
    ridge = np.flatnonzero(smoothed[begin:lowest] > smoothed[lowest] + noise + margin)
    if not len(ridge):
        return lowest  # one valley with a flat floor
    return begin + int(np.argmin(smoothed[begin : begin + int(ridge[0])]))


@dataclass(frozen=True)
class Landmarks:
    """What people read off a range test's curve.

    Attributes:
        minimum: learning rate of the lowest smoothed loss.
        lowest_loss: that loss.
        left_of_minimum: the rate, left of the minimum, up to which a tenth of the drop is still to come.
        steepest: the rate at which the smoothed loss falls fastest over the log rate.
    """

    minimum: float
    lowest_loss: float
    left_of_minimum: float
    steepest: float


def landmarks(rates: ArrayLike, smoothed: ArrayLike) -> Landmarks | None:
    """Return what people read off a curve; None for one without two finite points.

    Args:
        rates: learning rate of each step, rising, shape (steps,).
        smoothed: smoothed loss of each step, same shape.
    """
    rate, loss = np.asarray(rates, dtype=float), np.asarray(smoothed, dtype=float)
    rate, loss = rate[np.isfinite(loss)], loss[np.isfinite(loss)]
    if len(rate) < 2:
        return None
    lowest = int(np.argmin(loss))
    before = loss[: lowest + 1]
    to_come = before > before[-1] + 0.1 * (before.max() - before[-1])
    left = int(np.flatnonzero(to_come)[-1]) if to_come.any() else lowest
    steepest = int(np.argmin(np.gradient(loss, np.log(rate))[: lowest + 1]))
    return Landmarks(float(rate[lowest]), float(loss[lowest]), float(rate[left]), float(rate[steepest]))


def loss_change(losses: ArrayLike, window: int) -> NDArray[np.float64]:
    """Return the change of the loss per step, averaged over a centred window.

    Args:
        losses: loss of each step, shape (steps,).
        window: steps of the moving average.

    >>> loss_change([4.0, 3.0, 2.0, 1.0], 2).tolist()
    [-1.0, -1.0, -1.0, -1.0]
    """
    loss = np.asarray(losses, dtype=float)
    if len(loss) < 2:
        return np.zeros(len(loss))
    index = np.arange(len(loss))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + (window + 1) // 2, len(loss) - 1)
    return np.asarray((loss[high] - loss[low]) / np.maximum(high - low, 1))


def ramp(low: float, high: float, steps: int) -> NDArray[np.float64]:
    """Return rates that rise by a constant factor per step.

    Args:
        low, high: first and last learning rate, both above 0.
        steps: number of steps.

    >>> ramp(0.01, 1.0, 3)
    array([0.01, 0.1 , 1.  ])
    """
    return np.geomspace(low, high, max(steps, 1))


def odd_pairs(suggested: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the siblings whose suggestions lie further apart than siblings do.

    Args:
        suggested: learning rate to try first, by optimizer.

    >>> odd_pairs({"adam": 0.005, "adamw": 0.5, "sgd": 1.0})
    [('adam', 'adamw')]
    """
    pairs = [
        (spec.sibling, name) for name, spec in OPTIMIZERS.items() if spec.sibling in suggested and name in suggested
    ]
    return [
        (one, other)
        for one, other in pairs
        if one is not None and abs(np.log10(suggested[one] / suggested[other])) > ODD
    ]


def run_range_test(
    engine: Engine,
    optimizer: str,
    split: AnySplit,
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 60,
    total_steps: int | None = None,
    window: int | None = None,
) -> RangeTest:
    """Run the ramp, and once more with a longer or finer one if the first gave no bounds.

    Nothing needs restoring afterwards: every run of the engine starts by resetting weights,
    optimizer slots and random states.

    Args:
        engine: the engine.
        optimizer: a name in `OPTIMIZERS`.
        split: the samples to train on.
        low, high: first and last learning rate.
        steps: mini-batches of the ramp.
        total_steps, window: see `analyse_ramp`.

    Returns:
        The result of the ramp that was judged last.
    """

    def once(first: float, last: float, count: int) -> RangeTest:
        rates = ramp(first, last, count)
        outcome = engine.start(optimizer, split).steps(rates, RANGE_TEST_RULE)
        return analyse_ramp(
            optimizer, rates[: len(outcome.losses)], outcome.losses, total_steps=total_steps, window=window
        )

    found = once(low, high, steps)
    if found.status == OK or OPTIMIZERS[optimizer].from_ramp is None:
        return found
    if found.status == NEVER_ROSE:
        again = once(low, high * 1000.0, round(steps * 1.5))
    elif found.status == DIVERGED_AT_START:
        again = once(low / 1e4, high, steps * 2)
    else:
        again = once(low, high, steps * 3)
    return RangeTest(**{**again.__dict__, "extended": True})
