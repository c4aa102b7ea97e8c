"""The default search against itself with one part changed, on the same tasks, seeds, splits and epochs.

Every variant runs whole studies without confirmation.  For each seed the variants share splits,
initial weights and shuffles, so that differences are paired.  Reported per task and variant: the
median over seeds of the best value over the default's, how often it was within 1% of the default's
or better, epochs trained over the default's, and epochs until the search had a value within 1% of
the default's final one, over the default's own.

    python -m benchmarks.ablation [seeds] [variant ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pipeline.progress import Reporter
from pipeline.report.records import StudyRecord, load_record
from pipeline.search.prepare import Prepared, prepare, splits_of
from pipeline.search.study import StudyRunner
from pipeline.study_file import read_study

TRIALS = 40

DIGITS = Path(__file__).resolve().parent.parent / "objectives" / "digits.py"

TABLE = """
import keras
import numpy as np
from sklearn.datasets import make_friedman1


def load_data():
    x, y = make_friedman1(700, n_features=30, noise=1.0, random_state=0)
    y = (y - y.mean()) / y.std()
    return x.astype("float32"), y.astype("float32")[:, None]


def build_model():
    hidden = [keras.layers.Dense(64, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(32, "relu")]
    model = keras.Sequential([keras.Input((30,)), *hidden, keras.layers.Dense(1)])
    model.compile(loss="mse")
    return model
"""

TASKS = {"digits": (DIGITS.read_text(), 20), "table": (TABLE, 15)}
"""Objective and epochs per task."""


@dataclass(frozen=True)
class Variant:
    """A change to the default.

    Attributes:
        overrides: keys of the study file.
        patches: (object, attribute, value) put in place while the study runs.
    """

    overrides: dict[str, Any]
    patches: tuple[tuple[str, Any], ...] = ()


def _baseline_only(self: StudyRunner, study: Any, space: Any) -> None:
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(space.baseline_parameters(), user_attrs={"baseline": True})


VARIANTS = {
    "default": Variant({}),
    "sees all earlier trials": Variant({}, (("pipeline.search.study.DISTANCE", 1),)),
    "sees up to 8 before": Variant({}, (("pipeline.search.study.DISTANCE", 8),)),
    "no range test": Variant({"search.learning_rate": {"low": 1e-6, "high": 10.0}}),
    "no suggestions": Variant({}, (("pipeline.search.study.StudyRunner._enqueue", _baseline_only),)),
    "no pruning": Variant({"pruning.pruner": "none"}),
    "random": Variant({"sampler.name": "random"}),
    "qmc": Variant({"sampler.name": "qmc"}),
}


@contextmanager
def changed(variant: Variant) -> Iterator[None]:
    """Put a variant's patches in place."""
    with ExitStack() as stack:
        for target, value in variant.patches:
            stack.enter_context(mock.patch(target, value))
        yield


def recorded(prepared: Prepared, variant: Variant, seed: int) -> StudyRecord:
    """Run a study and return its record."""
    overrides = {
        "seed": seed,
        "trials": TRIALS,
        "epochs": prepared.study.config.epochs,
        "confirm.finalists": 0,
        "workers.count": 1,
        "engine.xla": True,
        **variant.overrides,
    }
    with tempfile.TemporaryDirectory() as folder, changed(variant):
        url = {"storage.url": f"sqlite:///{folder}/s.db"}
        study = read_study(prepared.study.path, {**overrides, **url}, Path(folder) / "out")
        splits = splits_of(study, prepared.objective, repeat=0)
        StudyRunner(replace(prepared, study=study, splits=splits), Reporter(quiet=True)).run()
        return load_record(study)


def run(prepared: Prepared, variant: Variant, seed: int) -> tuple[list[float], list[int]]:
    """Run a study; return the best value so far and the epochs trained so far after every trial."""
    best: list[float] = []
    spent: list[int] = []
    for trial in recorded(prepared, variant, seed).trials:
        value = trial.value if trial.value is not None else np.inf
        best.append(min(value, best[-1] if best else np.inf))
        spent.append(trial.epochs_run + (spent[-1] if spent else 0))
    return best, spent


def prepared_task(folder: str, name: str) -> Prepared:
    """Prepare a task once; its engine serves every variant and seed."""
    text, epochs = TASKS[name]
    Path(folder, f"{name}.py").write_text(text)
    path = Path(folder, f"{name}_study.toml")
    path.write_text(f'objective = "{name}.py"\nepochs = {epochs}\n')
    prepared = prepare(read_study(path), Reporter(quiet=True))
    prepared.engine.xla = True
    return prepared


def main() -> None:
    """Measure and print the tables."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chosen = ["default", *(name for name in sys.argv[2:] or VARIANTS if name != "default")]
    median: Callable[[Any], float] = lambda values: float(np.median(values))  # noqa: E731
    for task in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepared_task(folder, task)
            results: dict[str, list[tuple[list[float], list[int]]]] = {name: [] for name in chosen}
            for seed in range(seeds):
                for name in chosen:
                    results[name].append(run(prepared, VARIANTS[name], seed))
        print(f"{task}: {seeds} seeds, {TRIALS} trials")
        print(f"  {'variant':<26}{'value':>8}{'worst':>8}{'within 1%':>11}{'epochs':>8}{'to reach':>10}")
        for name in chosen:
            pairs = list(zip(results[name], results["default"], strict=True))
            ratio = [ours[0][-1] / theirs[0][-1] for ours, theirs in pairs]
            epochs = [ours[1][-1] / theirs[1][-1] for ours, theirs in pairs]
            reach = [
                epochs_to(ours, 1.01 * theirs[0][-1]) / epochs_to(theirs, 1.01 * theirs[0][-1])
                for ours, theirs in pairs
            ]
            print(
                f"  {name:<26}{median(ratio):>8.3f}{max(ratio):>8.3f}{np.mean(np.array(ratio) <= 1.01):>11.0%}"
                f"{median(epochs):>8.2f}{median(reach):>10.2f}",
                flush=True,
            )


def epochs_to(course: tuple[list[float], list[int]], target: float) -> float:
    """Return the epochs trained until a value was reached, or infinity."""
    best, spent = course
    reached = [epochs for value, epochs in zip(best, spent, strict=True) if value <= target]
    return float(reached[0]) if reached else float("inf")


if __name__ == "__main__":
    main()
