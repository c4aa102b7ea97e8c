"""Validation is what model.evaluate shows, with the study's batches or larger ones."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from pipeline.training.data import make_data
from pipeline.training.engine import Engine
from pipeline.training.splits import Split

RNG = np.random.default_rng(0)
X = RNG.standard_normal((200, 6)).astype("float32")
TOKENS = RNG.integers(1, 9, (200, 7)) * (np.arange(7) < RNG.integers(1, 8, 200)[:, None])
TARGET = (X @ RNG.standard_normal(6)).astype("float32")[:, None]
LABELS = np.argmax(X[:, :3], axis=1)
MASKS = np.where(np.arange(200)[:, None] % 20, 0, X > 0.5).astype("float32")
WEIGHTS = RNG.uniform(0.1, 3, 200).astype("float32")
SPLIT = Split(np.arange(100, dtype=np.int32), np.arange(100, 200, dtype=np.int32), 5)
BATCH = 7


def plain(last, loss, metrics=(), **keywords):
    """Return a function that builds a small network."""

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(**last)])
        model.compile(loss=loss, metrics=list(metrics), **keywords)
        return model

    return build


def residual() -> keras.Model:
    """Sums between layers, batch statistics, Dropout and a penalty."""
    inputs = keras.Input((6,))
    hidden = layers.Dense(6, "relu", kernel_regularizer="l2")(inputs)
    hidden = layers.BatchNormalization()(hidden + inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Dropout(0.2)(hidden)))
    model.compile(loss="huber", metrics=["mae", keras.metrics.R2Score(), keras.metrics.RootMeanSquaredError()])
    return model


ANY_SIZE = {
    "regression": (plain({"units": 1}, "mse", ["mae"]), (X, TARGET)),
    "classes": (
        plain({"units": 3}, keras.losses.SparseCategoricalCrossentropy(from_logits=True), ["accuracy"]),
        (X, LABELS),
    ),
    "counts": (
        plain({"units": 1, "activation": "sigmoid"}, "binary_crossentropy", ["AUC", "Precision", "Recall"]),
        (X, (LABELS > 0).astype("float32")[:, None]),
    ),
    "weights": (plain({"units": 1}, "mse", ["mae"]), (X, TARGET, WEIGHTS)),
    "focal": (plain({"units": 3, "activation": "sigmoid"}, "binary_focal_crossentropy"), (X, np.eye(3)[LABELS])),
    "residual": (residual, (X, TARGET)),
}


def pairwise(y, prediction):
    """A loss over a whole batch: differences of neighbours."""
    return ops.mean(ops.square(y[1:] - y[:-1] - prediction[1:] + prediction[:-1]))


def masked_sequence() -> keras.Model:
    """A loss under a mask: the mean over tokens that are there, batch by batch."""
    model = keras.Sequential([layers.Embedding(9, 4, mask_zero=True), layers.Dense(1)])
    model.compile(loss="mse", metrics=["mae"])
    return model


def two_outputs() -> keras.Model:
    """Keras's means of the single losses are not weighted by the size of a batch."""
    inputs = keras.Input((6,))
    model = keras.Model(inputs, {"a": layers.Dense(1, name="a")(inputs), "b": layers.Dense(1, name="b")(inputs)})
    model.compile(loss={"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.3})
    return model


class Centred(layers.Layer):
    """Subtracts the mean of the batch, in inference too."""

    def call(self, x):
        return x - ops.mean(x, axis=0)


def own_layer() -> keras.Model:
    """A layer that looks at the whole batch."""
    model = keras.Sequential([keras.Input((6,)), Centred(), layers.Dense(1)])
    model.compile(loss="mse")
    return model


def stateful() -> keras.Model:
    """A state that goes from batch to batch."""
    inputs = keras.Input(batch_shape=(10, 3, 2))
    model = keras.Model(inputs, layers.Dense(1)(layers.GRU(3, stateful=True)(inputs)))
    model.compile(loss="mse")
    return model


BATCHES_MATTER = {
    "dice": (plain({"units": 6, "activation": "sigmoid"}, keras.losses.Dice()), (X, MASKS)),
    "tversky": (plain({"units": 6, "activation": "sigmoid"}, keras.losses.Tversky()), (X, MASKS)),
    "a loss of one's own": (plain({"units": 1}, pairwise), (X, TARGET)),
    "a metric of one's own": (plain({"units": 1}, "mse", [pairwise]), (X, TARGET)),
    "a mask": (masked_sequence, (TOKENS, np.arange(200)[:, None, None] + np.zeros((200, 7, 1)))),
    "two outputs": (two_outputs, (X, {"a": TARGET, "b": TARGET})),
    "a layer of one's own": (own_layer, (X, TARGET)),
    "a sum over a batch": (plain({"units": 1}, keras.losses.MeanSquaredError(reduction="sum")), (X, TARGET)),
}


def evaluated(engine: Engine, parts, batch_size: int) -> dict[str, float]:
    """Return what Keras evaluates on the validation samples with the engine's weights."""
    rows = SPLIT.validation
    x, y, weight = (*parts, None)[:3]
    y = {k: v[rows] for k, v in y.items()} if isinstance(y, dict) else y[rows]
    model = engine.trained_model(SPLIT)
    found = model.evaluate(
        x[rows], y, sample_weight=None if weight is None else weight[rows],
        batch_size=batch_size, verbose=0, return_dict=True,
    )  # fmt: skip
    return {f"val_{name}": float(value) for name, value in found.items()}


def validation(build, parts, batch_size: int = BATCH) -> tuple[Engine, dict[str, float]]:
    """Return the engine after an epoch, and what it measured on the validation samples."""
    engine = Engine(build, make_data("test", *parts), batch_size=batch_size)
    metrics = engine.start("adam", SPLIT).epoch(np.full(SPLIT.steps_per_epoch(batch_size), 0.01)).metrics
    return engine, {name: value for name, value in metrics.items() if name.startswith("val_")}


@pytest.mark.parametrize("case", ANY_SIZE)
def test_where_batches_do_not_matter_any_size_gives_the_same(case):
    """Large batches are taken, and Keras gives these numbers with batches of every size."""
    build, parts = ANY_SIZE[case]
    engine, ours = validation(build, parts)
    assert engine.why_batches is None
    assert engine.source.evaluation_batch > 100
    for size in (1, BATCH, 64, 100):
        assert ours == pytest.approx(evaluated(engine, parts, size), rel=1e-4, abs=1e-6), size


@pytest.mark.parametrize("case", BATCHES_MATTER)
def test_where_batches_matter_validation_takes_the_studys(case):
    """The numbers are those of Keras with this batch size, a last partial batch included, and not with another."""
    build, parts = BATCHES_MATTER[case]
    engine, ours = validation(build, parts)
    assert engine.why_batches is not None
    assert ours == pytest.approx(evaluated(engine, parts, BATCH), rel=1e-4, abs=1e-6)
    other = evaluated(engine, parts, 64)
    assert any(abs(other[name] - value) > 1e-3 * abs(value) for name, value in ours.items())


@pytest.mark.parametrize("xla", [False, True])
def test_a_searched_batch_size_leaves_validation_to_the_studys(xla):
    """Values of trials with different batch sizes are measured alike."""
    engine = Engine(BATCHES_MATTER["dice"][0], make_data("test", X, MASKS), batch_size=BATCH)
    engine.xla = xla
    resting = np.zeros(SPLIT.steps_per_epoch(25))
    ours = engine.start("sgd", SPLIT, 25).epoch(resting).metrics["val_loss"]
    assert ours == pytest.approx(evaluated(engine, (X, MASKS), BATCH)["val_loss"], rel=1e-4)


def test_a_fixed_batch_size_trains_as_under_model_fit():
    """Every part a multiple of it: the state goes from batch to batch as in model.fit."""
    series, split = X.reshape(200, 3, 2), Split(SPLIT.train, SPLIT.validation, 5)
    engine = Engine(stateful, make_data("test", series, TARGET), batch_size=10)
    result = engine.start("adam", split).epoch(np.full(10, 0.01))
    from pipeline.training.parity import Reference

    found = Reference(engine, "adam", split, 0.01).compare()
    assert found.why_not is None and found.agrees
    assert len(result.losses) == 10 and np.isfinite(result.metrics["val_loss"])


def test_full_batch_training_where_the_batch_is_larger_than_the_data():
    """One step an epoch on all samples, each once, as under model.fit; also for a ramp of steps."""
    engine = Engine(ANY_SIZE["regression"][0], make_data("test", X, TARGET), batch_size=1000)
    run = engine.start("sgd", SPLIT)
    losses = [run.epoch([0.05]).losses for _ in range(4)]
    steps = engine.start("sgd", SPLIT).steps(np.full(4, 0.05)).losses
    keras.utils.set_random_seed(SPLIT.seed)
    model = ANY_SIZE["regression"][0]()
    model.optimizer = keras.optimizers.SGD(0.05)
    history = model.fit(X[:100], TARGET[:100], batch_size=1000, epochs=4, verbose=0).history["loss"]
    np.testing.assert_allclose(np.concatenate(losses), history, rtol=1e-4)
    np.testing.assert_allclose(steps, history, rtol=1e-4)
