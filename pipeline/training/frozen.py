"""Frozen bodies are run once: the fixed first part of a model becomes a table of its outputs.

In transfer learning the body of a network is frozen and only a head is trained.  Whatever depends
on the inputs alone, without trainable weights, randomness or state, has the same outputs in every
epoch of every trial.  They are computed once, and the head is trained on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.training.data import Data, as_tensor, leaves, map_tree

PLAIN_MODELS = ("keras.src.models.sequential", "keras.src.models.functional")
"""Where the classes live whose graph of layers is known and whose steps are Keras's own."""


@dataclass(frozen=True)
class Cut:
    """A model in two parts that share the layers of the whole.

    Attributes:
        whole: the model as it was built.
        body: from the inputs to the tensors at the cut; nothing in it is trained.
        head: from those tensors to the outputs, compiled as the whole.
        fixed: layers of the body, as a line for people.
    """

    whole: Any
    body: Any
    head: Any
    fixed: str

    def digest(self) -> str:
        """Return a hash of the body's weights: bodies with the same have the same outputs."""
        digest = hashlib.blake2b(digest_size=16)
        for variable in self.body.variables:
            digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
        return digest.hexdigest()


def bytes_per_sample(body: Any) -> float:
    """Return the size of one sample's outputs of a body, infinite where their shape is not fixed."""
    total = 0.0
    for tensor in body.outputs:
        if any(size is None for size in tensor.shape[1:]):
            return float("inf")
        total += int(np.prod(tensor.shape[1:])) * np.dtype(str(tensor.dtype)).itemsize
    return total


def cut(keras: Any, model: Any, accept: Callable[[Any], bool] = lambda _: True) -> Cut | None:
    """Cut a model behind its fixed part.

    Only a Sequential or functional model shows its graph of layers; only one that trains and
    evaluates by Keras's own steps can be replaced by a head.

    Args:
        keras: Keras.
        model: a model that is compiled and built; a cut leaves marks in its graph that saving it trips over.
        accept: told the body; when it says no, nothing is cut and nothing is marked.

    Returns:
        The cut, or None when nothing with weights or text is fixed, or the model cannot be cut.
    """
    if type(model).__module__ not in PLAIN_MODELS:
        return None
    graph = getattr(model, "_functional", None) or model
    fixed = {id(tensor) for tensor in graph.inputs}
    inside: list[Any] = []
    frontier: dict[int, Any] = {}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            if all(id(t) in fixed for t in node.input_tensors) and _is_fixed(node):
                fixed |= {id(t) for t in node.outputs}
                inside.append(node.operation)
            else:
                frontier |= {id(t): t for t in node.input_tensors if id(t) in fixed}
    worth = any(getattr(op, "variables", ()) for op in inside) or any(t.dtype == "string" for t in graph.inputs)
    masked = any(getattr(t, "_keras_mask", None) is not None for t in frontier.values())
    if not worth or masked or not frontier or any(id(t) in fixed for t in graph.outputs):
        return None
    tensors = list(frontier.values())
    body = keras.Model(graph._inputs_struct, tensors)
    if not accept(body):
        return None
    head = keras.Model(tensors if len(tensors) > 1 else tensors[0], graph._outputs_struct)
    head.compile(**model._compile_config.config)
    names = [op.name for op in inside if getattr(op, "variables", ())] or [op.name for op in inside]
    return Cut(model, body, head, ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


def _is_fixed(node: Any) -> bool:
    """Return whether a call has the same result whenever its inputs are the same."""
    layer = node.operation
    if getattr(layer, "trainable_variables", ()):
        return False
    parts = layer._flatten_layers() if hasattr(layer, "_flatten_layers") else ()
    # A call with training=False counts too: a functional model passes its own `training` on to every layer.
    return not any("seed_generator" in v.path for part in parts for v in part.non_trainable_variables)


def is_steady(tf: Any, body: Any, sample: Any) -> bool:
    """Return whether the body gives the same in training and evaluation, twice, and changes nothing.

    Args:
        tf: TensorFlow.
        body: the body.
        sample: a few inputs.
    """
    before = [v.numpy() for v in body.variables]
    outputs = [
        [t.numpy() for t in tf.nest.flatten(body(sample, training=training))] for training in (True, False, True)
    ]
    same = all(np.array_equal(a, b) for run in outputs[1:] for a, b in zip(outputs[0], run, strict=True))
    return (
        same
        and not body.losses
        and all(np.array_equal(a, v.numpy()) for a, v in zip(before, body.variables, strict=True))
    )


def run_body(tf: Any, split: Cut, x: Any, batch_size: int) -> list[np.ndarray]:
    """Return the body's outputs on all samples.

    Args:
        tf: TensorFlow.
        split: the cut.
        x: inputs; every array has shape (samples, ...).
        batch_size: samples per call.

    Returns:
        One array per tensor at the cut, shape (samples, ...).
    """
    body = tf.function(lambda part: split.body(part, training=False), autograph=False, reduce_retracing=True)
    samples = len(leaves(x)[0][1])
    pieces: list[Sequence[Any]] = []
    for start in range(0, samples, batch_size):
        part = _slice(tf, x, start, start + batch_size)
        pieces.append([t.numpy() for t in tf.nest.flatten(body(part))])
    return [np.concatenate(column) for column in zip(*pieces, strict=True)]


def _slice(tf: Any, x: Any, start: int, end: int) -> Any:
    return map_tree(lambda array: as_tensor(tf, array[start:end]), x)


def on_features(data: Data, features: list[np.ndarray]) -> Data:
    """Return the data with the body's outputs as its inputs."""
    return Data(features if len(features) > 1 else features[0], data.y, data.sample_weight, data.samples)
