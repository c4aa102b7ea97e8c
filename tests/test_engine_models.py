"""More kinds of models and optimizers through the engine, each compared with `model.fit`, and the fallbacks."""

from __future__ import annotations

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers

from pipeline.training.engine import Engine
from pipeline.training.optimizers import OptimizerSpec
from pipeline.training.splits import Split
from tests.test_engine import BATCH, HELD, LABELS, SPLIT, TARGET, TRAIN, OwnStep, X, assert_equals_fit, dense, make_data

RNG = np.random.default_rng(3)
IMAGES = RNG.uniform(size=(150, 8, 8, 1)).astype("float32")
SERIES = RNG.standard_normal((150, 7, 3)).astype("float32")
WORDS = RNG.choice(["red", "green", "blue", "grey"], 150)
LOSS = "sparse_categorical_crossentropy"


def images() -> keras.Model:
    """Augmentation, convolution, pooling."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomFlip("horizontal"),
            layers.RandomTranslation(0.1, 0.1),
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.SpatialDropout2D(0.2),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(loss=LOSS, metrics=["accuracy"])
    return model


def recurrent() -> keras.Model:
    """A bidirectional GRU with recurrent dropout."""
    model = keras.Sequential(
        [keras.Input((7, 3)), layers.Bidirectional(layers.GRU(4, recurrent_dropout=0.2)), layers.Dense(1)]
    )
    model.compile(loss="huber", metrics=["mse"])
    return model


def transformer() -> keras.Model:
    """Attention with a residual connection and layer normalization."""
    inputs = keras.Input((7, 3))
    hidden = layers.Dense(8)(inputs)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 4, dropout=0.1)(hidden, hidden))
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(hidden)))
    model.compile(loss="mse")
    return model


def words() -> keras.Model:
    """Strings looked up inside the model."""
    lookup = layers.StringLookup(vocabulary=["red", "green", "blue"])
    model = keras.Sequential(
        [keras.Input((), dtype="string"), lookup, layers.Embedding(5, 4), layers.Dense(3, activation="softmax")]
    )
    model.compile(loss=LOSS, metrics=["accuracy"])
    return model


def transfer() -> keras.Model:
    """A frozen body in inference mode, with batch statistics that must not move, under a trained head."""
    body = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.BatchNormalization()])
    body.trainable = False
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(body(inputs, training=False)))
    model.compile(loss=LOSS, metrics=["accuracy"])
    return model


def mixed_precision() -> keras.Model:
    """Half-precision compute with loss scaling."""
    policy = "mixed_float16"
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, activation="relu", dtype=policy)(inputs)
    model = keras.Model(inputs, layers.Dense(3, activation="softmax", dtype="float32")(hidden))
    model.dtype_policy = keras.dtype_policies.DTypePolicy(policy)
    model.compile(loss=LOSS)
    return model


def quantiles() -> keras.Model:
    """A loss that compares a column of targets with several outputs."""

    def pinball(y_true, y_pred):
        error = y_true - y_pred
        return keras.ops.mean(keras.ops.maximum(0.9 * error, -0.1 * error), axis=-1)

    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(3)])
    model.compile(loss=pinball)
    return model


def columns() -> keras.Model:
    """Inputs by name, of one column each, with the dimension of the column or without."""
    inputs = {"a": keras.Input((1,)), "kind": keras.Input((), dtype="int64")}
    known = layers.IntegerLookup(vocabulary=[5, 6], output_mode="one_hot")(inputs["kind"])
    model = keras.Model(inputs, layers.Dense(1)(layers.concatenate([inputs["a"], known])))
    model.compile(loss="mse", weighted_metrics=["mae"])
    return model


FRAME = pd.DataFrame({"a": X[:, 0], "kind": LABELS + 5})

CLASS_WEIGHTS = np.array([0.2, 1.0, 3.0], "float32")[LABELS]

CASES = {
    "augmentation and convolution": (images, (IMAGES, LABELS), 1e-3),
    "bidirectional GRU": (recurrent, (SERIES, TARGET), 1e-3),
    "attention": (transformer, (SERIES, TARGET), 1e-3),
    "strings": (words, (WORDS, LABELS), 1e-4),
    "frozen body": (transfer, (X, LABELS), 1e-4),
    "class weights as sample weights": (dense, (X, LABELS, CLASS_WEIGHTS), 1e-4),
    "a frame and a series": (quantiles, (pd.DataFrame(X), pd.Series(TARGET[:, 0])), 1e-4),
    "a series for each input, and weights": (
        columns,
        (dict(FRAME), pd.Series(TARGET[:, 0]), pd.Series(CLASS_WEIGHTS)),
        1e-4,
    ),
    "mixed precision": (mixed_precision, (X, LABELS), 2e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_engine_equals_model_fit_on_more_models(case):
    """Random layers draw the same numbers as under `model.fit`; frozen statistics stay."""
    build, parts, tolerance = CASES[case]
    assert_equals_fit(build, parts, "adam", tolerance=tolerance)


SETTINGS = {
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "weight_decay": {"weight_decay": 0.1},
    "moving average": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "amsgrad": {"amsgrad": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_optimizer_act_as_under_model_fit(name):
    """Clipping, decay, averages and accumulation inside the loop, and reset between runs."""
    spec = OptimizerSpec(name, "Adam", 0.001, SETTINGS[name])
    engine = assert_equals_fit(dense, (X, LABELS), spec)
    rates = np.full(7, 0.01)
    first = engine.start(spec, SPLIT).epoch(rates).losses
    np.testing.assert_array_equal(engine.start(spec, SPLIT).epoch(rates).losses, first)


class Untraceable(OwnStep):
    """Reads a value as a Python number in its train_step, which no graph can."""

    def train_step(self, data):
        if float(keras.ops.convert_to_numpy(data[0]).mean()) > 1e9:
            raise AssertionError
        return super().train_step(data)


def untraceable() -> keras.Model:
    """The model, compiled to run eagerly as `model.fit` needs it."""
    model = Untraceable()
    model.compile(run_eagerly=True)
    return model


def untraceable_unsaid() -> keras.Model:
    """The same, without saying so."""
    model = Untraceable()
    model.compile()
    return model


def test_a_model_that_asks_to_run_eagerly_does():
    """Same values as `model.fit`, and no complaint."""
    engine = assert_equals_fit(untraceable, (X, TARGET), "adam")
    assert engine.fallback is None


def test_a_step_that_cannot_be_traced_falls_back_and_says_so():
    """The slow form gives the values of the traced one, and the engine says which it is."""

    def own_step() -> keras.Model:
        model = OwnStep()
        model.compile()
        return model

    results = []
    for build in (own_step, untraceable_unsaid):
        engine = Engine(build, make_data("test", X, TARGET), batch_size=BATCH)
        results.append(engine.start("sgd", Split(TRAIN, HELD, 4)).epoch(np.full(7, 0.01)))
    assert engine.fallback is not None
    assert engine.fallback.startswith("trains eagerly: the epoch cannot be traced as one graph")
    np.testing.assert_allclose(results[1].losses, results[0].losses, rtol=1e-5)
    assert results[1].metrics == pytest.approx(results[0].metrics, rel=1e-5)


def test_an_error_of_the_model_itself_is_raised_not_swallowed():
    """A model that fails in every form raises its own error."""

    class Broken(OwnStep):
        def train_step(self, data):
            raise LookupError("no such thing")

    def build() -> keras.Model:
        model = Broken()
        model.compile()
        return model

    with pytest.raises(LookupError, match="no such thing"):
        Engine(build, make_data("test", X, TARGET), batch_size=BATCH)


class Counting(OwnStep):
    """Keeps a plain TensorFlow variable and a second optimizer beside Keras's own state."""

    def __init__(self) -> None:
        super().__init__()
        import tensorflow as tf

        self.count = tf.Variable(0.0)
        self.second = keras.optimizers.Adam(0.01)

    def train_step(self, data):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(self(data[0]))) * (1.0 + self.count)
        self.second.apply_gradients([(tape.gradient(loss, self.out.kernel), self.out.kernel)])
        self.count.assign_add(1.0)
        return super().train_step(data)


def test_state_beside_keras_own_is_reset_too():
    """A counter and the slots of a second optimizer do not leak from run to run."""

    def build() -> keras.Model:
        model = Counting()
        model.compile()
        return model

    engine = Engine(build, make_data("test", X, TARGET), batch_size=BATCH)
    runs = [engine.start("sgd", SPLIT).epoch(np.full(7, 0.01)) for _ in range(3)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.losses, runs[0].losses)


def test_a_metric_that_is_no_scalar_is_left_out():
    """F1Score is a vector per class unless told otherwise; the rest is measured."""

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3, activation="softmax")])
        model.compile(loss="categorical_crossentropy", metrics=["accuracy", keras.metrics.F1Score()])
        return model

    engine = Engine(build, make_data("test", X, keras.utils.to_categorical(LABELS)), batch_size=BATCH)
    assert engine.monitors == ["val_loss", "val_accuracy"]
    assert np.isfinite(engine.start("sgd", SPLIT).epoch(np.full(7, 0.01)).metrics["val_accuracy"])


class Leaky(OwnStep):
    """Sets a weight that the loss does not see to infinity in its fourth step."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = self.add_weight(shape=(2,), initializer="zeros", name="unseen")

    def train_step(self, data):
        late = keras.ops.greater_equal(self.optimizer.iterations, 3)
        self.unseen.assign(keras.ops.where(late, keras.ops.full((2,), float("inf")), self.unseen))
        return super().train_step(data)


def test_weights_that_are_not_finite_are_divergence_though_the_loss_is_fine():
    """The epoch ends as diverged with its reason."""

    def build() -> keras.Model:
        model = Leaky()
        model.compile()
        return model

    engine = Engine(build, make_data("test", X, TARGET), batch_size=BATCH)
    result = engine.start("sgd", SPLIT).epoch(np.full(7, 1e-3))
    assert np.isfinite(result.losses).all()
    assert (result.diverged_step, result.reason) == (6, "weights not finite")


def test_a_step_that_returns_every_metrics_result_trains():
    """Keras's guide to an own train_step: `compile`'s metrics come as a dict of their own, which `fit` flattens."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 3)).astype("float32")
    y = x.sum(axis=1)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = keras.layers.Dense(1)

        def call(self, inputs):
            return self.out(inputs)

        def train_step(self, data):
            features, targets = data
            with tf.GradientTape() as tape:
                predicted = self(features, training=True)
                loss = self.compute_loss(features, targets, predicted)
            weights = self.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(targets, predicted)
            return {metric.name: metric.result() for metric in self.metrics}

    def build():
        model = Own()
        model.compile(loss="mse", metrics=["mae"])
        return model

    engine = Engine(build, make_data("test", x, y), batch_size=10)
    assert "val_mae" in engine.monitors
    samples = np.arange(60, dtype=np.int32)
    run = engine.start("adam", Split(samples[:40], samples[40:], 0))
    first, *_, last = [run.epoch(np.full(4, 0.05)).metrics for _ in range(20)]
    assert last["mae"] < first["mae"]
    assert last["val_mae"] < first["val_mae"]
