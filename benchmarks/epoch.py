"""One training epoch of the digits model: `model.fit`, a hand-written loop in one `tf.function`, and the engine.

All sides train the same model on the same 1,437 samples with Adam and batch size 32, and report
the epoch's loss and accuracy.  Rounds are interleaved; the ratio of each round is taken before
the median, so that a slow moment of the machine hits all sides.

    python -m benchmarks.epoch
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from objectives import digits
from pipeline.training.data import make_data
from pipeline.training.engine import Engine, Split
from pipeline.training.tensorflow_import import import_tensorflow

BATCH, ROUNDS, EPOCHS_PER_ROUND = 32, 15, 5


def hand_written(x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """Return a function that trains one epoch in a loop as one would write it for this model alone."""
    tf, keras = import_tensorflow()
    model, optimizer = digits.build_model(), keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    features, labels = tf.constant(x), tf.constant(y)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy()
    rng = np.random.default_rng(0)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.int32)])
    def epoch(order):
        accuracy.reset_state()
        steps = -(-tf.size(order) // BATCH)

        def body(i, total):
            index = order[i * BATCH : (i + 1) * BATCH]
            bx, by = tf.gather(features, index), tf.gather(labels, index)
            with tf.GradientTape() as tape:
                logits = model(bx, training=True)
                loss = loss_of(by, logits)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            accuracy.update_state(by, logits)
            return i + 1, total + loss

        _, total = tf.while_loop(lambda i, _: i < steps, body, (0, 0.0))
        return total / tf.cast(steps, tf.float32), accuracy.result()

    return lambda: [float(v) for v in epoch(tf.constant(rng.permutation(len(x)).astype("int32")))] and None


def fitted(x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """Return a function that trains one epoch with `model.fit`."""
    _, keras = import_tensorflow()
    model = digits.build_model()
    model.optimizer = keras.optimizers.Adam(1e-3)
    return lambda: model.fit(x, y, batch_size=BATCH, epochs=1, verbose=0) and None


def engine_side(x: np.ndarray, y: np.ndarray, *, xla: bool) -> Callable[[], None]:
    """Return a function that trains one epoch with the engine."""
    engine = Engine(digits.build_model, make_data("digits", x, y), batch_size=BATCH)
    engine.xla = xla
    split = Split(np.arange(len(x), dtype=np.int32), np.arange(0, dtype=np.int32), 1)
    run = engine.start("adam", split)
    rates = np.full(split.steps_per_epoch(BATCH), 1e-3)
    return lambda: run.epoch(rates) and None


def main() -> None:
    """Measure and print the table."""
    (x, y), _ = digits.load_data()
    sides = {
        "model.fit": fitted(x, y),
        "hand-written loop": hand_written(x, y),
        "engine, plain graph": engine_side(x, y, xla=False),
        "engine, XLA": engine_side(x, y, xla=True),
    }
    for side in sides.values():
        for _ in range(3):
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            started = time.perf_counter()
            for _ in range(EPOCHS_PER_ROUND):
                side()
            seconds[name].append((time.perf_counter() - started) / EPOCHS_PER_ROUND)
    print(f"one epoch of digits, {len(x)} samples, batch size {BATCH}, median of {ROUNDS} interleaved rounds")
    print(f"{'':<22} {'ms':>7} {'of model.fit':>13} {'of hand-written':>16}")
    for name, values in seconds.items():
        times_fit = np.median(np.divide(seconds["model.fit"], values))
        of_hand = np.median(np.divide(values, seconds["hand-written loop"]))
        print(f"{name:<22} {1000 * np.median(values):>7.1f} {times_fit:>11.1f} × {of_hand:>14.2f} ×")


if __name__ == "__main__":
    main()
