"""Whether a loss and the outputs that it is given belong together, as one batch shows.

The commonest faults of beginners train without an error: raw scores where the loss takes
probabilities, probabilities where it takes scores, a softmax over one unit, outputs that cannot
reach their targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

BINARY = ("binarycrossentropy", "binaryfocalcrossentropy")
CATEGORICAL = (
    "categoricalcrossentropy",
    "sparsecategoricalcrossentropy",
    "categoricalfocalcrossentropy",
    "categoricalgeneralizedcrossentropy",
)
CROSSENTROPIES = (*BINARY, *CATEGORICAL)
"""Losses on probabilities, or on scores with `from_logits=True`."""

DISTANCES = (
    "meansquarederror", "mse", "meanabsoluteerror", "mae", "meanabsolutepercentageerror", "mape",
    "meansquaredlogarithmicerror", "msle", "huber", "huberloss", "logcosh",
)  # fmt: skip
"""Losses of regressions: a distance between output and target."""

NEVER_NEGATIVE = (*CROSSENTROPIES, *DISTANCES)
"""Losses that no prediction brings below zero, for targets that they are made for."""

RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "sigmoid": (0.0, 1.0),
        "hard_sigmoid": (0.0, 1.0),
        "softmax": (0.0, 1.0),
        "tanh": (-1.0, 1.0),
        "hard_tanh": (-1.0, 1.0),
        "softsign": (-1.0, 1.0),
        "relu": (0.0, np.inf),
        "relu6": (0.0, 6.0),
        "softplus": (0.0, np.inf),
        "exponential": (0.0, np.inf),
    }
)
"""What an activation at the end of a model can reach."""

RARELY = 0.05
"""Up to this share of targets out of reach may be meant: outliers that are to be cut off."""


@dataclass(frozen=True)
class Head:
    """One output of a model with its loss.

    Attributes:
        name: the output's name, empty where there is only one.
        loss: name of the loss, in lower case without underscores.
        from_logits: whether the loss was told that it gets scores.
        ends_in: name of the last activation ("linear" for none), or None where it is not known.
        outputs: the untrained model's outputs on a batch, shape (samples, ...).
        targets: the targets, of as many samples as there are, shape (samples, ...).
        warned: whether Keras says of this output that it takes the scores behind its probabilities.
    """

    name: str
    loss: str
    from_logits: bool
    ends_in: str | None
    outputs: NDArray[np.floating]
    targets: NDArray[np.generic]
    warned: bool = False


@dataclass(frozen=True)
class Mismatch:
    """Why a loss and its outputs do not belong together.

    Attributes:
        text: rule, what was found, and the one change that mends it.
        refused: whether no study makes sense with it; else the user may have meant it.
    """

    text: str
    refused: bool


def mismatch(head: Head) -> Mismatch | None:
    """Return what keeps a loss and its outputs from belonging together, or None.

    >>> scores = np.array([[-2.0], [3.0]])
    >>> found = mismatch(Head("", "binarycrossentropy", False, "linear", scores, np.array([0, 1])))
    >>> found.refused, "from_logits=True" in found.text
    (True, True)
    >>> mismatch(Head("", "binarycrossentropy", True, "linear", scores, np.array([0, 1]))) is None
    True
    """
    outputs = np.asarray(head.outputs, dtype=float)
    if outputs.size == 0 or not np.isfinite(outputs).all():
        return None
    of = f"the output '{head.name}'" if head.name else "the model's output"
    one_unit = outputs.ndim > 1 and outputs.shape[-1] == 1
    if one_unit and (head.ends_in == "softmax" or (head.loss in CROSSENTROPIES and (outputs == 1.0).all())):
        return Mismatch(
            f"{of} is a softmax over one unit, which is 1 whatever the inputs, so nothing can be learned. Use "
            'activation="sigmoid" with the loss "binary_crossentropy", or one unit for every class.',
            True,
        )
    if head.loss in CROSSENTROPIES:
        return _crossentropy(head, of, outputs)
    known = head.loss in DISTANCES
    if (known or head.loss) and head.ends_in in RANGES and head.targets.dtype.kind in "fiub":
        return _out_of_reach(head, of, certain=known)
    return None


def _crossentropy(head: Head, of: str, outputs: NDArray[np.floating]) -> Mismatch | None:
    low, high = float(outputs.min()), float(outputs.max())
    spread = f"{low:.3g} to {high:.3g} before training"
    activation = "sigmoid" if head.loss in BINARY else "softmax"
    shares = head.targets
    if head.loss == "categoricalcrossentropy" and shares.ndim > 1 and shares.dtype.kind in "fiub" and shares.size:
        odd = float(np.mean(np.abs(np.asarray(shares, dtype=float).sum(axis=-1) - 1.0) > 1e-3))
        if odd:
            return Mismatch(
                f"{of} is one class of several for the loss 'categorical_crossentropy', got targets of which "
                f"{100 * odd:.3g}% do not sum to 1, as if several classes could hold at once. Use "
                'activation="sigmoid" with the loss "binary_crossentropy" for such targets.',
                False,
            )
    if not head.from_logits:
        if head.ends_in in ("sigmoid", "softmax"):
            return None
        raw = low < -1e-6 or (high > 1.001 and head.loss in BINARY) or head.ends_in == "linear"
        if raw or high > 1.001:
            return Mismatch(
                f"{of} must hold probabilities for a loss without from_logits=True, got raw scores ({spread}). Set "
                f'from_logits=True in the loss, or activation="{activation}" in the last layer.',
                raw,
            )
        return None
    sums = outputs.sum(axis=-1)
    alike = low >= 0 and high <= 1 and len(outputs) > 1 and float(np.ptp(outputs)) > 0
    probable = alike and (head.loss in BINARY or bool(np.allclose(sums, 1.0, atol=1e-3)))
    if head.ends_in in ("sigmoid", "softmax") or (head.ends_in is None and probable):
        taken = " Keras takes the scores behind them here, so that the loss is right." if head.warned else ""
        return Mismatch(
            f"{of} must hold scores for a loss with from_logits=True, got probabilities ({spread}).{taken} Remove "
            "from_logits=True from the loss, or the activation from the last layer.",
            not head.warned,
        )
    return None


def _out_of_reach(head: Head, of: str, *, certain: bool) -> Mismatch | None:
    assert head.ends_in is not None
    low, high = RANGES[head.ends_in]
    targets = np.asarray(head.targets, dtype=float)
    targets = targets[np.isfinite(targets)]
    margin = 1e-6 * max(1.0, abs(low), abs(high) if np.isfinite(high) else 1.0)
    outside = float(np.mean((targets < low - margin) | (targets > high + margin))) if targets.size else 0.0
    if not outside:
        return None
    reach = f"from {low:g} to {high:g}" if np.isfinite(high) else f"from {low:g} up"
    allowed = RARELY if np.isfinite(high) else 0.5
    return Mismatch(
        f"{of} ends in {head.ends_in} and reaches {reach}, got targets from {targets.min():.4g} to "
        f"{targets.max():.4g}, {100 * outside:.3g}% of them out of reach. Remove the activation from the last layer, "
        "or scale the targets.",
        certain and outside > allowed,
    )


def contradiction(loss_name: str, loss: float, metrics: Mapping[str, float], *, tolerance: float = 0.05) -> str | None:
    """Return why a loss cannot be what its name says, by the metrics of the same predictions, or None.

    No crossentropy or distance is negative; a mean squared error is at least the square of the mean absolute
    error (Jensen 1906); every wrong answer costs a crossentropy at least ln 2.

    Args:
        loss_name: name of the compiled loss, in lower case without underscores.
        loss: what the training step calls its loss.
        metrics: other metrics of the same samples, by name.
        tolerance: share by which rounding may break an inequality.

    >>> contradiction("mse", 0.25, {"mae": 3.9})
    'its mean squared error of 0.25 is less than the square of its own mean absolute error, 3.9'
    """
    if loss_name in NEVER_NEGATIVE and loss < -1e-6:
        return f"it is {loss:.4g}, and '{loss_name}' is never negative"
    absolute = next((metrics[n] for n in ("mae", "mean_absolute_error") if n in metrics), None)
    squared = next((metrics[n] for n in ("mse", "mean_squared_error") if n in metrics), None)
    if loss_name in ("mse", "meansquarederror"):
        if squared is not None and loss < squared * (1 - tolerance) - 1e-6:
            return f"it is {loss:.4g}, and its own mean squared error is {squared:.4g}"
        if absolute is not None and loss < absolute**2 * (1 - tolerance) - 1e-6:
            return (
                f"its mean squared error of {loss:.4g} is less than the square of its own mean absolute error, "
                f"{absolute:.4g}"
            )
    right = next((metrics[n] for n in metrics if n.endswith(("accuracy", "acc"))), None)
    if loss_name in ("binarycrossentropy", "categoricalcrossentropy", "sparsecategoricalcrossentropy"):
        least = (1 - right) * np.log(2) * (1 - tolerance) - 1e-6 if right is not None else 0.0
        if loss < least:
            return f"its crossentropy of {loss:.4g} is too low for its own accuracy of {right:.3g}"
    return None
