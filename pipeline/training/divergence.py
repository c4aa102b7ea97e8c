"""When a run counts as diverged, as a rule on its step losses.

The engine applies the same rule inside its compiled loop; `first_divergence` is the plain form
that states it, and the tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

REFERENCE_STEPS = 3
"""The initial loss is the mean of this many first steps."""

MEDIAN_STEPS = 3
"""A blow-up is judged on the median of this many last steps, so that one bad batch ends nothing."""

NOT_FINITE = "loss not finite"
BLEW_UP = "loss blew up"
WEIGHTS_NOT_FINITE = "weights not finite"
VALIDATION_NOT_FINITE = "validation loss not finite"

REASONS = {1: NOT_FINITE, 2: BLEW_UP, 3: WEIGHTS_NOT_FINITE}
"""Reasons by the code that the compiled loop returns; 0 is a run that did not diverge."""


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
