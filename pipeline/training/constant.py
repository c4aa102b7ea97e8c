"""The loss of the best constant answer, found by minimizing the model's own loss over it.

For losses of which no formula is known: of one's own, of several outputs, under weights, masks or
missing targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

ITERATIONS = 200
"""Steps of the minimization at most (L-BFGS; Nocedal 1980)."""

COMPARED_BATCHES = 8
"""In so many batches the loss is looked at too: one taken over a whole batch comes out otherwise."""

SAME = 1e-3
"""By which share it may."""

MOST_VALUES = 1 << 22
"""Targets of more values than this are looked at evenly spaced samples only."""


def constant_loss(
    tf: Any, model: Any, outputs: Any, ends: Sequence[str | None], y: Any, weight: Any, batch_size: int
) -> float:
    """Return the lowest loss that one answer to every sample reaches: a number per unit of every output.

    Args:
        tf: TensorFlow.
        model: the compiled model; its loss is Keras's own `compute_loss`.
        outputs: its outputs on a few samples, for their form.
        ends: the activation that each output ends in, or None; the answer stays within its range.
        y: targets as tensors, each of shape (samples, ...).
        weight: sample weights in the form Keras takes them, or None.
        batch_size: samples of a validation batch.

    Returns:
        The loss; NaN for one that is taken over a whole batch, whose value depends on the batches.
    """
    from scipy import optimize

    flat = tf.nest.flatten(outputs)
    samples = int(tf.nest.flatten(y)[0].shape[0])
    sizes = [int(out.shape[-1]) if len(out.shape) > 1 else 1 for out in flat]

    def answers(free: Any) -> Any:
        found = []
        for out, end, part in zip(flat, ends, tf.split(free, sizes), strict=True):
            unit = _within(tf, end)(part if len(out.shape) > 1 else part[0])
            found.append(tf.cast(tf.zeros([samples, *out.shape[1:]]) + tf.cast(unit, tf.float32), out.dtype))
        return tf.nest.pack_sequence_as(outputs, found)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([sum(sizes)], tf.float64)])  # type: ignore[untyped-decorator]
    def loss_and_slope(free: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(free)
            loss = model.compute_loss(None, y, answers(free), weight, training=False)
        return loss, tape.gradient(loss, free)

    def at(free: Any) -> tuple[float, Any]:
        loss, slope = loss_and_slope(tf.constant(free, tf.float64))
        return float(loss), np.nan_to_num(np.asarray(slope, dtype=float))

    start = np.concatenate(
        [_start(target, size, end) for target, size, end in zip(_paired(tf, y, flat), sizes, ends, strict=True)]
    )
    found = min(
        (
            optimize.minimize(at, begin, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
            for begin in (start, np.zeros_like(start))
        ),
        key=lambda result: float(result.fun),
    )
    whole = range(0, min(samples, COMPARED_BATCHES * batch_size) - batch_size + 1, batch_size)
    if len(whole) > 1:
        best = tf.nest.map_structure(lambda t: t[:batch_size], answers(tf.constant(found.x, tf.float64)))

        def of(first: int, last: int, answer: Any) -> float:
            targets, weights = (
                None if tree is None else tf.nest.map_structure(lambda t: t[first:last], tree) for tree in (y, weight)
            )
            return float(model.compute_loss(None, targets, answer, weights, training=False))

        end = whole[-1] + batch_size
        apart = np.mean([of(first, first + batch_size, best) for first in whole])
        together = of(0, end, tf.nest.map_structure(lambda t: t[:end], answers(tf.constant(found.x, tf.float64))))
        if abs(apart - together) > SAME * max(abs(together), 1e-6):
            return float("nan")
    return float(found.fun)


def _within(tf: Any, end: str | None) -> Any:
    """Return a function from all numbers onto the range of an activation."""
    known = {"sigmoid": tf.sigmoid, "softmax": tf.nn.softmax, "tanh": tf.tanh, "relu": tf.nn.softplus}
    return {**known, "softplus": tf.nn.softplus}.get(str(end), lambda free: free)


def _paired(tf: Any, y: Any, flat: Sequence[Any]) -> list[Any]:
    targets = [t.numpy() for t in tf.nest.flatten(y)]
    return targets if len(targets) == len(flat) else [None] * len(flat)


def _start(target: Any, size: int, end: str | None) -> np.ndarray:
    """Return where the minimization begins: at the targets' mean, for outputs that can be any number."""
    if target is None or target.dtype.kind not in "fiub" or end not in (None, "linear"):
        return np.zeros(size)
    rows = target.reshape(-1, target.shape[-1]) if target.ndim > 1 else target.reshape(-1, 1)
    if rows.shape[1] != size or target.dtype.kind in "iub":
        return np.zeros(size)
    with np.errstate(all="ignore"):
        means = np.nanmean(np.where(np.isfinite(rows), rows, np.nan), axis=0)
    return np.asarray(np.nan_to_num(means), dtype=float)
