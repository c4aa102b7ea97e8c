"""What a model reaches that ignores its inputs: the bar below which nothing was learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def no_skill(targets: Any, loss: str) -> dict[str, float]:
    """Return the best loss, and accuracy for classes, of one constant answer to every sample.

    Args:
        targets: the y of a dataset.
        loss: the name of the only loss, in lower case without underscores.

    Returns:
        Values by the name of the metric; empty where no constant answer is known.

    >>> no_skill(np.array([1, 1, 1, 0]), "sparsecategoricalcrossentropy")["accuracy"]
    0.75
    >>> no_skill(np.array([1.0, 3.0]), "meansquarederror")
    {'loss': 1.0}
    """
    if not isinstance(targets, np.ndarray) or targets.size == 0 or targets.dtype.kind not in "biuf":
        return {}
    some = targets.astype(float)
    if loss in ("meansquarederror", "mse"):
        return {"loss": float(some.var(axis=0).mean())}
    if loss in ("meanabsoluteerror", "mae"):
        return {"loss": float(np.abs(some - np.median(some, axis=0)).mean())}
    if loss == "sparsecategoricalcrossentropy":
        shares = np.unique(some, return_counts=True)[1] / some.size
        return {"loss": _entropy(shares), "accuracy": float(shares.max())}
    if loss == "categoricalcrossentropy" and some.ndim > 1:
        shares = some.reshape(-1, some.shape[-1]).mean(axis=0)
        return {"loss": _entropy(shares), "accuracy": float(shares.max())}
    if loss == "binarycrossentropy":
        shares = some.mean(axis=0)
        both = np.stack([shares, 1 - shares])
        return {
            "loss": float(np.mean([_entropy(p) for p in both.reshape(2, -1).T])),
            "accuracy": float(both.max(0).mean()),
        }
    return {}


def _entropy(shares: NDArray[np.float64]) -> float:
    """Return the entropy of a distribution in nats."""
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())
