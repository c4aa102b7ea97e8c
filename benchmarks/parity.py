"""How far the engine is from `model.fit` and `model.evaluate`, on models of different kinds.

    python -m benchmarks.parity [STEPS]

Per model: the largest difference of a step's loss, a training metric or the weights after so many steps (20),
and of a validation metric, as shares; what differs most, with both values; and whether validation keeps to the
study's batches, and why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from pipeline.training.data import make_data
from pipeline.training.engine import Engine
from pipeline.training.parity import Reference
from pipeline.training.splits import Split

SAMPLES, HELD, BATCH = 660, 90, 32
RNG = np.random.default_rng(0)
ROWS = SAMPLES + HELD
X = RNG.standard_normal((ROWS, 8)).astype("float32")
TARGET = (X @ RNG.standard_normal((8, 1))).astype("float32")
LABELS = np.argmax(X[:, :3], axis=1)
SERIES = RNG.standard_normal((ROWS, 10, 3)).astype("float32")
IMAGES = RNG.uniform(size=(ROWS, 12, 12, 1)).astype("float32")
MASKS = np.where(np.arange(ROWS)[:, None, None, None] % 6, 0, IMAGES > 0.7).astype("float32")
TOKENS = RNG.integers(1, 30, (ROWS, 9)) * (np.arange(9) < RNG.integers(2, 10, ROWS)[:, None])
RAGGED = tf.ragged.constant([RNG.integers(1, 30, RNG.integers(2, 9)).tolist() for _ in range(ROWS)])
WEIGHTS = RNG.uniform(0.2, 3, ROWS).astype("float32")


def compiled(model: keras.Model, loss: Any = None, **keywords: Any) -> keras.Model:
    model.compile(loss=loss, **keywords)
    return model


def dense() -> keras.Model:
    parts = [keras.Input((8,)), layers.Dense(16, "relu"), layers.BatchNormalization(), layers.Dropout(0.3)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return compiled(keras.Sequential([*parts, layers.Dense(3)]), loss, metrics=["accuracy"])


def two_outputs() -> keras.Model:
    inputs = keras.Input((8,))
    hidden = layers.Dense(8, "tanh")(inputs)
    model = keras.Model(inputs, {"a": layers.Dense(3, name="a")(hidden), "b": layers.Dense(1, name="b")(hidden)})
    losses = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    return compiled(model, losses, loss_weights={"a": 1.0, "b": 0.2}, metrics={"a": ["accuracy"], "b": ["mae"]})


def mixed_precision() -> keras.Model:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        parts = [keras.Input((8,)), layers.Dense(16, "relu"), layers.Dense(1, dtype="float32")]
        return compiled(keras.Sequential(parts), "mse")
    finally:
        keras.config.set_dtype_policy(before)


def recurrent() -> keras.Model:
    parts = [keras.Input((10, 3)), layers.Bidirectional(layers.LSTM(6, recurrent_dropout=0.2)), layers.Dense(1)]
    return compiled(keras.Sequential(parts), "huber", metrics=["mae"])


def frozen_body() -> keras.Model:
    body = keras.Sequential([keras.Input((12, 12, 1)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten()])
    body.trainable = False
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return compiled(keras.Sequential([keras.Input((12, 12, 1)), body, layers.Dense(3)]), loss, metrics=["accuracy"])


def convolution() -> keras.Model:
    parts = [keras.Input((12, 12, 1)), layers.RandomFlip(), layers.RandomTranslation(0.1, 0.1), layers.Conv2D(4, 3)]
    parts += [layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(3, "softmax")]
    return compiled(keras.Sequential(parts), "sparse_categorical_crossentropy", metrics=["accuracy"])


def dice() -> keras.Model:
    parts = [keras.Input((12, 12, 1)), layers.Conv2D(4, 3, padding="same", activation="relu")]
    parts.append(layers.Conv2D(1, 1, activation="sigmoid"))
    return compiled(keras.Sequential(parts), keras.losses.Dice())


def masked() -> keras.Model:
    parts = [layers.Embedding(30, 4, mask_zero=True), layers.GRU(5, return_sequences=True), layers.Dense(1)]
    return compiled(keras.Sequential(parts), "mse", metrics=["mae"])


def attention() -> keras.Model:
    inputs = keras.Input((10, 3))
    hidden = layers.Dense(8)(inputs)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 4, dropout=0.1)(hidden, hidden))
    return compiled(keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(hidden))), "mse")


def ragged() -> keras.Model:
    parts = [keras.Input((None,), dtype="int32", ragged=True), layers.Embedding(30, 6), layers.GlobalAveragePooling1D()]
    return compiled(keras.Sequential([*parts, layers.Dense(1)]), "mse")


def stateful() -> keras.Model:
    inputs = keras.Input(batch_shape=(30, 10, 3))
    return compiled(keras.Model(inputs, layers.Dense(1)(layers.GRU(4, stateful=True)(inputs))), "mse")


class OwnStep(keras.Model):
    """An autoencoder on x alone, with steps and a tracker of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = layers.Dense(3, "tanh"), layers.Dense(8)
        self.tracker = keras.metrics.Mean(name="total")

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker]

    def error(self, x: Any) -> Any:
        return ops.mean(ops.square(x - self.decode(self.encode(x))))

    def train_step(self, data: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            loss = self.error(data)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, data: Any) -> dict[str, Any]:
        self.tracker.update_state(self.error(data))
        return {"loss": self.tracker.result()}


MODELS: dict[str, tuple[Callable[[], keras.Model], tuple[Any, ...]]] = {
    "dense, Dropout, BatchNormalization": (dense, (X, LABELS)),
    "weighted samples": (dense, (X, LABELS, WEIGHTS)),
    "two outputs with weights": (two_outputs, (X, {"a": LABELS, "b": TARGET})),
    "mixed precision (bfloat16)": (mixed_precision, (X, TARGET)),
    "recurrent": (recurrent, (SERIES, TARGET)),
    "convolution with augmentation": (convolution, (IMAGES, LABELS)),
    "frozen body": (frozen_body, (IMAGES, LABELS)),
    "loss over a batch (Dice)": (dice, (IMAGES, MASKS)),
    "masked tokens": (masked, (TOKENS, np.repeat(TARGET[:, None], 9, axis=1))),
    "attention": (attention, (SERIES, TARGET)),
    "ragged": (ragged, (RAGGED, TARGET)),
    "stateful, fixed batch": (stateful, (SERIES, TARGET)),
    "own steps, x alone": (lambda: compiled(OwnStep()), (X,)),
}


def main(steps: int = 20) -> None:
    """Print a row per model."""
    print(f"{'model':<36} {'steps':>5} {'training':>9} {'validation':>10}  worst")
    for name, (build, parts) in MODELS.items():
        batch = 30 if build is stateful else BATCH
        data, rows = make_data("parity", *parts), np.arange(ROWS, dtype=np.int32)
        engine = Engine(build, data, batch_size=batch)
        split = Split(rows[:SAMPLES], rows[SAMPLES:], 1)
        found = Reference(engine, "adam", split, 0.001, steps).compare()
        kept = f"; batches matter: {engine.why_batches}" if engine.why_batches else ""
        held = "" if found.validation is None else f"{found.validation:.1e}"
        said = found.why_not or f"{found.worst}{kept}"
        print(f"{name:<36} {steps:>5} {found.training:>9.1e} {held:>10}  {said}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
