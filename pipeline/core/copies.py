"""Samples that stand on both sides of a split, as oversampling before it makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDS = 512
"""So many words of eight bytes of a sample are compared, evenly spaced: enough to tell samples apart."""

CHUNK_BYTES = 1 << 26
"""Samples are looked at in pieces of about this size, in bytes."""


def copies(arrays: Sequence[NDArray[Any]], train: NDArray[np.integer], held: NDArray[np.integer]) -> int:
    """Return how many held-out samples have an exact copy among the training samples.

    Samples whose inputs are one value throughout, such as empty rows, are no copies of each other.

    Args:
        arrays: inputs and targets, each of shape (samples, ...).
        train, held: indices of the two parts.

    >>> x = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    >>> copies([x], np.array([0, 1]), np.array([2]))
    1
    """
    codes = _codes(arrays)
    first = arrays[0].reshape(len(arrays[0]), -1)
    held = held[(first[held] != first[held, :1]).any(axis=1)] if first.shape[1] > 1 else held
    return int(np.isin(codes[held], codes[train]).sum())


def _codes(arrays: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """Return a number per sample that differs wherever samples do, but for one chance in many billions."""
    random = np.random.default_rng(0)
    samples = len(arrays[0])
    codes = np.zeros(samples, np.uint64)
    for array in arrays:
        size = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
        if not size:
            continue
        words = -(-size // 8)
        chosen = np.unique(np.linspace(0, words - 1, min(words, WORDS)).astype(np.int64))
        factors = random.integers(1, 2**63, len(chosen), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        step = max(1, CHUNK_BYTES // (8 * words))
        for start in range(0, samples, step):
            rows = np.ascontiguousarray(array[start : start + step]).reshape(-1, size // array.dtype.itemsize)
            padded = np.zeros((len(rows), 8 * words), np.uint8)
            padded[:, :size] = rows.view(np.uint8)
            taken = padded.view(np.uint64)[:, chosen]
            mixed = (taken ^ (taken >> np.uint64(29))) * factors
            codes[start : start + step] += (mixed ^ (mixed >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
    return codes
