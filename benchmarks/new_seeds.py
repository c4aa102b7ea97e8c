"""A run of one epoch on a new seed: as it is, and with TensorFlow's prepared graphs thrown away for every seed.

python -m benchmarks.new_seeds
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.engine import CASES
from pipeline.training import seeds
from pipeline.training.data import make_data
from pipeline.training.engine import Engine
from pipeline.training.splits import Split

RUNS = 12
"""Seeds on each side, by turns; the first of each is not counted."""


def main() -> None:
    """Print a row per model: median milliseconds of a run, both ways, and how many times as long the second takes."""
    print(f"{'model':<24}{'kept, ms':>10}{'thrown away, ms':>18}{'times':>8}")
    for name, case in CASES.items():
        engine = Engine(case.build, make_data(name, case.x, case.y), batch_size=case.batch_size)
        samples = np.arange(len(case.x), dtype=np.int32)
        taken: tuple[list[float], list[float]] = [], []
        for number in range(2 * RUNS):
            split = Split(samples[:-100], samples[-100:], number)
            seeds._drawn[0] = thrown = bool(number % 2)
            began = time.perf_counter()
            engine.start("adam", split).epoch(np.full(split.steps_per_epoch(case.batch_size), 0.001))
            taken[thrown].append(time.perf_counter() - began)
        seeds._drawn[0] = False
        kept, away = (1000 * float(np.median(side[1:])) for side in taken)
        print(f"{name:<24}{kept:>10.0f}{away:>18.0f}{away / kept:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
