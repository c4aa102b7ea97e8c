"""What a model reaches that ignores its inputs: the bar below which nothing was learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def no_skill(targets: Any, loss: str, weights: Any = None) -> dict[str, float]:
    """Return the best loss, and accuracy for classes, of one constant answer to every sample.

    Args:
        targets: the y of a dataset.
        loss: the name of the only loss, in lower case without underscores.
        weights: weight of each sample, shape (samples,), as the loss takes them: its mean is over samples; or None.

    Returns:
        Values by the name of the metric; empty where no constant answer is known.

    >>> no_skill(np.array([1, 1, 1, 0]), "sparsecategoricalcrossentropy")["accuracy"]
    0.75
    >>> no_skill(np.array([1.0, 3.0]), "meansquarederror")
    {'loss': 1.0}
    >>> no_skill(np.array([1.0, 3.0]), "meansquarederror", np.array([0.0, 2.0]))
    {'loss': 0.0}
    """
    if not isinstance(targets, np.ndarray) or targets.size == 0 or targets.dtype.kind not in "biuf":
        return {}
    some = targets.astype(float)
    if not np.isfinite(some).all():
        return {}
    if weights is None:
        weight, scale = np.ones(len(some)), 1.0
    else:
        weight = np.asarray(weights, dtype=float)
        if weight.shape != (len(some),) or not weight.sum() > 0:
            return {}
        scale = float(weight.mean())
    if loss in ("meansquarederror", "mse"):
        centre = np.average(some, axis=0, weights=weight)
        return {"loss": scale * float(np.average((some - centre) ** 2, axis=0, weights=weight).mean())}
    if loss in ("meanabsoluteerror", "mae"):
        centre = _weighted_median(some, weight)
        return {"loss": scale * float(np.average(np.abs(some - centre), axis=0, weights=weight).mean())}
    if loss == "sparsecategoricalcrossentropy":
        each = np.repeat(weight, some[0].size)
        classes, index = np.unique(some, return_inverse=True)
        shares = np.bincount(index.ravel(), each, len(classes)) / each.sum()
        counts = np.bincount(index.ravel(), minlength=len(classes))
        return {"loss": scale * _entropy(shares), "accuracy": float(counts.max() / some.size)}
    if loss == "categoricalcrossentropy" and some.ndim > 1:
        rows = some.reshape(-1, some.shape[-1])
        shares = np.average(rows, axis=0, weights=np.repeat(weight, len(rows) // len(some)))
        return {"loss": scale * _entropy(shares), "accuracy": float(rows.mean(axis=0).max())}
    if loss == "binarycrossentropy":
        shares = np.average(some, axis=0, weights=weight)
        both, plain = np.stack([shares, 1 - shares]), some.mean(axis=0)
        return {
            "loss": scale * float(np.mean([_entropy(p) for p in both.reshape(2, -1).T])),
            "accuracy": float(np.maximum(plain, 1 - plain).mean()),
        }
    return {}


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of each column, shape values.shape[1:]."""
    columns = values.reshape(len(values), -1)
    found = []
    for column in columns.T:
        order = np.argsort(column, kind="stable")
        reached = np.cumsum(weights[order]) >= weights.sum() / 2
        found.append(column[order][int(np.argmax(reached))])
    return np.asarray(found).reshape(values.shape[1:])


def _entropy(shares: NDArray[np.float64]) -> float:
    """Return the entropy of a distribution in nats."""
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())
