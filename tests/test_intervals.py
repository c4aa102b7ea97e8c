"""Confirmation: intervals that hold, ties that are called ties."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.search.intervals import judge, paired_interval


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


@pytest.mark.parametrize("finalists", [1, 3])
@pytest.mark.parametrize(("folds", "repeats", "share"), [(5, 5, 0.2), (3, 2, 1 / 3), (1, 3, 0.2)])
@pytest.mark.parametrize("noise", ["normal", "heavy tails", "unequal"])
def test_the_interval_holds_and_equal_configurations_are_tied(finalists, folds, repeats, share, noise):
    """Over many made studies, whose runs share a part of their noise as overlapping training sets do.

    The improvement's interval holds the true difference in nine studies of ten or more; equal
    configurations are all called tied nearly as often, under heavy tails too; a default as good as
    the finalists is hardly ever said to be beaten.
    """
    rng = np.random.default_rng([finalists, folds, len(noise)])
    runs, studies, ratio = folds * repeats, 500, share / (1 - share)
    sizes = np.linspace(0.5, 2.0, finalists + 1) if noise == "unequal" else np.ones(finalists + 1)

    def draw(*shape: int) -> np.ndarray:
        values = rng.standard_t(5, shape) / np.sqrt(5 / 3) if noise == "heavy tails" else rng.standard_normal(shape)
        return np.asarray(values)

    held = tied = beaten = held_apart = 0
    for _ in range(studies):
        common = 3 * draw(1, runs)
        own = np.sqrt(share) * draw(finalists + 1, 1) + np.sqrt(1 - share) * draw(finalists + 1, runs)
        costs = common + sizes[:, None] * own
        equal = judge(dict(enumerate(costs)), 0, ratio)
        held += equal.improvement.low <= 0 <= equal.improvement.high
        tied += len(equal.tied_with) == finalists
        beaten += equal.improvement.low > 0
        truth = np.arange(finalists + 1.0)[::-1]  # the default is worst, the last finalist best
        apart = judge(dict(enumerate(costs + truth[:, None])), 0, ratio)
        held_apart += apart.improvement.low <= truth[0] - truth[apart.winner] <= apart.improvement.high
    assert min(held, held_apart) >= 0.9 * studies
    assert tied >= 0.87 * studies
    assert beaten <= 0.05 * studies


def test_a_difference_of_three_times_the_noise_is_found():
    """The caution for several comparisons leaves enough power to tell a clearly better configuration."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        costs = {key: rng.standard_normal(25) + (3.0 if key == 0 else 0.0) for key in range(4)}
        found += judge(costs, 0, 0.25).improvement.low > 0
    assert found >= 190
