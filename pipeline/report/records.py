"""What the storage holds of a study, as plain records and data frames; needs no TensorFlow.

Everything that a person is told is derived here: the recommendation, its evidence and its doubts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import StorageError
from pipeline.search.intervals import Interval, judge
from pipeline.search.queue import positions_after
from pipeline.search.space import Configuration
from pipeline.search.stored import best_epoch_of, configuration_of
from pipeline.search.trial import RATE, Monitor
from pipeline.storage import check_layout, open_storage, storage_errors, without_password

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.study_file import Study

Curves = Mapping[str, list[list[float]]]


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it was stored.

    Attributes:
        number: its number; 0 is the Keras default.
        state: "complete", "pruned", "failed", "running" or "waiting".
        configuration: what it trained with, or None before that was drawn.
        value: monitored value at the best epoch of the mean over folds, or None.
        value_std: standard deviation over folds there, or None.
        best_epoch: that epoch, counted from 1, or None.
        verdict, overfit_epoch, diverged_at: the diagnosis, or None.
        curves: value per metric, fold and epoch.
        seconds: how long it took, or None.
        baseline: whether it is the Keras default.
        error: why it failed, or None.
        started: when it began, or None.
        source: why it was queued beforehand ("own", "range test", "sweep"), or None.
    """

    number: int
    state: str
    configuration: Configuration | None
    value: float | None
    value_std: float | None
    best_epoch: int | None
    verdict: str | None
    overfit_epoch: int | None
    diverged_at: Mapping[str, Any] | None
    curves: Curves
    seconds: float | None
    baseline: bool
    error: str | None
    started: datetime | None = None
    source: str | None = None

    @property
    def epochs_run(self) -> int:
        """Return the epochs it trained, all folds together."""
        return sum(len(curve) for curve in self.curves.get("loss", []))

    @property
    def outcome(self) -> str:
        """Return how it ended, for people: diverged trials are told from pruned ones."""
        return "diverged" if self.diverged_at else self.state

    def mean_curve(self, metric: str) -> np.ndarray:
        """Return the mean over folds per epoch; folds that were cut off do not count unless all were."""
        return self.mean_curve_of(self.curves.get(metric, []))

    @staticmethod
    def mean_curve_of(curves: Sequence[Any]) -> np.ndarray:
        """Return the mean of the longest curves per epoch."""
        if not curves:
            return np.empty(0)
        length = max(len(curve) for curve in curves)
        longest = np.asarray([curve for curve in curves if len(curve) == length], dtype=float)
        return np.asarray(longest.sum(axis=0) / len(longest))

    def mean_rates(self, epochs: int) -> list[float] | None:
        """Return the geometric mean over folds of each epoch's rate, for a scheme that reacted to the run."""
        rates = self.mean_curve_of([np.log(curve) for curve in self.curves.get(RATE, [])])
        return np.exp(rates[:epochs]).tolist() if len(rates) else None


@dataclass(frozen=True)
class StudyRecord:
    """A study as it was stored."""

    name: str
    about: Mapping[str, Any]
    definition: Mapping[str, Any]
    monitor: Monitor
    engine: str
    tests: Mapping[str, Mapping[str, Any]]
    trials: tuple[TrialRecord, ...]
    confirm: Mapping[str, Any] | None
    shown_url: str
    widened: tuple[float, float] | None = None
    stopped: str | None = None
    study_file: Mapping[str, Any] | None = None
    proof: Mapping[str, Any] | None = None

    @property
    def baseline(self) -> TrialRecord | None:
        """Return the trial of the Keras default, once it has run."""
        return next((t for t in self.trials if t.baseline and t.state in ("complete", "pruned")), None)

    @property
    def confirmed_repeats(self) -> int:
        """Return the repeats of the confirmation that every candidate has run."""
        confirm = self.confirm or {"candidates": [], "values": {}, "repeats": 0}
        done = [len(confirm["values"].get(str(number), [])) for number in confirm["candidates"]]
        return min([int(confirm["repeats"]), *done]) if done else 0

    def baseline_so_far(self) -> float | None:
        """Return the Keras default's best value over the epochs that it has run, or None."""
        default = next((trial for trial in self.trials if trial.baseline), None)
        return self.shown_value(default) if default is not None else None

    def ranked(self) -> list[TrialRecord]:
        """Return the trials that ran through, best first."""
        complete = [t for t in self.trials if t.state == "complete" and t.value is not None]
        return sorted(complete, key=lambda t: (float(self.monitor.cost(t.value)), t.number))

    def batch_size(self, configuration: Configuration) -> int:
        """Return the samples per step of a configuration."""
        return int(configuration.batch_size or self.about["batch_size"])

    @functools.cached_property
    def curve_names(self) -> tuple[str, ...]:
        """Return the names of all curves, in their order; looked up once, for there may be very many trials."""
        return tuple(dict.fromkeys(name for trial in self.trials for name in trial.curves))

    def shown_value(self, trial: TrialRecord) -> float | None:
        """Return a trial's value; of a pruned one, that of its best epoch over the folds that it finished."""
        curve = trial.mean_curve(self.monitor.name)
        if trial.value is not None or not len(curve):
            return trial.value
        best = float(curve[int(np.argmin(self.monitor.cost(curve)))])
        return best if math.isfinite(best) else None

    @property
    def one_split(self) -> bool:
        """Return whether every run is validated on the same samples, which the objective brings."""
        return self.definition.get("validation.scheme") == "given" or bool(self.about.get("dataset"))

    def count(self, outcome: str) -> int:
        """Return the number of trials that ended so."""
        return sum(t.outcome == outcome for t in self.trials)


FEWEST_RUNS = 3
"""From so many paired runs on an interval is shown."""

TWO_REPEATS = "two repeats can hardly tell anything"
"""What is said instead of it."""


@dataclass(frozen=True)
class Recommendation:
    """The answer of a study.

    Attributes:
        trial: the trial whose configuration is recommended.
        confirmed: whether value and improvement come from fresh seeds.
        value: mean of the monitored value.
        value_std: its standard deviation over folds and repeats, or None.
        baseline_value: the Keras default's mean in the same runs, or None where it diverged.
        improvement: how much better than the default, above zero is better, or None.
        tied_with: trials that cannot be told from the recommended one.
        fold_runs: number of paired runs behind the interval.
        one_split: whether these runs share their validation samples, so that the interval speaks of those alone.
    """

    trial: TrialRecord
    confirmed: bool
    value: float
    value_std: float | None
    baseline_value: float | None
    improvement: Interval | None
    tied_with: tuple[TrialRecord, ...]
    fold_runs: int
    one_split: bool

    @property
    def configuration(self) -> Configuration:
        """Return the recommended configuration."""
        assert self.trial.configuration is not None
        return self.trial.configuration

    @property
    def epochs(self) -> int:
        """Return the recommended number of epochs."""
        assert self.trial.best_epoch is not None
        return self.trial.best_epoch

    @property
    def tells(self) -> bool:
        """Return whether there are runs enough for an interval that says something."""
        return self.fold_runs >= FEWEST_RUNS

    @property
    def sameness(self) -> str | None:
        """Say what a spread of zero means, where every run gave the same difference or the same value."""
        gain = self.improvement
        if not self.tells or (self.value_std != 0 and (gain is None or self.trial.baseline or gain.low < gain.high)):
            return None
        return (
            "Every repeat gave the same: the weights, the samples and their order in a batch are fixed, so that "
            "repeats tell nothing of chance"
        )

    @property
    def headline(self) -> str:
        """Say in a few words how the answer compares with the Keras default."""
        if self.trial.state != "complete":
            return "the best so far, since no trial has run through"
        if self.trial.baseline:
            return "the Keras default itself: nothing that was tried is better"
        if self.improvement is None:
            return (
                "the Keras default diverged" if self.baseline_value is None else "not compared with the Keras default"
            )
        if self.fold_runs < 2:
            return "not compared with the Keras default by more than one run"
        if not self.tells:
            return f"{'ahead of' if self.improvement.mean > 0 else 'behind'} the Keras default, but {TWO_REPEATS}"
        if self.improvement.low > 0:
            return "better than the Keras default"
        return "not distinguishable from the Keras default"


def load_record(study: Study) -> StudyRecord:
    """Read a study from its storage.

    Raises:
        StorageError: when the storage cannot be read or holds no such study.
    """
    url = study.storage_url
    storage = open_storage(url, create=False)
    with storage_errors(url):
        if study.name not in optuna.get_all_study_names(storage):
            raise StorageError(
                f"{study.path}: the storage {without_password(url)} holds no study named '{study.name}'. "
                f"Run 'lrtune tune {study.path}' first."
            )
        stored = optuna.load_study(study_name=study.name, storage=storage)
        attributes, trials = stored.user_attrs, stored.get_trials(deepcopy=False)
    if "definition" not in attributes:
        raise StorageError(
            f"{study.path}: the study in storage was not set up whole. Run 'lrtune tune {study.path}' again."
        )
    check_layout(study.path, attributes.get("layout"))
    monitor = Monitor(attributes["about"]["monitor"], attributes["about"]["mode"])
    return StudyRecord(
        name=study.name,
        about=attributes["about"],
        definition=attributes["definition"],
        monitor=monitor,
        engine="; ".join(filter(None, (attributes.get("engine"), attributes.get("workers", {}).get("reason")))),
        tests=attributes["range_test"],
        trials=tuple(_trial_record(trial, monitor) for trial in trials),
        confirm=attributes.get("confirm"),
        widened=positions_after(trials, 1.0 if monitor.mode == "min" else -1.0) if attributes.get("widens") else None,
        shown_url=without_password(url),
        stopped=_stopped(attributes.get("stopped"), len(trials)),
        study_file=attributes.get("study_file"),
        proof=attributes.get("proof"),
    )


def _stopped(stop: Mapping[str, Any] | None, trials: int) -> str | None:
    """Return how the stop rule ended the search; nothing once more trials have been added."""
    return str(stop["rule"]) if stop and stop["trials"] == trials else None


_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def _trial_record(trial: FrozenTrial, monitor: Monitor) -> TrialRecord:
    attributes = trial.user_attrs
    curves = attributes.get("curves") or attributes.get("partial") or {}
    value = best_epoch = value_std = None
    if trial.state == TrialState.COMPLETE:
        value, best_epoch = trial.value, best_epoch_of(curves, monitor)
        per_fold = [curve[best_epoch - 1] for curve in curves[monitor.name]]
        value_std = float(np.std(per_fold, ddof=1)) if len(per_fold) > 1 else None
    return TrialRecord(
        number=trial.number,
        state=_STATES[trial.state],
        configuration=configuration_of(trial) if "learning_rate" in attributes else None,
        value=value,
        value_std=value_std,
        best_epoch=best_epoch,
        verdict=attributes.get("verdict"),
        overfit_epoch=attributes.get("overfit_epoch"),
        diverged_at=attributes.get("diverged_at"),
        curves=curves,
        seconds=trial.duration.total_seconds() if trial.duration is not None else None,
        baseline=bool(attributes.get("baseline")),
        error=attributes.get("error"),
        started=trial.datetime_start,
        source=attributes.get("source"),
    )


def recommend(record: StudyRecord) -> Recommendation | None:
    """Return the answer: by confirmation on fresh seeds where there is one, else the best trial.

    Returns:
        None when no trial ran through.
    """
    ranked = record.ranked()
    if not ranked:
        return _from_what_there_is(record)
    by_number = {trial.number: trial for trial in record.trials}
    # Repeats on validation data of the user's own share their samples: they differ by their seeds alone.
    sizes = record.about["fold_sizes"]
    ratio = 0.0 if record.one_split else float(np.mean([held / trained for trained, held in sizes]))
    baseline = record.baseline
    baseline_number = baseline.number if baseline is not None else -1
    costs = _confirmed_costs(record)
    confirmed = bool(costs)
    if not costs:
        # Unconfirmed: the best trial and the default, paired over the folds of the study itself.
        chosen = [ranked[0]] + ([baseline] if baseline in ranked and baseline is not ranked[0] else [])
        costs = {
            t.number: [
                float(record.monitor.cost(curve[(t.best_epoch or 1) - 1])) for curve in t.curves[record.monitor.name]
            ]
            for t in chosen
            if t is not None
        }
    sound = {key: values for key, values in costs.items() if all(math.isfinite(v) for v in values)}
    if not sound:
        return None
    verdict = judge(costs, baseline_number, ratio)
    runs = np.asarray(sound[verdict.winner])
    back = 1.0 if record.monitor.mode == "min" else -1.0
    return Recommendation(
        trial=by_number[verdict.winner],
        confirmed=confirmed,
        value=float(back * runs.mean()),
        value_std=float(runs.std(ddof=1)) if len(runs) > 1 else None,
        baseline_value=float(back * np.mean(sound[baseline_number])) if baseline_number in sound else None,
        improvement=verdict.improvement,
        tied_with=tuple(by_number[number] for number in verdict.tied_with),
        fold_runs=len(runs),
        one_split=record.one_split,
    )


def _from_what_there_is(record: StudyRecord) -> Recommendation | None:
    """Return the best of trials that were cut off, by the epochs that they finished; None where there are none."""
    found = []
    for trial in record.trials:
        curve = trial.mean_curve(record.monitor.name)
        costs = record.monitor.cost(curve)
        if trial.diverged_at is None and trial.configuration is not None and np.isfinite(costs).any():
            best = int(np.argmin(costs))
            found.append(
                (float(costs[best]), trial.number, replace(trial, best_epoch=best + 1, value=float(curve[best])))
            )
    if not found:
        return None
    _, _, trial = min(found, key=lambda one: one[:2])
    default = record.baseline_so_far()
    return Recommendation(
        trial=trial,
        confirmed=False,
        value=float(trial.value or 0.0),
        value_std=None,
        baseline_value=default,
        improvement=None,
        tied_with=(),
        fold_runs=1,
        one_split=record.one_split,
    )


def _confirmed_costs(record: StudyRecord) -> dict[int, list[float]]:
    """Return the costs of the confirmation's candidates, infinite where one diverged; empty before it is whole."""
    if not record.confirm:
        return {}
    best = next((trial for trial in record.ranked() if not trial.baseline), None)
    if best is not None and best.number not in record.confirm["candidates"]:
        return {}  # trials that came later were not confirmed
    repeats = record.confirmed_repeats
    costs: dict[int, list[float]] = {}
    for number in record.confirm["candidates"] if repeats else ():
        runs = record.confirm["values"].get(str(number), [])
        costs[number] = [
            float(cost) for run in runs[:repeats] for cost in (record.monitor.cost(run) if run else [math.inf])
        ]
    longest = max((len(values) for values in costs.values()), default=0)
    return {number: values if len(values) == longest else [math.inf] for number, values in costs.items()}


TRIAL_COLUMNS = (
    "number", "state", "optimizer", "learning_rate", "decay", "final_fraction", "warmup_fraction", "momentum",
    "weight_decay", "clipnorm", "batch_size", "value", "value_std",
    "best_epoch", "verdict", "overfit_epoch", "diverged_at", "folds_run", "epochs_run", "seconds", "baseline", "error",
)  # fmt: skip
"""Columns of trials.csv."""


def trials_frame(record: StudyRecord) -> pd.DataFrame:
    """Return a row per trial."""
    import pandas as pd

    rows = []
    for trial in record.trials:
        c = trial.configuration
        rows.append(
            {
                "number": trial.number,
                "state": trial.state,
                "optimizer": c.optimizer if c else None,
                "learning_rate": c.learning_rate if c else None,
                "decay": c.decay if c else None,
                "final_fraction": c.final_fraction if c else None,
                "warmup_fraction": c.warmup_fraction if c else None,
                "momentum": c.spec.settings.get("momentum") if c else None,
                "weight_decay": c.spec.settings.get("weight_decay") if c else None,
                "clipnorm": c.clipnorm if c else None,
                "batch_size": record.batch_size(c) if c else None,
                "value": trial.value,
                "value_std": trial.value_std,
                "best_epoch": trial.best_epoch,
                "verdict": trial.verdict,
                "overfit_epoch": trial.overfit_epoch,
                "diverged_at": describe_divergence(trial.diverged_at),
                "folds_run": len(trial.curves.get("loss", [])),
                "epochs_run": trial.epochs_run,
                "seconds": trial.seconds,
                "baseline": trial.baseline,
                "error": trial.error,
            }
        )
    frame = pd.DataFrame(rows, columns=TRIAL_COLUMNS)
    for column in ("best_epoch", "overfit_epoch", "batch_size"):
        frame[column] = frame[column].astype("Int64")
    return frame


def describe_divergence(at: Mapping[str, Any] | None) -> str | None:
    """Return where and why a trial diverged, for people.

    >>> describe_divergence({"fold": 1, "epoch": 2, "step": 7, "reason": "loss not finite"})
    'fold 1, epoch 2, step 7: loss not finite'
    """
    return f"fold {at['fold']}, epoch {at['epoch']}, step {at['step']}: {at['reason']}" if at else None


def curves_frame(record: StudyRecord) -> pd.DataFrame:
    """Return a row per trial, fold and epoch: the rate at the epoch's first step, and every metric."""
    import pandas as pd

    epochs, keys = record.about["epochs"], ("trial", "fold", "epoch", "learning_rate")
    # By columns, each a list: a row of its own per epoch is slow where there are a million.
    columns: dict[str, list[Any]] = {name: [] for name in keys}
    names = [name for name in record.curve_names if name not in keys[:3]]
    columns |= {name: [] for name in names if name not in keys}
    for trial in record.trials:
        c = trial.configuration
        if c is None:
            continue
        for fold, losses in enumerate(trial.curves.get("loss", [])):
            steps = -(-record.about["fold_sizes"][fold][0] // record.batch_size(c))
            count = len(losses)
            if not count:
                continue
            columns["trial"] += [trial.number] * count
            columns["fold"] += [fold + 1] * count
            columns["epoch"] += range(1, count + 1)
            columns["learning_rate"] += c.rates(epochs * steps)[::steps][:count].tolist()
            for name in names:
                if name != "learning_rate":
                    folds = trial.curves.get(name)
                    columns[name] += folds[fold] if folds else [math.nan] * count
                elif name in trial.curves:  # a scheme that reacted to the run keeps its own rates
                    columns[name][-count:] = trial.curves[name][fold]
    return pd.DataFrame(columns)


def range_test_frame(tests: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per optimizer and step of range tests as they are stored."""
    import pandas as pd

    rows = [
        {"optimizer": name, "step": step, "learning_rate": rate, "loss": loss, "smoothed": smoothed}
        for name, test in tests.items()
        for step, (rate, loss, smoothed) in enumerate(
            zip(test["rates"], test["losses"], test["smoothed"], strict=True), start=1
        )
    ]
    return pd.DataFrame(rows, columns=["optimizer", "step", "learning_rate", "loss", "smoothed"])


def bounds_frame(tests: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per optimizer: the bounds that range tests gave and how they ended."""
    import pandas as pd

    rows = [
        {"optimizer": name, **{key: test[key] for key in ("low", "suggested", "high", "status")}}
        for name, test in tests.items()
    ]
    return pd.DataFrame(rows, columns=["optimizer", "low", "suggested", "high", "status"])
