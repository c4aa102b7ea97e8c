"""Splits by scikit-learn: hold-out, K-fold once or repeated, by groups, in the order of time; stratified by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ObjectiveError

MAX_CLASSES = 1000
"""Integer targets with more distinct values than this are taken for numbers, not class labels."""


@dataclass(frozen=True)
class Split:
    """Training and validation samples of one fold, and the seed of everything random in it.

    Attributes:
        train: indices of training samples, shape (n,).
        validation: indices of validation samples, shape (m,).
        seed: seed of initial weights, shuffles and layer randomness.
    """

    train: NDArray[np.int32]
    validation: NDArray[np.int32]
    seed: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the numbers of training and validation samples."""
        return len(self.train), len(self.validation)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the steps of an epoch; a last partial batch counts, as in `model.fit`."""
        return -(-len(self.train) // batch_size)


def class_labels(targets: Any) -> NDArray[np.int64] | None:
    """Return a class index per sample, or None when the targets are not class labels.

    Integers, booleans and strings in one column count as labels, and so do one-hot rows.

    Args:
        targets: the y of a dataset, in any form.

    >>> class_labels(np.array([[0.0, 1.0], [1.0, 0.0]]))
    array([1, 0])
    >>> class_labels(np.array([0.5, 1.5])) is None
    True
    """
    if not isinstance(targets, np.ndarray) or targets.ndim > 2 or targets.size == 0:
        return None
    if targets.ndim == 2 and targets.shape[1] > 1:
        one_hot = np.isin(targets, (0, 1)).all() and (targets.sum(axis=1) == 1).all()
        return np.argmax(targets, axis=1) if one_hot else None
    column = targets.reshape(-1)
    if column.dtype.kind == "f" and not np.isin(column, (0.0, 1.0)).all():
        return None
    values, labels = np.unique(column, return_inverse=True)
    if len(values) > min(MAX_CLASSES, max(2, len(column) // 2)):
        return None
    return labels.astype(np.int64)


def make_splits(
    samples: int,
    labels: NDArray[np.int64] | None,
    *,
    folds: int,
    fraction: float,
    seed: int,
    repeats: int = 1,
    groups: NDArray[np.int64] | None = None,
    ordered: bool = False,
    gap: int = 0,
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return (training indices, validation indices) per fold.

    Args:
        samples: number of samples.
        labels: class index per sample, shape (samples,), to stratify by; None splits at random.
        folds: 1 for a hold-out, else the K of K-fold.
        fraction: share of samples held out when `folds` is 1, in (0, 1).
        seed: seed of the split.
        repeats: how often K-fold is drawn anew.
        groups: group index per sample, shape (samples,); no group is on both sides of a fold.
        ordered: samples are in the order of time: every fold is validated on what follows its training samples.
        gap: samples left out between the two, where `ordered`.

    Returns:
        One pair of int32 arrays per fold; over the folds of K-fold every sample is validated once.

    Raises:
        ObjectiveError: when there are too few samples, in all or in one class.
    """
    from sklearn.model_selection import (
        KFold,
        RepeatedKFold,
        RepeatedStratifiedKFold,
        ShuffleSplit,
        StratifiedKFold,
        StratifiedShuffleSplit,
        TimeSeriesSplit,
    )

    if ordered:
        if samples // (folds + 1) <= gap:
            raise ObjectiveError(
                f"a time-series split of {samples} samples into {folds} folds with a gap of {gap} leaves no training "
                "samples. Lower validation.folds or validation.gap, or add data."
            )
        return _as_int32(TimeSeriesSplit(folds, gap=gap).split(np.zeros(samples)))
    if groups is not None:
        return _group_hold_out(groups, fraction, seed) if folds == 1 else _group_splits(labels, groups, folds, seed)
    if folds > samples:
        raise ObjectiveError(
            f"validation.folds must not exceed the number of samples, got {folds} folds and {samples} samples. "
            "Lower it, or add data."
        )
    if labels is not None:
        counts = np.bincount(labels)
        counts = counts[counts > 0]
        needed = max(folds, 2)
        if counts.min() < needed:
            rare = int(np.flatnonzero(np.bincount(labels) == counts.min())[0])
            raise ObjectiveError(
                f"stratified validation needs at least {needed} samples of every class, got {counts.min()} of class "
                f"number {rare}. Lower validation.folds, add samples, or set validation.stratify = false."
            )
    if folds == 1:
        held_out = max(1, round(fraction * samples))
        if samples - held_out < 1:
            raise ObjectiveError(
                f"a hold-out of {fraction:g} leaves no training samples, got {samples} samples in all."
            )
        classes = 0 if labels is None else len(np.unique(labels))
        stratify = labels is not None and held_out >= classes and samples - held_out >= classes
        splitter: Any = (StratifiedShuffleSplit if stratify else ShuffleSplit)(
            n_splits=1, test_size=held_out, random_state=seed
        )
    elif repeats > 1:
        repeated = RepeatedKFold if labels is None else RepeatedStratifiedKFold
        splitter = repeated(n_splits=folds, n_repeats=repeats, random_state=seed)
    elif labels is not None:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    else:
        splitter = KFold(folds, shuffle=True, random_state=seed)
    return _as_int32(splitter.split(np.zeros(samples), labels))


def _group_splits(
    labels: NDArray[np.int64] | None, groups: NDArray[np.int64], folds: int, seed: int
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    count = len(np.unique(groups))
    if count < folds:
        raise ObjectiveError(
            f"group-k-fold needs at least as many groups as folds, got {count} groups and {folds} folds. "
            "Lower validation.folds."
        )
    nothing = np.zeros(len(groups))
    if labels is not None and np.bincount(labels).max() >= folds:  # no class so large: nothing to stratify
        stratified = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        found = _as_int32(stratified.split(nothing, labels, groups))
        if all(len(held) for _, held in found):  # stratifying few groups can leave a fold empty
            return found
    return _as_int32(GroupKFold(folds, shuffle=True, random_state=seed).split(nothing, None, groups))


def _group_hold_out(
    groups: NDArray[np.int64], fraction: float, seed: int
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return one split that holds out whole groups, as many as make up their share."""
    from sklearn.model_selection import GroupShuffleSplit

    count = len(np.unique(groups))
    held_out = max(1, round(fraction * count))
    if count - held_out < 1:
        raise ObjectiveError(
            f"a hold-out of {fraction:g} of {count} groups leaves none to train on. Lower validation.fraction, or add "
            "groups."
        )
    splitter = GroupShuffleSplit(n_splits=1, test_size=held_out, random_state=seed)
    return _as_int32(splitter.split(np.zeros(len(groups)), None, groups))


def _as_int32(pairs: Any) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    return [(train.astype(np.int32), validation.astype(np.int32)) for train, validation in pairs]
