"""The K folds of one dense network in one vectorized program, against one after another.

Both are written by hand for this network, with Adam, and differ only in a leading axis of K on
every weight and batch; so the ratio is the most that the engine could gain.  It must be weighed
against fold pruning, which ends most trials after one fold and has nothing to end here: with a
share s of the folds run, side by side pays in the search only above a ratio of 1 / s.

    python -m benchmarks.folds
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from pipeline.training.tensorflow_import import import_tensorflow

tf, _ = import_tensorflow()
FOLDS, ROUNDS = 5, 9
NETWORKS = (
    ((30, 16, 2), 32, 1000),
    ((30, 64, 64, 2), 50, 2000),
    ((64, 128, 64, 10), 32, 1440),
    ((784, 512, 10), 50, 2000),
)
"""Layer sizes, batch size, samples."""


def epoch_of(sizes: tuple[int, ...], batch: int, samples: int, folds: int | None) -> Any:
    """Return a function that trains one epoch of one fold, or of all side by side."""
    rng, lead = np.random.default_rng(0), () if folds is None else (folds,)
    x = tf.constant(rng.standard_normal((samples, sizes[0])), tf.float32)
    y = tf.constant(rng.integers(0, sizes[-1], samples))
    weights = []
    for width, units in itertools.pairwise(sizes):
        weights.append(tf.constant(0.05 * rng.standard_normal((*lead, width, units)), tf.float32))
        weights.append(tf.zeros((*lead, *((1,) if lead else ()), units)))
    zeros = [tf.zeros_like(w) for w in weights]
    shuffles = [rng.permutation(samples) for _ in range(folds or 1)]
    order = tf.constant(np.stack(shuffles) if lead else shuffles[0], tf.int32)

    def loss_of(values: list[Any], hidden: Any, targets: Any) -> Any:
        for i in range(0, len(values), 2):
            hidden = hidden @ values[i] + values[i + 1]
            hidden = hidden if i + 2 == len(values) else tf.nn.relu(hidden)
        return tf.reduce_sum(tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, hidden), -1))

    def train(order: Any, *state: Any) -> Any:
        def body(i: Any, values: list[Any], first: list[Any], second: list[Any], total: Any) -> tuple[Any, ...]:
            index = tf.slice(order, [0, i * batch] if lead else [i * batch], [*lead, batch])
            with tf.GradientTape() as tape:
                tape.watch(values)
                loss = loss_of(values, tf.gather(x, index), tf.gather(y, index))
            gradients = tape.gradient(loss, values)
            first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients, strict=True)]
            second = [0.999 * v + 0.001 * g * g for v, g in zip(second, gradients, strict=True)]
            steps = zip(values, first, second, strict=True)
            return i + 1, [w - 1e-3 * m / (tf.sqrt(v) + 1e-7) for w, m, v in steps], first, second, total + loss

        start = (0, *[list(part) for part in state], 0.0)
        return tf.while_loop(lambda i, *_: i < samples // batch, body, start)[-1]

    compiled = tf.function(train, jit_compile=True, autograph=False)
    return lambda: compiled(order, weights, zeros, zeros).numpy()


def main() -> None:
    """Measure and print the ratios."""
    print(f"{FOLDS} folds, XLA, milliseconds per epoch; median of {ROUNDS} interleaved rounds")
    print(f"{'network':<20}{'one after another':>20}{'side by side':>15}{'gain':>7}")
    for sizes, batch, samples in NETWORKS:
        one, together = (epoch_of(sizes, batch, samples, folds) for folds in (None, FOLDS))
        seconds: tuple[list[float], list[float]] = ([], [])
        for round_number in range(ROUNDS + 1):
            for side, (run, times) in enumerate(((one, FOLDS), (together, 1))):
                started = time.perf_counter()
                for _ in range(times):
                    run()
                if round_number:
                    seconds[side].append(time.perf_counter() - started)
        first, second = (1000 * float(np.median(side)) for side in seconds)
        gain = float(np.median(np.divide(*seconds)))
        print(f"{'-'.join(map(str, sizes)):<20}{first:>20.1f}{second:>15.1f}{gain:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
