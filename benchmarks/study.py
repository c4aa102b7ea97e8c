"""The whole default study against the same trials run by a plain Optuna script with `model.fit`.

First lrtune runs `studies/digits.toml` without confirmation.  Then the plain script runs the very
configurations and folds that lrtune ran, for as many epochs as lrtune ran them, building and
fitting a model per fold as such scripts do.  Running all of it takes the best part of an hour;
by default every sixth trial is run and its time is compared with lrtune's for the same trials.

    python -m benchmarks.study [every]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna

from objectives import digits
from pipeline.progress import Reporter
from pipeline.report.records import load_record
from pipeline.search.prepare import prepare, splits_of
from pipeline.search.study import StudyRunner
from pipeline.study_file import read_study
from pipeline.training.decays import keras_schedule_code
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.tensorflow_import import import_tensorflow


def plain_trial(keras, x, y, splits, trial, epochs: int, batch_size: int) -> float:
    """Run a trial's folds with `model.fit`, as many epochs of each as lrtune ran; return the seconds."""
    c = trial.configuration
    started = time.perf_counter()
    for fold, losses in enumerate(trial.curves.get("loss", [])):
        split = splits[fold]
        steps = split.steps_per_epoch(batch_size)
        code = keras_schedule_code(c.decay, c.learning_rate, c.final_fraction, epochs * steps)
        rate = eval(code, {"keras": keras})
        model = digits.build_model()
        model.optimizer = eval(OPTIMIZERS[c.optimizer].code("rate"), {"keras": keras, "rate": rate})
        model.fit(
            x[split.train],
            y[split.train],
            batch_size=batch_size,
            epochs=len(losses),
            verbose=0,
            validation_data=(x[split.validation], y[split.validation]),
        )
    return time.perf_counter() - started


def main() -> None:
    """Measure and print both sides."""
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "trials": 60,
            "workers.count": 1,
            "confirm.finalists": 0,
            "storage.url": f"sqlite:///{folder}/studies.db",
        }
        study = read_study(Path("studies/digits.toml"), overrides, Path(folder) / "digits")
        import_tensorflow()
        started = time.perf_counter()
        prepared = prepare(study, Reporter(quiet=True))
        StudyRunner(prepared, Reporter(quiet=True)).run()
        ours = time.perf_counter() - started
        record = load_record(study)
    epochs_run = sum(trial.epochs_run for trial in record.trials)
    seconds = {trial.number: trial.seconds or 0.0 for trial in record.trials}
    overhead = ours - sum(seconds.values())
    print(f"lrtune: {ours:.1f} s for {len(record.trials)} trials, {epochs_run} epochs ({record.engine})")
    print(f"        {sum(seconds.values()):.1f} s in trials, {overhead:.1f} s for data, range tests and tracing")

    _, keras = import_tensorflow()
    (x, y), _ = digits.load_data()
    splits = splits_of(study, prepared.objective, repeat=0)
    chosen = record.trials[::every]
    plain = {}
    for trial in chosen:
        plain[trial.number] = plain_trial(keras, x, y, splits, trial, study.config.epochs, study.config.batch_size)
        print(
            f"trial {trial.number}: plain {plain[trial.number]:.2f} s, lrtune {seconds[trial.number]:.2f} s", flush=True
        )
    share = sum(t.epochs_run for t in chosen) / epochs_run
    whole = sum(plain.values()) / share
    print(
        f"plain script: {sum(plain.values()):.1f} s for {len(chosen)} of the trials ({100 * share:.0f}% of the epochs),"
    )
    print(f"              about {whole:.0f} s for all of them: {whole / ours:.1f} times lrtune's whole study")
    ratios = [plain[n] / seconds[n] for n in plain if seconds[n]]
    print(f"trial by trial, the median ratio is {np.median(ratios):.1f} (Optuna {optuna.__version__})")


if __name__ == "__main__":
    main()
