"""Data whose batches Python code makes, as `keras.utils.PyDataset` and image generators do: read once into arrays.

Such a dataset keeps its own order and may draw random numbers, so that two trials would see other
batches.  As arrays its samples are shuffled by the engine, can be split into folds, and take no
Python in the training loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.errors import ObjectiveError
from pipeline.training.data import Data, Tree, leaves, make_data, map_trees, memory_limit
from pipeline.training.tensorflow_import import import_tensorflow


def read_batches(where: str, raw: Any, float_type: str) -> Any:
    """Put arrays in the place of every PyDataset among what `load_data` returned; all else stays.

    Args:
        where: what is read, for messages.
        raw: a dataset, or the parts (train, test) or (train, validation, test).
        float_type: dtype of floating-point values.

    Raises:
        ObjectiveError: for a dataset that has no end, no samples, no targets, other values whenever it
            is read, or more samples than memory holds.
    """
    _, keras = import_tensorflow()
    if isinstance(raw, tuple | list) and 2 <= len(raw) <= 3:
        names = ("train", "test") if len(raw) == 2 else ("train", "validation", "test")
        return tuple(
            _read(f"{where}: {name}", part, float_type) if isinstance(part, keras.utils.PyDataset) else part
            for name, part in zip(names, raw, strict=True)
        )
    return _read(where, raw, float_type) if isinstance(raw, keras.utils.PyDataset) else raw


def _read(where: str, dataset: Any, float_type: str) -> tuple[Tree, ...]:
    """Return (x,), (x, y) or (x, y, sample_weight) of all samples of a dataset, in its order."""
    count = dataset.num_batches
    if count is None:
        raise ObjectiveError(
            f"{where}: a {type(dataset).__name__} must have a number of batches, got none. Define __len__, or return "
            "tf.data datasets and set steps_per_epoch."
        )
    if count == 0:
        raise ObjectiveError(f"{where}: a {type(dataset).__name__} must have at least one batch, got none.")
    first = _batch(where, dataset, 0, float_type)
    if not _same(first, _batch(where, dataset, 0, float_type)):
        raise ObjectiveError(
            f"{where}: a {type(dataset).__name__} must give the same batch whenever it is read, got other values for "
            "batch 0 when it was read again, as random augmentation makes them. Make layers of the model of it, such "
            "as keras.layers.RandomFlip, or return tf.data datasets."
        )
    needed, limit = count * sum(array.nbytes for _, array in leaves(first.parts())), memory_limit()
    if needed > limit:
        raise ObjectiveError(
            f"{where}: a {type(dataset).__name__} is read into memory and must take at most {limit / 2**30:.1f} GiB, "
            f"half of this machine's, got {count} batches of together about {needed / 2**30:.1f} GiB. Return tf.data "
            "datasets, which stay outside memory."
        )
    batches = [first, *(_batch(where, dataset, i, float_type) for i in range(1, count))]
    try:
        whole: tuple[Tree, ...] = map_trees(lambda *parts: np.concatenate(parts), *(batch.parts() for batch in batches))
    except (TypeError, ValueError, KeyError) as error:
        raise ObjectiveError(f"{where}: all batches must have the form of the first, got others ({error}).") from error
    return whole


def _batch(where: str, dataset: Any, number: int, float_type: str) -> Data:
    """Return one batch, checked."""
    batch = dataset[number]
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(parts) <= 3:
        raise ObjectiveError(
            f"{where}: every batch must be x, (x, y) or (x, y, sample_weight), got {len(parts)} parts in batch "
            f"{number}. Several inputs are a tuple of their own: ((a, b), y)."
        )
    x, y, sample_weight = (*parts, None, None)[:3]
    return make_data(f"{where}: batch {number}", x, y, sample_weight, float_type)


def _same(one: Data, other: Data) -> bool:
    """Return whether two batches have the same values."""
    first, second = leaves(one.parts()), leaves(other.parts())
    return [path for path, _ in first] == [path for path, _ in second] and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True)
    )
