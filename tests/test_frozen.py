"""Frozen bodies: cut off where nothing in them changes, trained as the whole would be."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from pipeline.training.data import make_data
from pipeline.training.engine import Engine
from pipeline.training.splits import Split

RNG = np.random.default_rng(3)
IMAGES = RNG.standard_normal((90, 8, 8, 3)).astype("float32")
LABELS = (IMAGES[:, :4].mean(axis=(1, 2, 3)) > 0).astype("int64")
ROWS = RNG.standard_normal((90, 5)).astype("float32")
BATCH = 16
SPLITS = [Split(np.arange(70, dtype=np.int32), np.arange(70, 90, dtype=np.int32), seed) for seed in (1, 2)]


def compiled(model: keras.Model) -> keras.Model:
    """Compile a classifier of two classes."""
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def body(trainable: bool = False) -> keras.Model:
    """A small convolutional network with batch statistics, frozen."""
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(6, 3), layers.BatchNormalization(), layers.Activation("relu")]
    )
    model.trainable = trainable
    return model


def nested() -> keras.Model:
    """The usual form of transfer learning: a frozen network called as a layer."""
    inputs = keras.Input((8, 8, 3))
    hidden = layers.GlobalAveragePooling2D()(body()(layers.Rescaling(0.5)(inputs), training=False))
    return compiled(keras.Model(inputs, layers.Dense(2)(layers.Dropout(0.3)(hidden))))


def stacked() -> keras.Model:
    """The same in a Sequential model, with a head that keeps statistics of its own."""
    head = [layers.GlobalAveragePooling2D(), layers.BatchNormalization(), layers.Dense(2)]
    return compiled(keras.Sequential([keras.Input((8, 8, 3)), body(), *head]))


def bypassed() -> keras.Model:
    """Inputs that also reach the head around the frozen part, and two tensors at the cut."""
    inputs = keras.Input((5,))
    first = layers.Dense(4, activation="relu", trainable=False)(inputs)
    second = layers.Dense(3, trainable=False)(first)
    joined = layers.Concatenate()([layers.Dense(4)(first), second, inputs])
    return compiled(keras.Model(inputs, layers.Dense(2)(joined)))


def named_inputs() -> keras.Model:
    """Two inputs by name, one of them through a frozen embedding."""
    token = keras.Input((4,), dtype="int32", name="token")
    row = keras.Input((5,), name="row")
    hidden = layers.Flatten()(layers.Embedding(10, 3, trainable=False)(token))
    return compiled(keras.Model({"token": token, "row": row}, layers.Dense(2)(layers.Concatenate()([hidden, row]))))


CASES = {
    "nested": (nested, IMAGES),
    "stacked": (stacked, IMAGES),
    "bypassed": (bypassed, ROWS),
    "named inputs": (named_inputs, {"token": RNG.integers(0, 10, (90, 4)), "row": ROWS}),
}


def train(engine: Engine, split: Split) -> tuple[list[float], dict[str, float], keras.Model]:
    """Train two epochs; return losses, metrics of the last, and the model."""
    run = engine.start("adam", split)
    results = [run.epoch(np.full(split.steps_per_epoch(BATCH), 0.01)) for _ in range(2)]
    return [loss for r in results for loss in r.losses], results[-1].metrics, engine.trained_model(split)


@pytest.mark.parametrize("case", CASES)
def test_training_the_head_equals_training_the_whole(case):
    """Under two seeds, whose random bodies differ, and back again: losses, metrics, and the saved model."""
    build, x = CASES[case]
    data = make_data("test", x, LABELS)
    cut = Engine(build, data, batch_size=BATCH)
    whole = Engine(build, data, batch_size=BATCH, frozen_bytes=0)
    assert cut.frozen is not None
    assert whole.frozen is None
    assert cut.parameters == whole.parameters
    for split in (*SPLITS, SPLITS[0]):
        losses, metrics, model = train(cut, split)
        expected_losses, expected_metrics, expected_model = train(whole, split)
        np.testing.assert_allclose(losses, expected_losses, rtol=2e-4)
        assert metrics == pytest.approx(expected_metrics, rel=2e-4)
        for mine, theirs in zip(model.get_weights(), expected_model.get_weights(), strict=True):
            if theirs.dtype.kind == "f":
                np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_trained_model_can_be_saved_and_loaded(case, tmp_path):
    """Whole, with the weights of the last run, and with the same answers after loading."""
    build, x = CASES[case]
    engine = Engine(build, make_data("test", x, LABELS), batch_size=BATCH)
    metrics, model = train(engine, SPLITS[1])[1:]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    held = {k: v[70:] for k, v in x.items()} if isinstance(x, dict) else x[70:]
    loss = loaded.loss(LABELS[70:], loaded.predict(held, verbose=0))
    assert float(loss) == pytest.approx(metrics["val_loss"], rel=1e-3)


def test_the_body_is_not_run_in_training(monkeypatch):
    """Its layers are called to compute the outputs, and never again."""
    engine = Engine(nested, make_data("test", IMAGES, LABELS), batch_size=BATCH)
    train(engine, SPLITS[0])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the frozen body was run again")

    monkeypatch.setattr(layers.Conv2D, "call", refuse)
    run = engine.start("sgd", SPLITS[0])
    assert np.isfinite(run.epoch(np.full(5, 0.01)).losses).all()


def augmented() -> keras.Model:
    """Augmentation before the frozen part: its inputs differ in every epoch."""
    flip = layers.RandomFlip()
    return compiled(keras.Sequential([keras.Input((8, 8, 3)), flip, body(), layers.Flatten(), layers.Dense(2)]))


def half_trained() -> keras.Model:
    """A body that is not frozen."""
    return compiled(keras.Sequential([keras.Input((8, 8, 3)), body(True), layers.Flatten(), layers.Dense(2)]))


def noisy_body() -> keras.Model:
    """A frozen layer behind Dropout."""
    frozen = layers.Dense(4, trainable=False)
    return compiled(keras.Sequential([keras.Input((5,)), layers.Dropout(0.5), frozen, layers.Dense(2)]))


class Counting(layers.Layer):
    """A layer that keeps count of its calls."""

    def build(self, shape: tuple[int, ...]) -> None:
        """Make the count."""
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: object) -> object:
        """Count and pass on."""
        self.count.assign_add(1.0)
        return x


def counting() -> keras.Model:
    """State that every call changes."""
    return compiled(keras.Sequential([keras.Input((5,)), Counting(), layers.Dense(2)]))


@pytest.mark.parametrize(
    ("build", "x", "said"),
    [(augmented, IMAGES, False), (half_trained, IMAGES, False), (noisy_body, ROWS, True), (counting, ROWS, False)],
)
def test_what_changes_is_not_cut_off(build, x, said):
    """Randomness, trained weights, and state keep a model whole, which is told where most weights are fixed."""
    engine = Engine(build, make_data("test", x, LABELS), batch_size=BATCH)
    assert engine.frozen is None
    assert (engine.not_frozen is not None) == said
    assert np.isfinite(train(engine, SPLITS[0])[0]).all()


def test_the_memory_bound_decides(tmp_path):
    """90 samples of 6 float32 values at the cut are 2,160 bytes."""
    data = make_data("test", IMAGES, LABELS)
    assert Engine(nested, data, batch_size=BATCH, frozen_bytes=2160).frozen is not None
    whole = Engine(nested, data, batch_size=BATCH, frozen_bytes=2159)
    assert whole.frozen is None
    assert "more than engine.frozen_memory" in whole.not_frozen
    whole.trained_model(SPLITS[0]).save(tmp_path / "model.keras")  # what was not cut bears no marks
