"""The divergence rule as a plain function."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.training.divergence import DivergenceRule, ceiling, first_divergence

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_stops_at_its_step(bad):
    """NaN and both infinities end a run at once, even in its first steps."""
    assert first_divergence([1.0, bad, 1.0], 100.0, from_step=10) == (1, "loss not finite")


def test_one_bad_batch_ends_nothing_but_three_do():
    """The median of three ignores one outlier; the third high loss in four steps stops."""
    assert first_divergence([1, 1, 500, 1, 1, 1], 100.0) is None
    assert first_divergence([1, 1, 500, 500, 1], 100.0) == (3, "loss blew up")


def test_early_steps_are_not_judged():
    """A transient before `from_step` is forgiven."""
    assert first_divergence([1, 900, 900, 900, 1, 1], 100.0, from_step=10) is None


@pytest.mark.parametrize(("first", "expected"), [([2, 2, 2], 20.0), ([-2, -2, -2], 16.0), ([0.0, 1.0, -1.0], 6.0)])
def test_the_ceiling_is_above_the_start_for_any_sign_of_loss(first, expected):
    """Ten times a positive loss; as far above a negative one; by its scatter for one near zero."""
    assert ceiling(first, DivergenceRule(factor=10.0)) == pytest.approx(expected)
    assert ceiling(first, DivergenceRule(factor=10.0)) > np.max(first)
