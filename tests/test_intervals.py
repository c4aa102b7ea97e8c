"""Confirmation: intervals that hold, ties that are called ties."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.search.intervals import judge, paired_interval


def test_the_interval_covers_the_truth_of_overlapping_folds():
    """Over 400 simulated confirmations with 5 × 5 folds that share data, 95% intervals hold at least 90%.

    Fold differences of one repeat share a component as folds with common training samples do.
    """
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        shared = 0.3 * rng.standard_normal()
        differences = 0.2 + shared + rng.standard_normal(25)
        interval = paired_interval(differences, 0.25)
        held += interval.low <= 0.2 <= interval.high
    assert held >= 360


def test_equal_configurations_are_called_tied():
    """Candidates that differ only by noise end in a tie in at least 90% of confirmations."""
    rng = np.random.default_rng(1)
    tied = 0
    for _ in range(200):
        common = rng.standard_normal(25)
        costs = {k: (common + 0.3 * rng.standard_normal(25)).tolist() for k in (0, 1)}
        tied += bool(judge(costs, 0, 0.25).tied_with)
    assert tied >= 180


def test_a_clear_winner_is_not_tied_and_its_improvement_is_positive():
    """A difference of many standard errors separates."""
    rng = np.random.default_rng(2)
    base = 1 + 0.01 * rng.standard_normal(10)
    verdict = judge({0: base.tolist(), 7: (base - 0.5 + 0.01 * rng.standard_normal(10)).tolist()}, 0, 0.25)
    assert verdict.winner == 7
    assert verdict.tied_with == ()
    assert verdict.improvement is not None
    assert 0.4 < verdict.improvement.low < 0.5 < verdict.improvement.high < 0.6


def test_the_default_wins_when_nothing_beats_it():
    """The Keras default itself can be the answer."""
    assert judge({0: [1.0, 1.1, 0.9], 3: [2.0, 2.1, 2.2]}, 0, 0.25).winner == 0


def test_a_candidate_that_diverged_can_neither_win_nor_tie():
    """One divergence on a fresh seed disqualifies; a diverged default leaves no improvement."""
    verdict = judge({0: [float("inf")], 1: [0.5, 0.6], 2: [0.1, float("inf")]}, 0, 0.25)
    assert (verdict.winner, verdict.tied_with, verdict.improvement) == (1, (), None)


def test_a_single_difference_has_no_bounds():
    """One paired run supports no interval."""
    interval = paired_interval([0.3], 0.25)
    assert interval.mean == pytest.approx(0.3)
    assert not interval.separates
