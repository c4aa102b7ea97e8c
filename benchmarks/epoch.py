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

from benchmarks.engine import Case, fitted, hand_written
from objectives import digits
from pipeline.training.data import make_data
from pipeline.training.engine import Engine
from pipeline.training.splits import Split

BATCH, ROUNDS, EPOCHS_PER_ROUND = 32, 15, 5


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
    case = Case(digits.build_model, x, y, BATCH, 0)
    sides = {
        "model.fit": fitted(case, 1),
        "hand-written loop": hand_written(case),
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
