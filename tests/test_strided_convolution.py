"""Strided 1×1 convolutions train by other kernels, with the same numbers, whatever the batches' sizes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from pipeline.training.engine import Engine
from pipeline.training.splits import Split
from pipeline.training.strided_convolution import sliced_first
from tests.test_engine import LABELS, make_data

RNG = np.random.default_rng(8)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides", [(2,), (2, 3), (1, 2), (2, 1, 4)])
def test_it_is_the_same_convolution(strides, padding, size):
    """In one to three dimensions, with a stride of its own in each; a wider kernel is left alone."""
    inputs = RNG.standard_normal((3, *[size] * len(strides), 5)).astype("float32")
    narrow, wide = (RNG.standard_normal((*[width] * len(strides), 5, 4)).astype("float32") for width in (1, 3))
    with sliced_first():
        ours, left_alone = (ops.convert_to_numpy(ops.conv(inputs, k, strides, padding)) for k in (narrow, wide))
    seen = inputs[(slice(None), *(slice(None, None, step) for step in strides))]
    np.testing.assert_allclose(ours, seen @ narrow.reshape(5, 4), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(left_alone, ops.convert_to_numpy(ops.conv(inputs, wide, strides, padding)))


def test_no_strided_kernel_is_left_in_the_graph_of_a_step():
    """Neither forward nor in a gradient, so that the fault cannot come back by another way."""
    model = residual(sliced=False)

    def step(x):
        with sliced_first(), tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(model(x, training=True))
        return tape.gradient(total, [x, *model.trainable_variables])

    graph = tf.function(step).get_concrete_function(tf.TensorSpec([None, 16, 16, 8])).graph
    kinds = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter")
    strides = [(op.type, op.get_attr("strides")[1]) for op in graph.get_operations() if op.type in kinds]
    assert sorted(strides) == sorted((kind, stride) for kind in kinds for stride in (1, 2))  # 2: the wide one


def residual(sliced: bool) -> keras.Model:
    """A residual block as in a ResNet, its shortcut strided or sliced by hand."""
    inputs = keras.Input((16, 16, 8))
    short = layers.Conv2D(16, 1)(inputs[:, ::2, ::2]) if sliced else layers.Conv2D(16, 1, strides=2)(inputs)
    hidden = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.add([hidden, short]))))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def test_a_residual_network_trains_on_batches_of_any_size():
    """TensorFlow ends the process on the smaller last batch where its kernel is faulty."""
    data = make_data("test", RNG.uniform(size=(150, 16, 16, 8)), LABELS)
    split = Split(np.arange(109, dtype=np.int32), np.arange(109, 150, dtype=np.int32), 7)  # the last batch has 13
    weights, losses = [], []
    for sliced in (False, True):
        engine = Engine(lambda sliced=sliced: residual(sliced), data, batch_size=32)
        run = engine.start("adam", split)
        epochs = [run.epoch(np.full(split.steps_per_epoch(32), 0.01)) for _ in range(8)]
        losses.append(np.concatenate([epoch.losses for epoch in epochs]))
        weights.append(engine.trained_model(split).get_weights())
    assert len(losses[0]) == 32 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
