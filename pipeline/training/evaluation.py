"""Which batches validation may take: the study's, or any size that gives the same numbers faster.

`model.evaluate` weighs every batch's loss by its samples.  Where the loss is a plain mean over
samples and every metric keeps its own sums, the size of a batch changes no number, and large ones
are faster.  A loss over a whole batch (Dice, contrastive), a mask, a state that lasts from batch to
batch or code that is not Keras's own may depend on it: there, validation takes the study's batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.training.building import overrides
from pipeline.training.frozen import PLAIN_MODELS

OVER_BATCHES = ("Dice", "Tversky", "Circle")
"""Losses of Keras that are taken over a whole batch."""

ELEMENTWISE = (
    "Abs", "Add", "Divide", "Exp", "Log", "Maximum", "Minimum", "Multiply", "Negative", "Relu", "Sigmoid", "Sqrt",
    "Square", "Subtract", "Tanh", "TrueDivide",
)  # fmt: skip
"""Operations between layers that look at one number at a time."""

MEANS = ("sum_over_batch_size", "mean")
"""Reductions that are a mean over samples."""


def why_batches_matter(keras: Any, model: Any) -> str | None:
    """Return why the size of a validation batch may change its loss or metrics, or None where it cannot.

    Args:
        keras: Keras.
        model: the model, compiled and built.
    """
    if type(model).__module__ not in PLAIN_MODELS:
        return "the model is of a class of its own"
    if any(overrides(keras, model, name) for name in ("train_step", "test_step", "compute_loss", "compute_metrics")):
        return "the model has a step of its own"
    for operation in _operations(keras, model):
        kind = type(operation)
        if kind.__module__.startswith("keras.") and kind.__name__ in ELEMENTWISE:
            continue
        if not isinstance(operation, keras.layers.Layer):
            return f"the operation '{operation.name}' may look at a whole batch"
        if not kind.__module__.startswith("keras.") or kind.__name__ == "Lambda":
            return f"the layer '{operation.name}' may look at a whole batch"
        if getattr(operation, "mask_zero", False) or kind.__name__ == "Masking":
            return "a loss under a mask is a mean over what is not masked"
        if hasattr(operation, "cell") and getattr(operation, "stateful", False):
            return "a stateful layer goes from batch to batch"
        if any(getattr(getattr(operation, "cell", None), name, 0) for name in ("dropout", "recurrent_dropout")):
            return "a recurrent layer with dropout draws in every batch, of validation too"
    if len(model.losses) > sum(getattr(v, "regularizer", None) is not None for v in model.trainable_variables):
        return "a layer adds a loss of its own"
    if len(_leaves(model.loss)) > 1:
        return "the losses of several outputs are means over batches"
    for loss in _leaves(model.loss):
        why = _why_loss(keras, loss)
        if why is not None:
            return why
    for metric in _leaves([getattr(m, "metrics", None) or m for m in model.metrics]):
        inner = getattr(metric, "_fn", None)
        if not type(metric).__module__.startswith("keras.") or (
            inner is not None and not str(getattr(inner, "__module__", "")).startswith("keras.")
        ):
            return f"the metric '{metric.name}' may look at a whole batch"
    return None


def _operations(keras: Any, model: Any) -> Iterator[Any]:
    """Yield every layer and operation of a model, those inside models inside it too."""
    inner = list((getattr(model, "_functional", None) or model).operations)
    for operation in inner:
        for part in operation._flatten_layers() if isinstance(operation, keras.layers.Layer) else [operation]:
            yield part
            if part is not operation and type(part).__module__ in PLAIN_MODELS:
                yield from _operations(keras, part)
        if type(operation).__module__ in PLAIN_MODELS:
            yield from _operations(keras, operation)


def _why_loss(keras: Any, given: Any) -> str | None:
    loss = keras.losses.get(given) if isinstance(given, str) else given
    function = getattr(loss, "fn", loss)
    name = str(getattr(function, "__name__", type(loss).__name__))
    if not str(getattr(function, "__module__", "")).startswith("keras."):
        return f"the loss '{name}' may be taken over a whole batch"
    if name.lower() in {each.lower() for each in OVER_BATCHES} or type(loss).__name__ in OVER_BATCHES:
        return f"the loss '{name}' is taken over a whole batch"
    if getattr(loss, "reduction", MEANS[0]) not in MEANS:
        return f"the loss '{name}' is reduced by '{loss.reduction}'"
    if getattr(loss, "ignore_class", None) is not None:
        return f"the loss '{name}' leaves a class out"
    return None


def _leaves(value: Any) -> list[Any]:
    """Return what is not None in nested lists and dicts."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
