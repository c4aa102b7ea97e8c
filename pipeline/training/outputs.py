"""Which activation a model's outputs end in, read off its layers, or off the graph of its call."""

from __future__ import annotations

from typing import Any

from pipeline.training.frozen import PLAIN_MODELS

PASSED_THROUGH = ("Reshape", "Flatten", "Permute", "Squeeze", "Cropping1D", "Dropout", "Identity", "Rescaling")
"""Layers behind an activation that leave its range as it is; the last of them does where it does nothing."""

OPERATIONS = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Tanh": "tanh", "Relu": "relu", "Relu6": "relu6"}
"""Operations of a graph by the name of the activation."""

SILENT = (
    "Identity", "Reshape", "Cast", "Squeeze", "ExpandDims", "EnsureShape", "Transpose", "StopGradient", "StridedSlice",
)  # fmt: skip
"""Operations of a graph that leave a range as it is."""

LINEAR = ("MatMul", "BatchMatMulV2", "BiasAdd", "Conv2D")
"""Operations that end a layer without an activation."""


def ends_in(tf: Any, keras: Any, model: Any, x: Any) -> list[str | None]:
    """Return the name of the activation of each output ("linear" for none); None where it is not known.

    Args:
        tf, keras: TensorFlow and Keras.
        model: the model, built.
        x: inputs of a batch, for a model whose layers do not show their order.
    """
    if type(model).__module__ in PLAIN_MODELS:
        found = [_of_layer(keras, tensor) for tensor in tf.nest.flatten(model.outputs)]
        if None not in found:
            return found
    traced = tf.function(lambda inputs: model(inputs, training=False), autograph=False).get_concrete_function(x)
    return [_of_operation(tensor.op) for tensor in traced.outputs]


def _of_layer(keras: Any, tensor: Any) -> str | None:
    for _ in range(20):
        layer, node, _place = tensor._keras_history
        name = type(layer).__name__
        if name in PASSED_THROUGH and name != "Rescaling":
            tensor = layer._inbound_nodes[node].input_tensors[0]
            continue
        return _activation_of(keras, layer)
    return None


def _activation_of(keras: Any, layer: Any) -> str | None:
    name = type(layer).__name__
    if type(layer).__module__ in PLAIN_MODELS:
        return _of_layer(keras, layer.outputs[0])
    if name in ("Softmax", "ReLU", "Sigmoid", "Tanh", "Relu"):
        plain_relu = name != "ReLU" or (not layer.negative_slope and not layer.threshold and layer.max_value is None)
        return name.lower() if plain_relu else None
    if name in ("TimeDistributed",):
        return _activation_of(keras, layer.layer)
    function = getattr(layer, "activation", None)
    return getattr(function, "__name__", None) if callable(function) else None


def _of_operation(operation: Any) -> str | None:
    for _ in range(50):
        kind = operation.type
        if kind in OPERATIONS:
            return OPERATIONS[kind]
        if kind in LINEAR:
            return "linear"
        if kind not in SILENT or not operation.inputs:
            return None
        operation = operation.inputs[0].op
    return None
