"""Fold pruning: hopeless trials end, late gainers do not, few folds do not disable it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.search.pruning import FoldPruner, PastTrial, make_pruner, pruning_note, running_score
from pipeline.training.decays import rate_table

EPOCHS = 20


def constant_curve(final: float) -> np.ndarray:
    """A loss that falls fast and settles."""
    return final + 2.0 * np.exp(-np.arange(EPOCHS) / 2.0)


def late_curve(final: float) -> np.ndarray:
    """A loss that stays high while the rate is high and falls as a cosine lets the rate go down."""
    rates = rate_table("cosine", 1.0, 0.01, EPOCHS)
    return final + 1.0 * rates


def pruner_with(curves: list[np.ndarray], folds: int = 3, name: str = "median", number: int = 0) -> FoldPruner:
    """A pruner that has seen trials with the same curve in every fold."""
    pruner = make_pruner(name, 25.0, epochs=EPOCHS, folds=folds, number=number)
    for curve in curves:
        pruner.record(PastTrial((curve,) * folds))
    return pruner


PAST = [constant_curve(0.5 + 0.05 * i) for i in range(11)]


def test_after_a_fold_the_worse_half_ends_and_the_better_half_goes_on():
    """The median rule on the running mean over folds, at every number of folds."""
    pruner = pruner_with(PAST)
    for folds in (1, 2):
        assert not pruner.after_fold([constant_curve(0.6)] * folds)
        assert pruner.after_fold([constant_curve(0.95)] * folds)


def test_one_bad_fold_can_be_made_good_by_another():
    """The mean over folds counts, not the latest fold."""
    assert not pruner_with(PAST).after_fold([constant_curve(0.5), constant_curve(0.9)])


@pytest.mark.parametrize("name", ["median", "percentile"])
def test_with_folds_nothing_is_judged_before_a_schedule_has_ended(name):
    """However bad it looks in the middle."""
    pruner = pruner_with(PAST, name=name)
    assert not any(pruner.inside_fold(np.full(epoch, 99.0)) for epoch in range(1, EPOCHS))


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_in_a_hold_out_a_scheme_that_gains_late_survives(epoch):
    """A cosine that ends best of all, beside constants that have long settled."""
    pruner = pruner_with([constant_curve(0.5 + 0.3 * i) for i in range(11)], folds=1)
    assert not pruner.inside_fold(late_curve(0.3)[:epoch])


def test_the_late_gainer_would_be_killed_by_the_plain_median_rule():
    """The test above is not vacuous: compared at mid-schedule it is worse than the median."""
    at = 9
    constants = [constant_curve(0.5 + 0.05 * i)[at] for i in range(11)]
    assert late_curve(0.3)[: at + 1].min() > np.median(constants)


def test_a_hopeless_hold_out_ends_in_its_last_quarter():
    """Far worse than the others, from epoch 15 of 20 on; a little worse runs through."""
    pruner = pruner_with(PAST, folds=1)
    assert [epoch for epoch in range(1, EPOCHS + 1) if pruner.inside_fold(np.full(epoch, 5.0))] == [15, 16, 17, 18, 19]
    assert not any(pruner.inside_fold(constant_curve(0.9)[:epoch]) for epoch in range(1, EPOCHS))


def test_nothing_is_pruned_before_enough_trials():
    """Four earlier trials are too few."""
    assert not pruner_with(PAST[:4]).after_fold([np.full(EPOCHS, 9.0)])
    assert not pruner_with(PAST[:4], folds=1).inside_fold(np.full(16, 9.0))
    assert not pruner_with(PAST[:4], name="successive-halving").after_fold([np.full(EPOCHS, 9.0)])


def test_no_pruning_never_prunes():
    """The pruner "none" lets everything run."""
    for folds in (1, 3):
        pruner = pruner_with(PAST, folds=folds, name="none")
        assert not pruner.after_fold([np.full(EPOCHS, 99.0)])
        assert not pruner.inside_fold(np.full(16, 99.0))


def test_percentile_keeps_the_stated_share():
    """Percentile 25 keeps the best quarter."""
    pruner = pruner_with(PAST, name="percentile")
    assert not pruner.after_fold([constant_curve(0.55)])
    assert pruner.after_fold([constant_curve(0.75)])


@pytest.mark.parametrize("folds", [5, 1])
def test_successive_halving_passes_the_best_third_at_its_rungs_only(folds):
    """After folds 1 and 2 of 5, or epochs 1, 3 and 7 of 20; fourth of twelve passes, fifth does not."""
    pruner = pruner_with(PAST, folds=folds, name="successive-halving")
    at = {5: {1, 2}, 1: {1, 3, 7}}[folds]

    def ends(final: float) -> set[int]:
        curve = constant_curve(final)
        if folds == 1:
            return {epoch for epoch in range(1, EPOCHS) if pruner.inside_fold(curve[:epoch])}
        return {count for count in range(1, folds) if pruner.after_fold([curve] * count)}

    assert ends(0.64) == set()
    assert ends(0.71) == at


def test_hyperband_starts_its_rungs_later_from_trial_to_trial():
    """Three brackets on five folds: two rungs, one, and none."""
    hopeless = [np.full(EPOCHS, 9.0)]
    found = [
        [count for count in (1, 2, 3) if pruner_with(PAST, 5, "hyperband", number).after_fold(hopeless * count)]
        for number in range(4)
    ]
    assert found == [[1, 2], [2], [], [1, 2]]


@pytest.mark.parametrize(
    ("name", "epochs", "folds", "said"),
    [
        ("median", 20, 5, None),
        ("median", 20, 1, None),
        ("median", 3, 1, "ends nothing early"),
        ("successive-halving", 20, 2, None),
        ("successive-halving", 1, 1, "no rung on 1 epochs"),
        ("hyperband", 20, 2, "1 rung on 2 folds; use more folds"),
        ("none", 1, 1, None),
    ],
)
def test_a_rule_that_can_do_nothing_says_so(name, epochs, folds, said):
    """Too few folds or epochs for the chosen rule."""
    note = pruning_note(name, epochs=epochs, folds=folds)
    assert note is None if said is None else said in str(note)


def test_a_trial_that_was_good_and_then_lost_its_loss_is_pruned():
    """NaN in the latest epochs does not hide behind a good beginning when all of them are NaN."""
    assert pruner_with(PAST).after_fold([np.full(EPOCHS, np.nan)])
    assert pruner_with(PAST, folds=1).inside_fold(np.full(16, np.nan))
    assert pruner_with(PAST, name="successive-halving").after_fold([np.full(EPOCHS, np.nan)])


def test_the_running_score_is_the_best_epoch_of_the_mean():
    """Not the mean of each fold's best epoch, which would be 1.0 here."""
    assert running_score([[3.0, 1.0], [1.0, 3.0]]) == 2.0
