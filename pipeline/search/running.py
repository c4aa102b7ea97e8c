"""One trial of a study, from the moment it is taken: trained, watched, and told, or put back into the queue.

Whatever the model's code does, a trial ends in one of three ways: with its outcome, as failed with
the reason, or waiting again for whoever takes it next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.database import database_of, patience_of
from pipeline.errors import NoAnswerError
from pipeline.progress import Reporter
from pipeline.search.checkpoint import Checkpoint, Checkpoints
from pipeline.search.deadline import TimeUp
from pipeline.search.prepare import Prepared
from pipeline.search.pruning import FoldPruner, PastTrial, make_pruner
from pipeline.search.queue import Taken, TrialQueue
from pipeline.search.space import Configuration, widening_note
from pipeline.search.stored import SIGNIFICANT_DIGITS, past_trial
from pipeline.search.trial import Outcome, run_trial
from pipeline.storage import is_of_storage
from pipeline.user_code import describe_fault
from pipeline.words import duration

REPORT_SECONDS = 1.0
"""Intermediate values are written while a trial runs at most so often, in seconds."""

REPORTS_PER_TRIAL = 10
"""Intermediate values written per trial at most: each costs a commit."""

ALIKE = 3
"""So many different configurations with curves that are equal to the last bit end the study."""

HANGING_SECONDS = 10.0
"""How long, in seconds, a trial may overrun `trial_timeout` at least before its process is ended."""


class TrialTimeout(Exception):
    """A trial that took longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it took longer than trial_timeout = {duration(seconds)}")


class TrialRunner:
    """Runs the trials that a queue gives out, one after the other.

    Args:
        prepared: the study with its engine.
        reporter: told what happens.
        checkpoints: where a trial keeps how far it is.
        called_back: whether this process is to end, asked after every epoch.

    Attributes:
        on_hang: ends this process when a trial hangs; None where it cannot be ended.
        time_up: whether the study's time is up, asked after every epoch.
    """

    def __init__(
        self,
        prepared: Prepared,
        reporter: Reporter,
        checkpoints: Checkpoints,
        called_back: Callable[[optuna.Study], bool],
    ) -> None:
        self.prepared, self.config, self.reporter = prepared, prepared.study.config, reporter
        self.on_hang: Callable[[], object] | None = None
        self._checkpoints, self._called_back = checkpoints, called_back
        self._positions = (0.0, 1.0)
        self.time_up: Callable[[], bool] = lambda: False
        self._curves: dict[str, dict[str, int]] = {}
        self._facts: list[Any] = []
        self._past: dict[int, PastTrial] = {}

    def run(self, queue: TrialQueue, taken: Taken) -> None:
        """Train and tell.  An interruption puts the trial back into the queue."""
        try:
            if taken.space.positions != self._positions:
                self._positions = taken.space.positions
                self.reporter.stage("search", str(widening_note(self._positions)))
            self._train_and_tell(queue, taken, self._pruner(queue.seen, taken))
        except TimeUp as up:
            with queue.owned(taken) as still:
                if still:  # what it has come to is part of the answer until it goes on
                    taken.trial.set_user_attr("partial", _rounded(up.args[0]))
            queue.put_back(taken)
        except BaseException:
            with contextlib.suppress(Exception):
                queue.put_back(taken)
            raise
        finally:
            queue.release(taken)

    def _pruner(self, trials: Sequence[FrozenTrial], taken: Taken) -> FoldPruner:
        """Return the pruner of a trial, which knows the trials up to its horizon."""
        config, past = self.config, self._past
        for one in trials:
            if one.number not in past and one.state in (TrialState.COMPLETE, TrialState.PRUNED):
                past[one.number] = past_trial(one, self.prepared.monitor)
        pruner = make_pruner(
            config.pruning.pruner,
            config.pruning.percentile,
            epochs=config.epochs,
            folds=config.validation.fold_count,
            number=taken.trial.number,
        )
        for number in sorted(past):
            if number <= taken.horizon:
                pruner.record(past[number])
        return pruner

    def _train_and_tell(self, queue: TrialQueue, taken: Taken, pruner: FoldPruner) -> None:
        config, study, trial, configuration = self.config, queue.study, taken.trial, taken.configuration
        baseline = bool(trial.user_attrs.get("baseline"))
        checkpoint = self._checkpoint(queue, taken)
        limit = config.trial_timeout
        reports = report_epochs(config.epochs, config.validation.fold_count)
        values: dict[int, float] = {}
        live = [not taken.fresh]  # whether something of this trial is in the storage already
        said = time.monotonic()

        def report(step: int, value: float) -> None:
            """Write a value now where the last is a second old, else with the trial's end: each costs a commit."""
            nonlocal said
            values[step] = value
            if time.monotonic() - said > REPORT_SECONDS:
                _report(trial, value, step)
                said, live[0] = time.monotonic(), True

        def on_epoch(fold: int, epoch: int, value: float) -> None:
            if self._called_back(study):
                raise KeyboardInterrupt
            if limit is not None and checkpoint.seconds > limit:
                raise TrialTimeout(limit)
            if fold == 0 and epoch in reports:
                report(epoch, value)
            if self.time_up():
                raise TimeUp

        def on_fold(fold: int, score: float) -> None:
            if fold > 0 and config.validation.fold_count <= 2 * REPORTS_PER_TRIAL:
                report((fold + 1) * config.epochs - 1, score)

        try:
            with self._watchdog(queue, taken):
                outcome = run_trial(
                    self.prepared.engine,
                    configuration,
                    self.prepared.splits,
                    epochs=config.epochs,
                    monitor=self.prepared.monitor,
                    pruner=None if baseline else pruner,
                    on_epoch=on_epoch,
                    on_fold=on_fold,
                    checkpoint=checkpoint,
                )
        except TimeUp:
            raise
        except Exception as error:  # whatever the model's code raises: the trial failed, the study goes on
            if is_of_storage(error):
                raise  # the trial is not at fault: it goes back into the queue
            told = isinstance(error, TrialTimeout)
            self._fail(queue, taken, str(error) if told else describe_fault(error, self.prepared.objective.path))
            self._stop_after_failures(study)
            return
        kept: dict[str, Any] = {"progress": None} if checkpoint.is_shared else {}
        if "partial" in trial.user_attrs:
            kept["partial"] = None
        with queue.owned(taken) as still:
            if still and self._tell(study, taken, outcome, values, kept, fresh=not live[0] and not kept):
                self._checkpoints.remove(trial.number)
            else:
                self.reporter.stage("trials", f"trial {trial.number} was ended by another process meanwhile")
        self._stop_where_nothing_changes(trial.number, configuration, outcome)

    def _stop_where_nothing_changes(self, number: int, configuration: Configuration, outcome: Outcome) -> None:
        """End the study when different configurations give the same curves to the last bit.

        Raises:
            NoAnswerError: at the third of them.
        """
        losses = outcome.curves.get("loss")
        if outcome.diverged_at is not None or not losses:
            return
        digest = hashlib.blake2b(json.dumps(outcome.curves, sort_keys=True).encode(), digest_size=16).hexdigest()
        steps = len(losses[0]) * self.prepared.splits[0].steps_per_epoch(
            configuration.batch_size or self.prepared.engine.batch_size
        )
        trained = f"{configuration.spec}{configuration.rates(max(steps, 2)).tolist()}"
        alike = self._curves.setdefault(digest, {})
        alike.setdefault(trained, number)
        if len(alike) >= ALIKE:
            listed = ", ".join(map(str, sorted(alike.values())))
            raise NoAnswerError(
                f"{self.prepared.objective.where}: different configurations must give different curves, got the same "
                f"to the last bit from trials {listed}. What is searched does not reach the weights: the training step "
                "does not use self.optimizer, no gradient reaches a weight, or the rates are too low to move one."
            )

    def _fail(self, queue: TrialQueue, taken: Taken, fault: str) -> None:
        """Record a trial as failed, with what went wrong."""
        storage, trial_id = queue.study._storage, taken.trial._trial_id
        with queue.owned(taken) as still:
            if still:
                storage.set_trial_user_attr(trial_id, "error", fault)
                storage.set_trial_state_values(trial_id, TrialState.FAIL)
                self._checkpoints.remove(taken.trial.number)

    def _checkpoint(self, queue: TrialQueue, taken: Taken) -> Checkpoint:
        trial = taken.trial
        if not self._facts:
            attributes = queue.study.user_attrs
            self._facts = [attributes["definition"], attributes["about"]["versions"]]
            self._facts += [attributes.get("xla"), attributes.get("plain")]
        facts = [*self._facts, asdict(taken.configuration), bool(trial.user_attrs.get("baseline"))]

        def share(value: dict[str, Any]) -> None:
            trial.set_user_attr("progress", value)

        return Checkpoint(
            self._checkpoints,
            trial.number,
            facts,
            shared=trial.user_attrs.get("progress"),
            share=share if taken.owner else None,
        )

    @contextlib.contextmanager
    def _watchdog(self, queue: TrialQueue, taken: Taken) -> Iterator[None]:
        """End this process when a trial hangs: nothing else stops code that does not come back.

        The limit itself is looked at after every epoch; only a trial that goes on for another tenth of it,
        and ten seconds at least, is taken to hang.  Its processes are started again by whoever started them.
        """
        limit = self.config.trial_timeout
        on_hang = self.on_hang
        if limit is None or on_hang is None:
            yield
            return
        ended = threading.Event()

        def watch() -> None:
            if not ended.wait(limit + max(0.1 * limit, HANGING_SECONDS)):
                with contextlib.suppress(Exception):
                    self._fail(queue, taken, f"{TrialTimeout(limit)}, and hung")
                on_hang()

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _stop_after_failures(self, study: optuna.Study) -> None:
        """End the study when nothing but failures came of its first trials, or of many in a row."""
        trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
        last = trials[-5:]
        if len(last) == 5 and all(t.state == TrialState.FAIL for t in last):
            causes = [str(t.user_attrs.get("error")) for t in last]
            commonest = max(set(causes), key=causes.count)
            raise NoAnswerError(
                f"{self.prepared.objective.where}: five trials in a row failed, most of them with: {commonest}"
            )

    def _tell(
        self,
        study: optuna.Study,
        taken: Taken,
        outcome: Outcome,
        values: dict[int, float],
        further: dict[str, Any],
        *,
        fresh: bool,
    ) -> bool:
        """End a trial in one transaction: it is there with all its curves, or still to be run.

        Returns:
            Whether it was this process's to end: while the database was away another may have taken it.
        """
        at = outcome.diverged_at
        if at is not None:
            values[(at["fold"] - 1) * self.config.epochs + at["epoch"] - 1] = float("nan")
        attributes = {"diverged_at": at, **outcome.diagnosis(), "curves": _rounded(outcome.curves), **further}
        state = TrialState.PRUNED if outcome.pruned else TrialState.COMPLETE
        database, patience = database_of(study._storage), patience_of(study._storage)

        def end() -> bool:
            return database.end_trial(
                taken.trial._trial_id,
                state,
                outcome.value,
                attributes,
                values,
                fresh=fresh and not patience.waited,
                owner=taken.owner,
            )

        try:
            return bool(patience.call(end))
        except optuna.exceptions.UpdateFinishedTrialError:
            if not patience.waited:  # else the answer to a commit was lost, and the commit was made
                raise
            return True


def report_epochs(epochs: int, folds: int) -> set[int]:
    """Return the epochs of the first fold, counted from 0, whose values are written while a trial runs."""
    count = max(1, REPORTS_PER_TRIAL - (folds - 1) if folds <= REPORTS_PER_TRIAL // 2 else REPORTS_PER_TRIAL // 2)
    return {round(e) - 1 for e in np.linspace(1, epochs, min(count, epochs))} | {epochs - 1}


def _report(trial: optuna.Trial, value: float, step: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trial that runs again reports the same values again
        trial.report(value, step)


def _rounded(curves: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    return {
        name: [[float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in curve] for curve in folds]
        for name, folds in curves.items()
    }
