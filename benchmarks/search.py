"""The search against itself with one part changed, and against what people use instead.

All search the same optimizers, decays, final fractions, epochs, splits, initial weights and
shuffles of a task on one hold-out split, without confirmation.  Rates: ours from its range test,
whose steps count; the others from 1e-5 to 1, as such scripts have it.  Peers: an Optuna script
(TPE, median pruning), random search, KerasTuner's BayesianOptimization and Hyperband (package
keras-tuner).  Their trainings are run by lrtune's engine, which trains as `model.fit` does; the
seconds of `model.fit` are measured on the same model and multiplied.

    python -m benchmarks.search epochs [--seeds N] [--tasks A,B] [--variants X,Y] [--keep FOLDER]
    python -m benchmarks.search time   [--seeds N] [--tasks A,B] [--variants PEER,PEER]

`epochs` prints per task the median over seeds of: the best value at the end over the default's;
how often it is within 1% of the default's or better; epochs trained; epochs until the value was
reached that the best peer has at the end, over the epochs that this peer needed for it; and how
often it was reached at all.  `time` does the last in seconds: ours in all, with tracing, range
tests and storage, on a fresh engine.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna

from pipeline.progress import Reporter
from pipeline.report.records import StudyRecord, load_record
from pipeline.search.prepare import Prepared, prepare, splits_of
from pipeline.search.samplers import joint_space
from pipeline.search.space import Configuration, Space
from pipeline.search.study import StudyRunner
from pipeline.search.trial import run_trial
from pipeline.study_file import read_study
from pipeline.training.decays import DEFAULT_DECAYS
from pipeline.training.optimizers import DEFAULT_OPTIMIZERS

TRIALS = 40
HERE = Path(__file__).resolve().parent
RATES = (1e-5, 1.0)
FRACTIONS = (0.001, 1.0)

TASKS = {"digits": 20, "table": 15, "dropout": 20, "text": 20, "deep": 20}
"""Epochs per task."""

DOWNLOADED = {"fashion": 5}
"""The same for tasks whose data Keras downloads, or finds where it keeps its data sets."""


@dataclass
class Course:
    """How a search went: the best value so far and the epochs trained so far, after every trial."""

    best: list[float]
    spent: list[float]
    trials: int = 0
    seconds: list[float] | None = None

    def add(self, value: float, epochs: float) -> None:
        """Take in a trial."""
        self.best.append(min(value, self.best[-1] if self.best else np.inf))
        self.spent.append(epochs + (self.spent[-1] if self.spent else 0.0))
        self.trials += 1

    def epochs_to(self, target: float) -> float:
        """Return the epochs trained until a value was reached, or infinity."""
        reached = [epochs for value, epochs in zip(self.best, self.spent, strict=True) if value <= target]
        return float(reached[0]) if reached else float("inf")


# -- ours, with parts changed ---------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A change to the default.

    Attributes:
        overrides: keys of the study file.
        patches: (what, value) put in place while the study runs.
    """

    overrides: dict[str, Any]
    patches: tuple[tuple[str, Any], ...] = ()


def _baseline_only(self: StudyRunner, study: Any, space: Any) -> None:
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(space.baseline_parameters(), user_attrs={"baseline": True})


def _separate_suggest(self: Space, trial: optuna.Trial) -> Configuration:
    """Draw with a learning-rate parameter of its own for every optimizer."""
    if trial.user_attrs.get("baseline"):
        return self._suggest_baseline(trial)
    optimizer = trial.suggest_categorical("optimizer", self.optimizers)
    decay = trial.suggest_categorical("decay", self.decays)
    low, high = self.bounds[optimizer]
    rate = trial.suggest_float(f"lr_{optimizer}", low, high, log=True)
    return Configuration(optimizer, rate, decay, self._final_fraction(trial, decay))


def _separate_joint(space: Space) -> dict[str, Any]:
    return {name: one for name, one in joint_space(space).items() if name != "lr_position"}


def _suggestions_as(decay: str) -> Callable[..., dict[str, Any]]:
    usual = Space.suggestion_parameters

    def parameters(self: Space, optimizer: str, learning_rate: float) -> dict[str, Any]:
        found = {**usual(self, optimizer, learning_rate), "decay": decay}
        if decay == "constant":
            found.pop("final_fraction", None)
        return found

    return parameters


VARIANTS = {
    "default": Variant({}),
    "sees all earlier trials": Variant({}, (("pipeline.search.study.DISTANCE", 1),)),
    "no range test": Variant({"search.learning_rate": {"low": RATES[0], "high": RATES[1]}}),
    "no suggestions": Variant({}, (("pipeline.search.study.StudyRunner._enqueue", _baseline_only),)),
    "suggestions at constant": Variant(
        {}, (("pipeline.search.space.Space.suggestion_parameters", _suggestions_as("constant")),)
    ),
    "separate rates": Variant(
        {},
        (
            ("pipeline.search.space.Space.suggest", _separate_suggest),
            ("pipeline.search.samplers.joint_space", _separate_joint),
        ),
    ),
    "no pruning": Variant({"pruning.pruner": "none"}),
    "hyperband": Variant({"pruning.pruner": "hyperband"}),
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


def recorded(prepared: Prepared, variant: Variant, seed: int, **keys: Any) -> StudyRecord:
    """Run a study and return its record."""
    overrides = {
        "seed": seed,
        "trials": TRIALS,
        "epochs": prepared.study.config.epochs,
        "confirm.finalists": 0,
        "workers.count": 1,
        "engine.xla": True,
        **variant.overrides,
        **keys,
    }
    with tempfile.TemporaryDirectory() as folder, changed(variant):
        url = {"storage.url": f"sqlite:///{folder}/s.db"}
        study = read_study(prepared.study.path, {**overrides, **url}, Path(folder) / "out")
        splits = splits_of(study, prepared.objective, repeat=0)
        StudyRunner(replace(prepared, study=study, splits=splits), Reporter(quiet=True)).run()
        return load_record(study)


HOLD_OUT = {"validation.scheme": "hold-out"}


def course_of(prepared: Prepared, variant: Variant, seed: int) -> Course:
    """Run a study; the steps of its range tests count as epochs."""
    record = recorded(prepared, variant, seed, **HOLD_OUT)
    steps = prepared.splits[0].steps_per_epoch(prepared.engine.batch_size)
    ramps = sum(len(test["rates"]) for test in record.tests.values()) / steps
    course = Course([], [])
    for number, trial in enumerate(record.trials):
        value = trial.value if trial.value is not None else np.inf
        course.add(value, trial.epochs_run + (ramps if number == 0 else 0.0))
    return course


# -- peers ----------------------------------------------------------------------------------

Train = Callable[[Configuration, Callable[[int, float], bool]], float]
"""Trains a configuration; calls back with epoch and value, which may end it; returns the best value."""


class _Ended(Exception):
    """A peer's pruner has ended a run."""


def trainer(prepared: Prepared, seed: int, course: Course) -> Train:
    """Return the training that all peers share, on our study's split."""
    study = read_study(prepared.study.path, {"seed": seed, **HOLD_OUT})
    splits = splits_of(study, prepared.objective, repeat=0)
    epochs = prepared.study.config.epochs

    def train(configuration: Configuration, on_epoch: Callable[[int, float], bool]) -> float:
        values: list[float] = []

        def each(_: int, epoch: int, value: float) -> None:
            values.append(value)
            if on_epoch(epoch, value):
                raise _Ended

        try:
            outcome = run_trial(
                prepared.engine, configuration, splits, epochs=epochs, monitor=prepared.monitor, on_epoch=each
            )
            if outcome.diverged_at is not None:  # `model.fit` goes on to the end, unless the pruner sees it
                while len(values) < epochs:
                    values.append(np.inf)
                    if on_epoch(len(values) - 1, np.inf):
                        break
        except _Ended:
            pass
        best = float(np.min(values))
        course.add(best, len(values))
        return best

    return train


def optuna_script(prepared: Prepared, seed: int, *, sampler: str = "tpe") -> Course:
    """Run what an Optuna script does: one log-uniform rate for all, median pruning after every epoch."""
    course = Course([], [])
    train = trainer(prepared, seed, course)

    def objective(trial: optuna.Trial) -> float:
        decay = trial.suggest_categorical("decay", DEFAULT_DECAYS)
        configuration = Configuration(
            trial.suggest_categorical("optimizer", DEFAULT_OPTIMIZERS),
            trial.suggest_float("lr", *RATES, log=True),
            decay,
            1.0 if decay == "constant" else trial.suggest_float("final_fraction", *FRACTIONS, log=True),
        )
        pruned = False

        def on_epoch(epoch: int, value: float) -> bool:
            nonlocal pruned
            trial.report(value, epoch)
            pruned = sampler == "tpe" and trial.should_prune()
            return pruned

        value = train(configuration, on_epoch)
        if pruned:
            raise optuna.TrialPruned
        return value

    made = optuna.samplers.TPESampler(seed=seed) if sampler == "tpe" else optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(sampler=made, pruner=optuna.pruners.MedianPruner())
    study.optimize(objective, n_trials=TRIALS)
    return course


def keras_tuner(prepared: Prepared, seed: int, *, hyperband: bool) -> Course:
    """Run what KerasTuner's BayesianOptimization or Hyperband asks for, until the budget of epochs is used up."""
    import keras_tuner
    from keras_tuner.src.tuners.bayesian import BayesianOptimizationOracle
    from keras_tuner.src.tuners.hyperband import HyperbandOracle

    epochs = prepared.study.config.epochs
    course = Course([], [])
    train = trainer(prepared, seed, course)
    space = keras_tuner.HyperParameters()
    space.Choice("optimizer", list(DEFAULT_OPTIMIZERS))
    space.Choice("decay", list(DEFAULT_DECAYS))
    space.Float("lr", *RATES, sampling="log")
    space.Float("final_fraction", *FRACTIONS, sampling="log")
    goal = keras_tuner.Objective("val_loss", "min")
    if hyperband:
        oracle = HyperbandOracle(
            goal, max_epochs=epochs, factor=3, hyperband_iterations=20, seed=seed, hyperparameters=space
        )
    else:
        oracle = BayesianOptimizationOracle(goal, max_trials=TRIALS, seed=seed, hyperparameters=space)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        oracle._set_project_dir(folder, "search")
        worst = 1.0
        while not course.spent or course.spent[-1] < TRIALS * epochs:
            trial = oracle.create_trial("tuner")
            if trial.status == "STOPPED":
                break
            chosen = trial.hyperparameters.values
            until, since = int(chosen.get("tuner/epochs", epochs)), int(chosen.get("tuner/initial_epoch", 0))
            decay = chosen["decay"]
            fraction = 1.0 if decay == "constant" else chosen["final_fraction"]
            configuration = Configuration(chosen["optimizer"], chosen["lr"], decay, fraction)
            value = train(configuration, lambda epoch, _, until=until: epoch + 1 >= until)
            course.spent[-1] -= min(since, course.spent[-1])  # these epochs were trained by the trial it goes on from
            worst = max(worst, value if np.isfinite(value) else 0.0)
            oracle.update_trial(trial.trial_id, {"val_loss": value if np.isfinite(value) else 2 * worst})
            trial.status = "COMPLETED"
            oracle.end_trial(trial)
    return course


PEERS: dict[str, Callable[[Prepared, int], Course]] = {
    "Optuna script": optuna_script,
    "random search": lambda prepared, seed: optuna_script(prepared, seed, sampler="random"),
    "KerasTuner Bayesian": lambda prepared, seed: keras_tuner(prepared, seed, hyperband=False),
    "KerasTuner Hyperband": lambda prepared, seed: keras_tuner(prepared, seed, hyperband=True),
}


# -- the two tables -------------------------------------------------------------------------


def prepared_task(folder: str, name: str, *, fresh: bool = False) -> Prepared:
    """Prepare a task; unless it is to be timed its engine serves every variant and seed."""
    own = HERE / "tasks" / f"{name}.py"
    source = own if own.exists() else HERE.parent / "objectives" / f"{name}.py"
    Path(folder, f"{name}.py").write_text(source.read_text())
    path = Path(folder, f"{name}_study.toml")
    path.write_text(f'objective = "{name}.py"\nepochs = {(TASKS | DOWNLOADED)[name]}\n')
    prepared = prepare(read_study(path), Reporter(quiet=True))
    if not fresh:
        prepared.engine.calibrate("adam", prepared.splits[0], epochs=10**5, programs=1)
        prepared.engine.leave_plain(DEFAULT_OPTIMIZERS, prepared.splits[0])
    return prepared


def measure_epochs(task: str, seeds: int, chosen: list[str], kept: Path) -> None:
    """Run the searches of a task that are not among those kept."""
    missing = [(seed, name) for seed in range(seeds) for name in chosen if not _file(kept, task, name, seed).exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepared_task(folder, task)
        xla = {"engine.xla": prepared.engine.xla}
        for seed, name in missing:
            if name in PEERS:
                course = PEERS[name](prepared, seed)
            else:
                course = course_of(
                    prepared, replace(VARIANTS[name], overrides={**xla, **VARIANTS[name].overrides}), seed
                )
            _file(kept, task, name, seed).write_text(json.dumps([course.best, course.spent]))


def _file(kept: Path, task: str, name: str, seed: int) -> Path:
    return kept / f"{task}-{name.replace(' ', '_')}-{seed}.json"


def report_epochs(task: str, seeds: int, chosen: list[str], kept: Path) -> None:
    """Print the table of values and epochs of a task."""
    courses = {
        name: [Course(*json.loads(_file(kept, task, name, seed).read_text())) for seed in range(seeds)]
        for name in chosen
    }
    peers = [name for name in PEERS if name in chosen]
    targets = [min((courses[name][seed].best[-1], name) for name in peers) for seed in range(seeds)]
    needed = [courses[name][seed].epochs_to(value) for seed, (value, name) in enumerate(targets)]
    print(f"{task}: {seeds} seeds, {TRIALS} trials of {(TASKS | DOWNLOADED)[task]} epochs")
    print(f"  {'':<26}{'value':>8}{'worst':>8}{'within 1%':>11}{'epochs':>8}{'to reach':>10}{'reached':>9}")
    for name, own in courses.items():
        ratio = [ours.best[-1] / usual.best[-1] for ours, usual in zip(own, courses["default"], strict=True)]
        reach = [ours.epochs_to(value) / n for ours, (value, _), n in zip(own, targets, needed, strict=True)]
        print(
            f"  {name:<26}{np.median(ratio):>8.3f}{max(ratio):>8.3f}{np.mean(np.array(ratio) <= 1.01):>11.0%}"
            f"{np.median([c.spent[-1] for c in own]):>8.0f}{np.median(reach):>10.2f}"
            f"{np.mean(np.isfinite(reach)):>9.0%}",
            flush=True,
        )


def fit_seconds(prepared: Prepared) -> tuple[float, float]:
    """Return seconds of an epoch of `model.fit` with validation, and of a new model's start."""
    data, split = prepared.objective.train, prepared.splits[0]
    x, y = data.x, data.y
    starts, epochs = [], []
    for _ in range(3):
        model = prepared.objective.build_model()
        model.optimizer = "adam"
        config = {"loss": model.loss, "metrics": None, "optimizer": "adam"}
        model.compile(**config)
        ends: list[float] = [time.perf_counter()]
        for _ in range(4):
            model.fit(
                x[split.train], y[split.train], validation_data=(x[split.validation], y[split.validation]),
                batch_size=prepared.engine.batch_size, verbose=0,
            )  # fmt: skip
            ends.append(time.perf_counter())
        seconds = np.diff(ends)
        epochs.append(float(np.median(seconds[1:])))
        starts.append(float(seconds[0]) - epochs[-1])
    return float(np.median(epochs)), float(np.median(starts))


def compare_time(task: str, seeds: int, peers: list[str]) -> None:
    """Print the seconds until the best peer's final value, ours on a fresh engine against its own."""
    ratios, ours_all, theirs_all = [], [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepared_task(folder, task)
            epoch, start = fit_seconds(prepared)
            courses = {name: PEERS[name](prepared, seed) for name in peers}
            value, name = min((course.best[-1], name) for name, course in courses.items())
            peer = courses[name]
            last = next(i for i, best in enumerate(peer.best) if best <= value)
            theirs = peer.spent[last] * epoch + (last + 1) * start
            began = time.time()
            fresh = prepared_task(folder, task, fresh=True)
            # Without a limit on trials: what counts here is the time until the value is reached.
            record = recorded(fresh, Variant({"engine.xla": "auto", "trials": 4 * TRIALS}), seed, **HOLD_OUT)
            took = time.time() - began
        seconds = np.cumsum([trial.seconds or 0.0 for trial in record.trials])
        before = took - float(seconds[-1])  # loading, tracing, range tests, storage: all of it before the first trial
        reached = [
            before + s for s, t in zip(seconds, record.trials, strict=True) if t.value is not None and t.value <= value
        ]
        ours = reached[0] if reached else float("inf")
        ratios.append(theirs / ours)
        ours_all.append(ours)
        theirs_all.append(theirs)
    print(
        f"{task}: {np.median(ratios):.1f} times less time ({np.median(ours_all):.1f} s against "
        f"{np.median(theirs_all):.1f} s of the best peer, at {epoch:.3f} s per epoch and {start:.2f} s per model); "
        f"by seed {', '.join(f'{ratio:.1f}' for ratio in ratios)}",
        flush=True,
    )


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("epochs", "time"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--variants", default=",".join([*VARIANTS, *PEERS]))
    parser.add_argument("--keep", help="folder of searches that were run before; more are added to it")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = list(dict.fromkeys(["default", *given.variants.split(",")]))
    for task in given.tasks.split(","):
        if given.what == "epochs":
            kept = Path(given.keep or tempfile.mkdtemp())
            kept.mkdir(parents=True, exist_ok=True)
            measure_epochs(task, given.seeds, chosen, kept)
            report_epochs(task, given.seeds, chosen, kept)
        else:
            compare_time(task, given.seeds, [name for name in PEERS if name in chosen])


if __name__ == "__main__":
    main()
