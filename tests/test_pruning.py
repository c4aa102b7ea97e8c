"""Fold pruning: hopeless trials end, late gainers do not, few folds do not disable it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.search.pruning import FoldPruner, PastTrial, running_score
from pipeline.training.decays import rate_table

EPOCHS = 20


def constant_curve(final: float) -> np.ndarray:
    """A loss that falls fast and settles."""
    return final + 2.0 * np.exp(-np.arange(EPOCHS) / 2.0)


def late_curve(final: float) -> np.ndarray:
    """A loss that stays high while the rate is high and falls as a cosine lets the rate go down."""
    rates = rate_table("cosine", 1.0, 0.01, EPOCHS)
    return final + 1.0 * rates


def pruner_with(decay: str, curves: list[np.ndarray], folds: int = 3, quantile: float = 0.5) -> FoldPruner:
    """A pruner that has seen trials with the same curve in every fold."""
    pruner = FoldPruner(quantile, EPOCHS)
    for curve in curves:
        pruner.record(PastTrial(decay, (curve,) * folds))
    return pruner


PAST = [constant_curve(0.5 + 0.05 * i) for i in range(11)]


def test_after_a_fold_the_worse_half_ends_and_the_better_half_goes_on():
    """The median rule on the running mean over folds, at every number of folds."""
    pruner = pruner_with("constant", PAST)
    for folds in (1, 2):
        assert not pruner.after_fold([constant_curve(0.6)] * folds)
        assert pruner.after_fold([constant_curve(0.95)] * folds)


def test_one_bad_fold_can_be_made_good_by_another():
    """The mean over folds counts, not the latest fold."""
    pruner = pruner_with("constant", PAST)
    assert not pruner.after_fold([constant_curve(0.5), constant_curve(0.9)])


@pytest.mark.parametrize("epoch", range(5, EPOCHS))
def test_a_scheme_that_gains_late_is_not_pruned_in_the_middle(epoch):
    """A cosine that ends best of all survives beside constants that have long settled.

    At every epoch its loss so far is above the median of the constants' until near the end.
    """
    pruner = pruner_with("constant", [constant_curve(0.5 + 0.3 * i) for i in range(11)])
    winner = late_curve(0.3)
    assert not pruner.inside_fold("cosine", 0, winner[:epoch])


def test_the_late_gainer_would_be_killed_by_the_plain_median_rule():
    """The test above is not vacuous: compared at mid-schedule it is worse than the median."""
    at = 9
    constants = [constant_curve(0.5 + 0.05 * i)[at] for i in range(11)]
    assert late_curve(0.3)[: at + 1].min() > np.median(constants)


def test_a_hopeless_trial_ends_inside_the_fold():
    """Worse than nearly every trial of any scheme ends; worse than its own scheme's median too if low overall."""
    pruner = pruner_with("cosine", PAST)
    assert pruner.inside_fold("linear", 0, np.full(8, 5.0))
    assert pruner.inside_fold("cosine", 0, np.full(8, 5.0))


def test_nothing_is_pruned_before_enough_trials_or_epochs():
    """Four earlier trials are too few, and so is the first quarter of a fold."""
    assert not pruner_with("constant", PAST[:4]).after_fold([np.full(EPOCHS, 9.0)])
    assert not pruner_with("constant", PAST).inside_fold("constant", 0, np.full(4, 9.0))


def test_no_pruning_never_prunes():
    """The pruner "none" lets everything run."""
    pruner = FoldPruner.named("none", 25.0, EPOCHS)
    for curve in PAST:
        pruner.record(PastTrial("constant", (curve,)))
    assert not pruner.after_fold([np.full(EPOCHS, 99.0)])
    assert not pruner.inside_fold("constant", 0, np.full(8, 99.0))


def test_percentile_keeps_the_stated_share():
    """Percentile 25 keeps the best quarter."""
    pruner = pruner_with("constant", PAST, quantile=FoldPruner.named("percentile", 25.0, EPOCHS).quantile)
    assert not pruner.after_fold([constant_curve(0.55)])
    assert pruner.after_fold([constant_curve(0.75)])


def test_a_trial_that_was_good_and_then_lost_its_loss_is_pruned():
    """NaN in the latest epochs does not hide behind a good beginning when all of them are NaN."""
    assert pruner_with("constant", PAST).after_fold([np.full(EPOCHS, np.nan)])


def test_the_running_score_is_the_best_epoch_of_the_mean():
    """Not the mean of each fold's best epoch, which would be 1.0 here."""
    assert running_score([[3.0, 1.0], [1.0, 3.0]]) == 2.0
