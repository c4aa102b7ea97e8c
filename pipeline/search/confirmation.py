"""The confirmation of a study: the finalists and the Keras default once more, on fresh seeds and splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import NoAnswerError
from pipeline.progress import Reporter
from pipeline.search.deadline import Deadline, TimeUp
from pipeline.search.prepare import Prepared, splits_of
from pipeline.search.space import BASELINE, Configuration
from pipeline.search.stored import best_epoch_of, configuration_of
from pipeline.search.trial import run_trial
from pipeline.study_file import ConfirmSection

if TYPE_CHECKING:
    from pipeline.search.workers import Pool


@dataclass(frozen=True)
class ConfirmTask:
    """One candidate on one fresh repeat.

    Attributes:
        trial: number of the candidate's trial.
        configuration: what it trains.
        best_epoch: epochs to train.
        repeat: counted from 0.
    """

    trial: int
    configuration: Configuration
    best_epoch: int
    repeat: int


CUT = "cut off"
"""Stands for the result of a run that the study's time did not allow."""


def confirm(study: optuna.Study, prepared: Prepared, reporter: Reporter, pool: Pool | None, deadline: Deadline) -> None:
    """Run the finalists and the default on fresh seeds; keep every repeat as soon as it is done.

    Args:
        study: the study, with its trials done.
        prepared: the same with its engine.
        reporter: told what happens.
        pool: workers to share the runs, or None.
        deadline: the time of the study; what it does not allow goes on at the next run.

    Raises:
        NoAnswerError: when no trial ran through.
    """
    settings, monitor = prepared.study.config.confirm, prepared.monitor
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if not complete and deadline.passed() and any(t.user_attrs.get("partial") for t in trials):
        return
    if not complete:
        raise NoAnswerError(
            f"{prepared.study.path}: no trial ran through: all of {len(trials)} diverged or failed. Look at "
            "'lrtune report'; scale the data, or lower search.learning_rate."
        )
    if not settings.finalists:
        return
    ranked = sorted(complete, key=lambda t: (float(monitor.cost(t.value)), t.number))
    distinct = {configuration_of(t): t for t in reversed(ranked)}  # of equal ones the best ranked stays
    finalists = [t for t in ranked if t in distinct.values() and configuration_of(t) != BASELINE]
    candidates = [t for t in complete if t.user_attrs.get("baseline")] + finalists[: settings.finalists]
    record = dict(study.user_attrs.get("confirm") or {})
    values: dict[str, list[list[float] | None]] = {k: list(v) for k, v in record.get("values", {}).items()}
    tasks = [
        ConfirmTask(t.number, configuration_of(t), best_epoch_of(t.user_attrs["curves"], monitor), repeat)
        for repeat in range(settings.repeats)
        for t in candidates
        if len(values.get(str(t.number), [])) <= repeat
    ]

    def keep() -> None:
        numbers = [t.number for t in candidates]
        study.set_user_attr("confirm", {"values": values, "candidates": numbers, "repeats": settings.repeats})

    keep()
    results = (confirm_once(prepared, task, deadline) for task in tasks) if pool is None else pool.confirm(tasks)
    with reporter.bar("confirm", len(tasks)) as bar:
        for done, (task, result) in enumerate(zip(tasks, results, strict=True), start=1):
            if result == CUT:
                reporter.stage("timeout", f"{done - 1} of {len(tasks)} runs of the confirmation are done")
                break
            values.setdefault(str(task.trial), []).append(result)
            bar.update(done, task.configuration.describe())
            keep()
    keep()


def confirm_once(prepared: Prepared, task: ConfirmTask, deadline: Deadline) -> list[float] | str | None:
    """Return the monitored value per fold of a fresh repeat at the task's epoch; None where it diverged, or `CUT`."""

    def on_epoch(fold: int, epoch: int, value: float) -> None:
        if deadline.passed():
            raise TimeUp

    if deadline.passed():
        return CUT
    try:
        outcome = run_trial(
            prepared.engine,
            task.configuration,
            splits_of(prepared.study, prepared.objective, repeat=task.repeat + 1),
            epochs=prepared.study.config.epochs,
            monitor=prepared.monitor,
            run_epochs=task.best_epoch,
            on_epoch=on_epoch,
        )
    except TimeUp:
        return CUT
    if outcome.diverged_at is not None:
        return None
    return [curve[task.best_epoch - 1] for curve in outcome.curves[prepared.monitor.name]]


def confirmation_seconds(trials: Sequence[FrozenTrial], settings: ConfirmSection) -> float:
    """Return about how long the confirmation will take, from the trials so far."""
    # The first trial's time is mostly tracing.
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.duration is not None and t.number > 0]
    if not done or not settings.finalists:
        return 0.0
    seconds = float(np.median([t.duration.total_seconds() for t in done if t.duration is not None]))
    return seconds * (settings.finalists + 1) * settings.repeats
