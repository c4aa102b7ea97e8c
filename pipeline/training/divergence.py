"""When a run counts as diverged: one rule on its step losses, its constants, and every reason.

`first_divergence` states the rule in NumPy; `judge` is the same inside a traced loop, and the tests
hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

REFERENCE_STEPS = 3
"""The initial loss is the mean of this many first steps."""

MEDIAN_STEPS = 3
"""A blow-up is judged on the median of this many last steps, so that one bad batch ends nothing."""

NOT_FINITE = "loss not finite"
BLEW_UP = "loss blew up"
WEIGHTS_NOT_FINITE = "weights not finite"
VALIDATION_NOT_FINITE = "validation loss not finite"

SOUND, CODE_NOT_FINITE, CODE_BLEW_UP, CODE_WEIGHTS = 0, 1, 2, 3
"""Codes that a traced loop returns."""

REASONS = {CODE_NOT_FINITE: NOT_FINITE, CODE_BLEW_UP: BLEW_UP, CODE_WEIGHTS: WEIGHTS_NOT_FINITE}
"""Reasons by code; `SOUND` has none."""

NO_RECENT_LOSSES = np.full(MEDIAN_STEPS - 1, -np.inf, np.float32)
"""The last two losses before a run's first step: too low for any ceiling."""


@dataclass(frozen=True)
class DivergenceRule:
    """Stop when the median of the last losses exceeds `factor` times the initial loss.

    A loss that is not finite stops at once, whatever the factor.  For an initial loss L0 and
    its scale s = max(|L0|, mean deviation of the first losses) the ceiling is
    L0 + (factor - 1) s, which is factor * L0 for the usual positive loss and still a sensible
    bound where losses are negative or start near zero.

    Attributes:
        factor: multiple of the initial loss; infinity looks for non-finite losses only.
        from_step: steps of the run before which a large loss is not judged.
    """

    factor: float = 100.0
    from_step: int = 10


TRIAL_RULE = DivergenceRule(factor=100.0, from_step=10)
"""Rule of trials: far above what a rate that recovers shows in its first steps."""

RANGE_TEST_RULE = DivergenceRule(factor=2.0, from_step=10)
"""Rule of the range test: 1.2 and 1.5 stop falsely; 4 times the smoothed best almost never fires."""


def ceiling(losses: ArrayLike, rule: DivergenceRule) -> float:
    """Return the loss above which a run counts as diverged.

    Args:
        losses: losses of the first steps of the run.
        rule: the rule.

    >>> ceiling([2.0, 2.0, 2.0], DivergenceRule(factor=2.0))
    4.0
    """
    first = np.asarray(losses, dtype=float)[:REFERENCE_STEPS]
    initial = float(first.mean())
    with np.errstate(invalid="ignore"):  # a first loss that is not finite ends the run by itself
        scale = max(abs(initial), float(np.abs(first - initial).mean()))
    return initial + (rule.factor - 1.0) * scale


def first_divergence(losses: ArrayLike, limit: float, from_step: int = 0) -> tuple[int, str] | None:
    """Return the step at which a run diverged, and why.

    Args:
        losses: loss of every step, shape (steps,).
        limit: loss above which the run counts as diverged, from `ceiling`.
        from_step: steps of the run before which a large loss is not judged.

    Returns:
        (step counted from 0, reason), or None for a run that did not diverge.

    >>> first_divergence([1.0, 1.0, float("nan")], 100.0)
    (2, 'loss not finite')
    """
    values = np.asarray(losses, dtype=float)
    for step, loss in enumerate(values):
        if not np.isfinite(loss):
            return step, NOT_FINITE
        if step + 1 >= max(from_step, MEDIAN_STEPS):
            last = values[step + 1 - MEDIAN_STEPS : step + 1]
            if float(np.median(last)) > limit:
                return step, BLEW_UP
    return None


def diverges(losses: ArrayLike, rule: DivergenceRule) -> tuple[int, str] | None:
    """Return the step at which a run's losses break a rule whose reference are their own first steps, and why.

    Args:
        losses: loss of every step so far, shape (steps,).
        rule: the rule.

    >>> diverges([1.0] * 10 + [3.0] * 3, RANGE_TEST_RULE)
    (11, 'loss blew up')
    >>> diverges([-1.0] * 60, RANGE_TEST_RULE) is None
    True
    """
    return first_divergence(losses, ceiling(losses, rule), rule.from_step)


def ceilings(initial_losses: ArrayLike, rule: DivergenceRule | None, steps: int, done: int) -> NDArray[np.float64]:
    """Return the loss above which each of the next steps counts as blown up, shape (steps,).

    Args:
        initial_losses: losses of the first steps of the run, or of the same batches before it.
        rule: the rule; None, or one of an infinite factor, has no ceilings.
        steps: how many steps come next.
        done: steps of the run before them.
    """
    found = np.full(steps, np.inf)
    if rule is not None and np.isfinite(rule.factor):
        found[max(0, rule.from_step - 1 - done) :] = ceiling(initial_losses, rule)
    return found


def judge(tf: Any, recent: tuple[Any, Any], loss: Any, limit: Any) -> Any:
    """Return the code of a step inside a traced loop, as a tensor.

    Args:
        tf: TensorFlow.
        recent: the losses of the two steps before it.
        loss: its own.
        limit: its ceiling.
    """
    before, latest = recent
    median = tf.maximum(tf.minimum(before, latest), tf.minimum(tf.maximum(before, latest), loss))
    return tf.where(tf.math.is_finite(loss), tf.where(median > limit, CODE_BLEW_UP, SOUND), CODE_NOT_FINITE)
