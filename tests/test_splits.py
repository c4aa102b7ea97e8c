"""Splits: every sample validated once, classes in proportion, too little data refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ObjectiveError
from pipeline.training.splits import class_labels, make_splits


@given(st.integers(10, 200), st.integers(2, 8), st.integers(0, 100))
def test_k_fold_validates_every_sample_exactly_once(samples, folds, seed):
    """Validation parts are a partition; no sample is in both parts of a fold."""
    splits = make_splits(samples, None, folds=folds, fraction=0.2, seed=seed)
    assert len(splits) == folds
    np.testing.assert_array_equal(np.sort(np.concatenate([v for _, v in splits])), np.arange(samples))
    for train, validation in splits:
        assert not set(train) & set(validation)
        assert len(train) + len(validation) == samples


@given(st.integers(0, 50), st.integers(1, 5))
def test_stratified_splits_keep_the_share_of_every_class(seed, folds):
    """A class of a fifth of the samples is a fifth of every validation part, within one sample."""
    labels = np.repeat([0, 0, 0, 0, 1], 30)
    for _, validation in make_splits(150, labels, folds=folds, fraction=0.2, seed=seed):
        assert abs(labels[validation].mean() - 0.2) * len(validation) <= 1.0


def test_the_same_seed_splits_the_same_way_and_another_differently():
    """A split is a function of its seed."""
    once, again, other = (make_splits(50, None, folds=5, fraction=0.2, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(once[0][1], again[0][1])
    assert not np.array_equal(once[0][1], other[0][1])


@pytest.mark.parametrize(
    ("samples", "labels", "folds", "rule"),
    [
        (4, None, 5, "5 folds and 4 samples"),
        (20, np.array([0] * 18 + [1] * 2), 5, "at least 5 samples of every class, got 2"),
        (20, np.array([0] * 19 + [1]), 1, "at least 2 samples of every class, got 1"),
    ],
)
def test_too_little_data_is_refused(samples, labels, folds, rule):
    """Fewer samples than folds, or than folds in one class, names the numbers."""
    with pytest.raises(ObjectiveError) as error:
        make_splits(samples, labels, folds=folds, fraction=0.2, seed=0)
    assert rule in str(error.value)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (np.array([3, 1, 3]), [1, 0, 1]),
        (np.array([[0, 1], [1, 0]]), [1, 0]),
        (np.array(["b", "a", "b"]), [1, 0, 1]),
        (np.array([[1.0], [0.0]]), [1, 0]),
        (np.linspace(0, 1, 9), None),
        (np.arange(2000), None),
        ({"a": np.array([1])}, None),
    ],
)
def test_class_labels_are_told_from_numbers(targets, expected):
    """Integers, strings, 0/1 floats and one-hot rows are labels; measurements, ids and dicts are not."""
    labels = class_labels(targets)
    assert labels is None if expected is None else labels.tolist() == expected
