"""One training epoch of eight models: `model.fit`, the engine, a hand-written loop, and the arithmetic limit.

`model.fit` is its better self of `steps_per_execution` 1 and all.  The hand-written loop is one
`tf.function` with a while loop over gathered mini-batches, as one would write it for that model
alone; like the other sides it reports loss and metric of the epoch.  The engine runs as a study
would run it: plain graph or XLA, whichever its calibration chose.  The limit is the epoch's
floating-point operations (three times the forward pass) over the machine's measured matrix-product
rate.  Sides are interleaved; ratios are taken per round, then the median.

    python -m benchmarks.engine
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.training.data import make_data
from pipeline.training.engine import Engine
from pipeline.training.optimizers import build_optimizer
from pipeline.training.splits import Split
from pipeline.training.tensorflow_import import import_tensorflow

tf, keras = import_tensorflow()
layers = keras.layers
RNG = np.random.default_rng(0)
ROUNDS = 9


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        build: returns the compiled model.
        x, y: the samples.
        batch_size: samples per step.
        multiplications: multiply-adds of one sample's forward pass, counted from the layers' shapes.
    """

    build: Callable[[], Any]
    x: np.ndarray
    y: np.ndarray
    batch_size: int
    multiplications: int


def classifier(*stack: Callable[[], Any], shape: tuple[int, ...], classes: int = 10) -> Callable[[], Any]:
    """Return a build function of a sequential classifier."""

    def build() -> Any:
        model = keras.Sequential([keras.Input(shape), *(layer() for layer in stack), layers.Dense(classes)])
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        return model

    return build


def transformer() -> Any:
    """One block of attention and feed-forward over 32 tokens."""
    inputs = keras.Input((32,), dtype="int32")
    hidden = layers.Embedding(1000, 32)(inputs)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 16)(hidden, hidden))
    wide = layers.Dense(32)(layers.Dense(64, activation="relu")(hidden))
    hidden = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(hidden + wide))
    model = keras.Model(inputs, layers.Dense(10)(hidden))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def labels(samples: int, classes: int = 10) -> np.ndarray:
    """Return random class numbers."""
    return RNG.integers(0, classes, samples)


def normal(*shape: int) -> np.ndarray:
    """Return random features."""
    return RNG.standard_normal(shape).astype("float32")


def relu(units: int) -> Callable[[], Any]:
    """Return a maker of a dense layer."""
    return lambda: layers.Dense(units, activation="relu")


CASES = {
    "digits MLP": Case(
        classifier(relu(128), relu(64), shape=(64,)), normal(1440, 64), labels(1440), 32, 64 * 128 + 128 * 64 + 640
    ),
    "dropout MLP": Case(
        classifier(relu(512), lambda: layers.Dropout(0.2), shape=(784,)),
        normal(2000, 784),
        labels(2000),
        50,
        784 * 512 + 5120,
    ),
    "tabular MLP, BatchNorm": Case(
        classifier(
            relu(64), layers.BatchNormalization, relu(64), layers.BatchNormalization, shape=(30,), classes=2
        ),
        normal(2000, 30),
        labels(2000, 2),
        50,
        30 * 64 + 64 * 64 + 128,
    ),
    "embedding": Case(
        classifier(
            lambda: layers.Embedding(5000, 16), layers.GlobalAveragePooling1D, relu(16), shape=(80,), classes=2
        ),
        RNG.integers(0, 5000, (2000, 80)),
        labels(2000, 2),
        50,
        80 * 16 + 16 * 16 + 32,
    ),
    "LSTM": Case(
        classifier(lambda: layers.LSTM(32), shape=(50, 4), classes=2),
        normal(2000, 50, 4),
        labels(2000, 2),
        50,
        50 * 4 * 36 * 32,
    ),
    "MNIST ConvNet": Case(
        classifier(
            lambda: layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D,
            lambda: layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D,
            layers.Flatten, relu(256), relu(128), shape=(28, 28, 1),
        ),
        normal(3000, 28, 28, 1),
        labels(3000),
        250,
        26 * 26 * 32 * 9 + 11 * 11 * 64 * 288 + 1600 * 256 + 256 * 128 + 1280,
    ),
    "small ConvNet": Case(
        classifier(
            lambda: layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D,
            layers.Flatten, relu(32), shape=(8, 8, 1),
        ),
        normal(2000, 8, 8, 1),
        labels(2000),
        50,
        6 * 6 * 16 * 9 + 144 * 32 + 320,
    ),
    "transformer block": Case(
        transformer, RNG.integers(0, 1000, (2000, 32)), labels(2000), 50, 32 * (4 * 32 * 32 + 2 * 32 * 32 + 2 * 32 * 64)
    ),
}  # fmt: skip


def fitted(case: Case, steps_per_execution: int) -> Callable[[], object]:
    """Return a function that trains one epoch with `model.fit`."""
    model = case.build()
    model.optimizer = keras.optimizers.Adam(1e-3)
    model.steps_per_execution = steps_per_execution
    return lambda: model.fit(case.x, case.y, batch_size=case.batch_size, epochs=1, verbose=0)


def hand_written(case: Case) -> Callable[[], object]:
    """Return a function that trains one epoch in a loop written for the model."""
    model, optimizer, size = case.build(), build_optimizer("adam", 1e-3), case.batch_size
    optimizer.build(model.trainable_variables)
    x, y, loss_of = tf.constant(case.x), tf.constant(case.y), model.loss
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.int32)])
    def epoch(order: Any) -> Any:
        accuracy.reset_state()
        steps = -(-tf.size(order) // size)

        def body(i: Any, total: Any) -> Any:
            index = order[i * size : (i + 1) * size]
            inputs, targets = tf.gather(x, index), tf.gather(y, index)
            with tf.GradientTape() as tape:
                logits = model(inputs, training=True)
                loss = loss_of(targets, logits)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            accuracy.update_state(targets, logits)
            return i + 1, total + loss

        _, total = tf.while_loop(lambda i, _: i < steps, body, (0, 0.0))
        return total / tf.cast(steps, tf.float32), accuracy.result()

    return lambda: [float(v) for v in epoch(tf.constant(RNG.permutation(len(case.x)).astype("int32")))]


def engine_side(case: Case) -> tuple[Callable[[], object], str, float]:
    """Return a function that trains one epoch with the engine, how it does it, and the seconds to trace."""
    started = time.perf_counter()
    engine = Engine(case.build, make_data("case", case.x, case.y), batch_size=case.batch_size)
    split = Split(np.arange(len(case.x), dtype=np.int32), np.arange(0, dtype=np.int32), 1)
    rates = np.full(split.steps_per_epoch(case.batch_size), 1e-3)
    engine.start("adam", split).epoch(rates)
    traced = time.perf_counter() - started
    decision = engine.calibrate("adam", split, epochs=5000, programs=1)
    run = engine.start("adam", split)
    return lambda: run.epoch(rates), decision.split(" (")[0], traced


def matrix_rate() -> float:
    """Return multiply-adds per second of a large float32 matrix product, the best of several."""
    a = tf.random.normal([2048, 2048])
    product = tf.function(lambda: tf.reduce_sum(a @ a))
    product()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product().numpy()
        seconds.append(time.perf_counter() - started)
    return 2048**3 / min(seconds)


def main() -> None:
    """Measure and print the table."""
    rate = matrix_rate()
    print(
        f"matrix product: {2 * rate / 1e9:.0f} GFLOP/s; median of {ROUNDS} interleaved rounds, milliseconds per epoch"
    )
    print(
        f"{'model':<24}{'fit':>8}{'engine':>8}{'by hand':>9}{'limit':>7}"
        f"{'× fit':>8}{'/ hand':>8}{'trace s':>9}  engine runs as"
    )
    for name, case in CASES.items():
        steps = -(-len(case.x) // case.batch_size)
        ours, decision, traced = engine_side(case)
        sides = {
            "fit 1": fitted(case, 1),
            "fit all": fitted(case, steps),
            "hand": hand_written(case),
            "engine": ours,
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for round_number in range(ROUNDS + 2):
            for side, run in sides.items():
                started = time.perf_counter()
                run()
                if round_number >= 2:  # tracing and warm-up
                    seconds[side].append(time.perf_counter() - started)
        fit = min(("fit 1", "fit all"), key=lambda side: float(np.median(seconds[side])))
        median = {side: 1000 * float(np.median(values)) for side, values in seconds.items()}
        faster = float(np.median(np.divide(seconds[fit], seconds["engine"])))
        by_hand = float(np.median(np.divide(seconds["engine"], seconds["hand"])))
        limit = 1000 * 3 * case.multiplications * len(case.x) / rate
        print(
            f"{name:<24}{median[fit]:>8.1f}{median['engine']:>8.1f}{median['hand']:>9.1f}{limit:>7.1f}"
            f"{faster:>8.1f}{by_hand:>8.2f}{traced:>9.2f}  {decision}",
            flush=True,
        )


if __name__ == "__main__":
    main()
