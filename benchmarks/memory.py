"""Resident memory over 400 trials of the digits model: growth over the last 200 must stay under 10 MB.

python -m benchmarks.memory
"""

from __future__ import annotations

import itertools
import resource
from pathlib import Path

import numpy as np

from objectives import digits
from pipeline.search.space import Configuration
from pipeline.search.trial import Monitor, run_trial
from pipeline.training.data import make_data
from pipeline.training.decays import DECAYS
from pipeline.training.engine import Engine
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.splits import Split

TRIALS, EPOCHS = 400, 2


def resident_megabytes() -> float:
    """Return this process's resident size."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Run the trials and print the size every 100."""
    (x, y), _ = digits.load_data()
    engine = Engine(digits.build_model, make_data("digits", x, y), batch_size=32)
    folds = np.array_split(np.arange(len(x), dtype=np.int32), 5)
    splits = [Split(np.concatenate(folds[:i] + folds[i + 1 :]), folds[i], i) for i in range(5)]
    kinds = itertools.cycle(itertools.product(OPTIMIZERS, DECAYS))
    sizes = {}
    for trial in range(1, TRIALS + 1):
        optimizer, decay = next(kinds)
        rate = 10.0 ** np.random.default_rng(trial).uniform(-4, 1)
        run_trial(
            engine,
            Configuration(optimizer, rate, decay, 0.1),
            splits,
            epochs=EPOCHS,
            monitor=Monitor("val_loss", "min"),
        )
        if trial % 100 == 0:
            sizes[trial] = resident_megabytes()
            print(f"after {trial} trials: {sizes[trial]:.1f} MB resident", flush=True)
    print(f"growth over the last 200 of {TRIALS} trials: {sizes[400] - sizes[200]:.1f} MB")


if __name__ == "__main__":
    main()
