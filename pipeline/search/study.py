"""A whole study: range tests, trials, confirmation, all kept in the storage so that it resumes.

Every step writes what it found before the next begins.  Running a study again reads what is
there and adds only what is missing: trials that a dead process left running go back into the
queue with their parameters, under their own number.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.database import patience_of
from pipeline.errors import KnownError, StorageError
from pipeline.progress import Reporter, sparkline
from pipeline.search.checkpoint import Checkpoints
from pipeline.search.confirmation import confirm, confirmation_seconds
from pipeline.search.deadline import ENDLESS, Deadline
from pipeline.search.definition import about, check_same, definition_of
from pipeline.search.prepare import Prepared, range_tests, training_failed
from pipeline.search.pruning import pruning_note
from pipeline.search.queue import CALLED_BACK, DISTANCE, WIDENING, SeenStudy, TrialQueue
from pipeline.search.range_test import RangeTest
from pipeline.search.running import TrialRunner
from pipeline.search.soundness import Proof, agree, prove
from pipeline.search.space import Space, space_of, space_size
from pipeline.search.stopping import StopRule
from pipeline.search.stored import configuration_of
from pipeline.storage import (
    LAYOUT,
    locks_of,
    open_storage,
    sqlite_path,
    storage_errors,
    without_password,
)
from pipeline.study_file import SearchSection, Study, cores, given_keys
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.words import counted, duration

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

    from pipeline.search.workers import Pool

PAUSE = 0.02
"""How long a worker that must wait for earlier trials waits before it asks again, in seconds."""

LONGEST_PAUSE = 0.5
"""The same for many workers of one server, which ask less and less often."""


ASKING_SECONDS = 2.0
"""How often, in seconds, a worker of a cluster asks the storage whether it has been called back."""


class StudyRunner:
    """Runs or resumes a study in its storage.

    Args:
        prepared: the study with its engine.
        reporter: told what happens.
        parent: in a worker, the process that started it; a trial is not begun after its end.
        token: in a worker of a cluster, what tells its pool from others; the storage says when to stop.

    Attributes:
        trials: runs one trial after the other.
    """

    def __init__(
        self, prepared: Prepared, reporter: Reporter, parent: int | None = None, token: str | None = None
    ) -> None:
        self.parent, self.token = parent, token
        self._asked = time.monotonic()
        self.prepared = prepared
        self.reporter = reporter
        self.study = prepared.study
        self.config = prepared.study.config
        self.url = self.study.storage_url
        self.deadline = ENDLESS
        self._checkpoints = Checkpoints(
            self.study.output / "checkpoints",
            minutes=self.config.checkpoint.minutes,
            disk=self.config.checkpoint.disk * 2**20,
            on_full=lambda text: self.reporter.stage("checkpoint", text),
        )
        self.trials = TrialRunner(prepared, reporter, self._checkpoints, self._orphaned)
        if parent is not None:
            self.trials.on_hang = lambda: os._exit(1)

    def run(self, *, fresh: bool = False) -> None:
        """Bring the study to the number of trials its file asks for, and confirm the best.

        Args:
            fresh: throw away the trials of an earlier run first.

        Raises:
            KnownError: when it cannot be resumed, with the differences and the way out.
        """
        existing = self._find()
        self._set_deadline([] if existing is None or fresh else existing.get_trials(deepcopy=False))
        tests: dict[str, RangeTest] = {}
        if existing is None or fresh or "definition" not in existing.user_attrs:
            proof = self._prove()
            decision = self._choose_engine(existing)
            if self.prepared.engine.xla:
                proof = self._agreed(proof, agree(self.prepared, proof.reference))
            proven = proof.as_dict()
            del proof  # it holds copies of the weights
            decision = self.prepared.engine.fallback or decision
            if self._searches_rates():
                tests = range_tests(self.prepared, self.reporter, self.deadline)
                if self.prepared.engine.fallback not in (None, decision):
                    decision = str(self.prepared.engine.fallback)
                    self.reporter.stage("engine", decision)
                for test in tests.values():
                    self.reporter.stage("range test", describe_test(test))
            # Only now: a study that cannot begin must not cost the one that is there.
            if existing is not None and fresh:
                self._delete(existing)
            study = self._create(tests, decision, proven)
        else:
            check_same(self.prepared, self.reporter, existing)
            study = existing
            self._restore_engine(study)
            if "proof" not in study.user_attrs:  # begun by a version that did not test itself
                study.set_user_attr("proof", self._prove().as_dict())
            asked = self.config.workers.at_once
            if asked not in ("auto", study.user_attrs.get("distance", 1)):
                study.set_user_attr("distance", asked)
                self.reporter.stage("workers", f"up to {asked} trials at once from now on")
            if study.user_attrs.get("study_file") != given_keys(self.config):
                study.set_user_attr("study_file", given_keys(self.config))  # workers that join by name read it
                options = list(self.study.options)
                study.set_user_attr("about", {**study.user_attrs["about"], "options": options})
            self.reporter.stage("resume", f"{self._finished(study)} of {self.config.trials} trials are there")
        with storage_errors(self.url), self.locks.mark("live") as mark, contextlib.ExitStack() as kept:
            mark.share()
            queue = self._queue(study)
            self._resume(queue)
            self._checkpoints.tidy(t.number for t in study.get_trials(deepcopy=False) if not t.state.is_finished())
            self._enqueue(study, queue.space)
            note = pruning_note(
                self.config.pruning.pruner, epochs=self.config.epochs, folds=self.config.validation.fold_count
            )
            if note:
                self.reporter.stage("pruning", note)
            pool = self._choose_workers(study)
            try:
                if pool is not None:
                    kept.enter_context(pool.kept())
                if pool is None:
                    self.search(queue)
                else:
                    pool.until = self.deadline.until
                    pool.on_death = lambda: self._resume(queue)
                    pool.finished = lambda: self._finished(study)
                    with self._watched(study, queue):
                        pool.search()
                    left = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
                    if left and not self.deadline.passed():
                        self.search(queue)  # what a worker that died has left
            except BaseException:
                # Wherever the interruption struck, no trial of this process is left running.
                with contextlib.suppress(Exception):
                    if pool is not None:
                        pool.call_back(study)
                    kept.close()  # a cluster of our own ends first: what it ran is nobody's then
                    queue.take_back_orphans(died=False)
                raise
            self._say_trials(study)
            with self.locks.exclusively("confirm", slow=True):
                confirm(study, self.prepared, self.reporter, pool, self.deadline)

    def _set_deadline(self, trials: Sequence[FrozenTrial]) -> None:
        """Begin to count the study's time: from the start of the command, what trials took before included."""
        seconds = self.config.timeout
        if seconds is not None:
            begun = time.time() - (time.monotonic() - self.reporter.started)
            self.deadline = Deadline(seconds, begun + seconds - seconds_worked(trials))

    def _prove(self) -> Proof:
        """Test the study on its own model and data, and say what came of it."""
        proof = prove(self.prepared)
        for doubt in proof.doubts:
            self.reporter.stage("doubt", doubt)
        for note in proof.notes:
            self.reporter.stage("engine", note)
        return proof

    def _agreed(self, proof: Proof, notes: Sequence[str]) -> Proof:
        """Return a proof with what came of the compiled form of the engine."""
        for note in notes:
            self.reporter.stage("engine", note)
        known = dict.fromkeys((*proof.notes, *notes))
        return replace(proof, notes=tuple(known), way=self.prepared.engine.way)

    def join(self) -> None:
        """Run trials of a study that another process has set up, until there are none left.

        Raises:
            KnownError: when there is no such study, or it was begun under another definition.
        """
        study = self._find()
        if study is None or "definition" not in study.user_attrs:
            raise KnownError(
                f"{self.study.path}: the storage {without_password(self.url)} holds no study '{self.study.name}' yet. "
                f"Run 'lrtune tune {self.study.path}' first."
            )
        check_same(self.prepared, self.reporter, study)
        self._restore_engine(study)
        with storage_errors(self.url), self.locks.mark("live") as mark:
            mark.share()
            self.search(self._queue(study))

    def _queue(self, study: SeenStudy) -> TrialQueue:
        return TrialQueue(
            study,
            self._space(study),
            self.locks,
            distance=int(study.user_attrs.get("distance", 1)),
            sampler=self.config.sampler.name,
            seed=self.config.seed,
            heartbeat=self.config.storage.heartbeat,
            rule=self._stop_rule(study),
        )

    def _stop_rule(self, study: SeenStudy) -> StopRule | None:
        """Return the rule of the study file; a sweep runs all of its rates."""
        settings = self.config.stop
        if settings.patience is None or not math.isinf(self._space(study).size):
            return None
        own = _own_parameters(study, self._space(study)) is not None
        queued = 1 + own + len(study.user_attrs["range_test"])
        return StopRule(settings.patience, settings.gain, queued, int(study.user_attrs.get("distance", 1)))

    def _resume(self, queue: TrialQueue) -> None:
        orphans = queue.take_back_orphans()
        if orphans:
            numbers = ", ".join(map(str, orphans))
            self.reporter.stage("resume", f"trial {numbers} was cut off and runs again")

    def _delete(self, study: optuna.Study) -> None:
        with self.locks.mark("live") as mark:
            if not mark.alone or self._works_elsewhere(study):
                raise KnownError(f"{self.study.path}: another process works on this study. End it before --fresh.")
            with storage_errors(self.url):
                optuna.delete_study(study_name=self.study.name, storage=study._storage)

    def _works_elsewhere(self, study: optuna.Study) -> bool:
        """Return whether another machine has spoken for a trial of the study lately."""
        if self.locks.machine is None:
            return False
        storage: Any = study._storage
        stale = storage._get_stale_trial_ids(study._study_id)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return any("owner" in trial.user_attrs and trial._trial_id not in stale for trial in running)

    # -- opening ----------------------------------------------------------------------------

    def _open(self) -> RDBStorage:
        settings = self.config.storage
        storage = open_storage(self.url, create=True, heartbeat=settings.heartbeat, patience=settings.patience)
        patience = patience_of(storage)
        patience.on_wait = lambda text: self.reporter.stage("storage", text)
        self.locks = locks_of(self.url, self.study.path.resolve().parent, self.study.name, patience.call)
        return storage

    def _find(self) -> SeenStudy | None:
        """Return the study of that name, or None; makes no database."""
        path = sqlite_path(self.url)
        if path is not None and "mode=" not in self.url and not path.exists():
            return None
        storage = self._open()
        with storage_errors(self.url):
            if self.study.name not in optuna.get_all_study_names(storage):
                return None
            return SeenStudy(self.study.name, storage)

    def _searches_rates(self) -> bool:
        return self.config.search.learning_rate is None

    def _restore_engine(self, study: optuna.Study) -> None:
        """Train as the study has trained before."""
        way = dict((study.user_attrs.get("proof") or {}).get("way", {}))
        compiled = {"xla": bool(study.user_attrs.get("xla")), "plain": study.user_attrs.get("plain", ())}
        self.prepared.engine.go_on({**way, **compiled})

    def _choose_engine(self, before: optuna.Study | None) -> str:
        """Turn XLA on or off for the study, by its key or by measurement.

        A study that starts over on the same model keeps its decision: the two ways of training
        differ in the last digit, and the same study with the same seed must give the same trials.
        """
        engine, config = self.prepared.engine, self.config
        if config.engine.xla == "auto" and before is not None:
            model = before.user_attrs.get("definition", {}).get("model")
            if model == self.prepared.objective.model_digest and "xla" in before.user_attrs:
                self._restore_engine(before)
                return str(before.user_attrs.get("engine"))
        if config.engine.xla != "auto":
            engine.xla = bool(config.engine.xla)
            return f"{'XLA' if engine.xla else 'plain graph'} (set in the study file)"
        optimizers = config.search.optimizers
        try:
            decision = engine.calibrate(
                optimizers[-1],
                self.prepared.splits[0],
                epochs=self._epochs_ahead(),
                programs=programs_of(config.search),
            )
            slow = engine.leave_plain(optimizers, self.prepared.splits[0])
        except Exception as error:  # the first step of training: whatever the model's code raises
            raise training_failed(self.prepared, optimizers[-1], error) from error
        decision = f"{decision}; {slow}" if slow else decision
        self.reporter.stage("engine", decision)
        return decision

    def _create(self, tests: dict[str, RangeTest], decision: str, proof: dict[str, Any]) -> SeenStudy:
        storage = self._open()
        prepared = self.prepared
        with storage_errors(self.url):
            optuna.create_study(
                study_name=self.study.name,
                storage=storage,
                direction="minimize" if prepared.monitor.mode == "min" else "maximize",
                load_if_exists=True,
            )
            study = SeenStudy(self.study.name, storage)
            if study.trials and "definition" not in study.user_attrs:
                raise StorageError(
                    f"{self.study.path}: the storage {without_password(self.url)} already holds a study named "
                    f"'{self.study.name}' that lrtune did not make. Rename the study file, or change storage.url."
                )
            study.set_user_attr("layout", LAYOUT)
            study.set_user_attr("about", about(self.prepared))
            study.set_user_attr("range_test", {name: test.as_record() for name, test in tests.items()})
            study.set_user_attr("engine", decision)
            study.set_user_attr("proof", proof)
            study.set_user_attr("xla", prepared.engine.xla)
            study.set_user_attr("plain", sorted(prepared.engine.plain))
            study.set_user_attr("metric", prepared.monitor.name)
            study.set_user_attr("widens", self.config.sampler.name in WIDENING and self._searches_rates())
            study.set_user_attr("distance", at_once(self.study))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([prepared.monitor.name])
            study.set_user_attr("study_file", given_keys(self.config))
            # Last: its presence says that the study was set up whole.
            study.set_user_attr("definition", definition_of(self.prepared))
        return study

    # -- searching --------------------------------------------------------------------------

    def _space(self, study: optuna.Study) -> Space:
        return space_of(self.config, study.user_attrs["range_test"])

    def _enqueue(self, study: optuna.Study, space: Space) -> None:
        """Queue the Keras default, the model's own optimizer, the range tests' suggestions and a sweep's rates.

        Each has its place in the plan as its trial number, so that a crash in between, or trials
        added later, queue just what is missing.
        """
        plan: list[tuple[dict[str, Any], dict[str, Any]]] = [(space.baseline_parameters(), {"baseline": True})]
        own = _own_parameters(study, space)
        if own is not None:
            plan.append((own, {"source": "own"}))
        for name, test in study.user_attrs["range_test"].items():
            plan.append((space.suggestion_parameters(name, test["suggested"]), {"source": "range test"}))
        plan += [(parameters, {"source": "sweep"}) for parameters in space.sweep()]
        with self.locks.exclusively("queue"):
            there = len(study.get_trials(deepcopy=False))
            for parameters, attributes in plan[there : self.config.trials]:
                study.enqueue_trial(parameters, user_attrs=attributes)

    def _finished(self, study: optuna.Study) -> int:
        return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))

    def search(self, queue: TrialQueue) -> None:
        """Run trials until none is left, by whichever process, or the time is used up."""
        study, config = queue.study, self.config
        wanted = self._total(queue.space)
        queue.seen = study.get_trials(deepcopy=False)
        checked, pause = 0.0, PAUSE
        with self.reporter.bar("trials", wanted, self._finished(study)) as bar:
            while True:
                finished = sum(trial.state.is_finished() for trial in queue.seen)
                reserved = min(confirmation_seconds(queue.seen, config.confirm), self.deadline.seconds / 2)
                # Something there must be to answer from: at least an epoch of the first trial.
                if self.deadline.passed(reserved) and any(t.state.is_finished() or _has_begun(t) for t in queue.seen):
                    self.reporter.stage(
                        "timeout", f"{duration(self.deadline.seconds)} are used up after {counted(finished, 'trial')}"
                    )
                    break
                self.trials.time_up = lambda: self.deadline.passed(reserved)  # noqa: B023
                if self._orphaned(study):
                    break
                taken = queue.take(wanted)
                trials = queue.seen
                finished = sum(trial.state.is_finished() for trial in trials)
                bar.update(finished, lambda: self._note(study, trials))  # noqa: B023
                if taken is None:
                    total = queue.limit(trials, wanted)
                    if finished == len(trials) >= total:
                        if total < wanted:
                            self.reporter.stage("stop", self._say_stop(study, finished))
                        break
                    # earlier trials still run, here or elsewhere
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE if queue.locks.machine else PAUSE)
                    if time.monotonic() - checked > 1.0:
                        checked = time.monotonic()
                        queue.take_back_orphans()
                    continue
                pause = PAUSE
                self.trials.run(queue, taken)

    def restore(self) -> None:
        """Train as the study does, in a worker that has not run a trial of it."""
        study = self._find()
        if study is not None:
            self._restore_engine(study)

    def _say_stop(self, study: optuna.Study, finished: int) -> str:
        settings = self.config.stop
        said = (
            f"after {finished} of {self.config.trials} trials: {settings.patience} in a row were not better than the "
            f"best by more than {100 * settings.gain:g}%"
        )
        study.set_user_attr("stopped", {"trials": finished, "rule": said})
        return said

    def _orphaned(self, study: optuna.Study) -> bool:
        """Return whether the process that started this worker is gone, or has called its workers back."""
        if self.token is not None and self.parent is None and time.monotonic() - self._asked > ASKING_SECONDS:
            self._asked = time.monotonic()
            return bool(study.user_attrs.get(CALLED_BACK) == self.token)
        return self.parent is not None and os.getppid() != self.parent

    def _total(self, space: Space) -> int:
        return int(min(self.config.trials, space.size))

    def _say_trials(self, study: optuna.Study) -> None:
        trials = study.get_trials(deepcopy=False)
        states = {state: sum(t.state == state for t in trials) for state in TrialState}
        diverged = sum(bool(t.user_attrs.get("diverged_at")) for t in trials)
        self.reporter.stage(
            "trials",
            f"{self._finished(study)} done: {states[TrialState.COMPLETE]} ran through, "
            f"{states[TrialState.PRUNED] - diverged} pruned, {diverged} diverged"
            + (f", {states[TrialState.FAIL]} failed" if states[TrialState.FAIL] else ""),
        )

    def _choose_workers(self, study: SeenStudy) -> Pool | None:
        """Return the worker processes that train the study, or None when this process does it alone.

        A count that the study file does not set is decided by measurement, once for the study.
        """
        from pipeline.search.workers import Pool, cluster_size, decide

        config, space = self.config, self._space(study)
        left = self._total(space) - self._finished(study)
        # A trial that hangs can only be ended with its process, so there must be one beside this one.
        alone = None
        if config.trial_timeout is not None and not self.prepared.inline and left > 0:
            alone = Pool(self.study, 1, cores() if config.workers.threads == "auto" else int(config.workers.threads))
        if config.workers.backend != "loky":
            count = cluster_size(self.study) if config.workers.count == "auto" else int(config.workers.count)
            self.reporter.stage("workers", f"{count} through {config.workers.backend}")
            threads = 1 if config.workers.threads == "auto" else int(config.workers.threads)
            return Pool(self.study, count, threads) if left > 0 else None
        if config.workers.count != "auto":
            count = min(int(config.workers.count), max(left, 1))
            if config.workers.count == 1:
                return alone
            return Pool(self.study, count, config.workers.threads_each)
        choice = study.user_attrs.get("workers")
        if choice is None:
            choice, pool = decide(self, self._epochs_ahead(), self.deadline)
            study.set_user_attr("workers", choice)
            self.reporter.stage("workers", choice["reason"])
            return pool or alone
        return Pool(self.study, choice["count"], 1) if choice["count"] > 1 and left > 1 else alone

    def _epochs_ahead(self) -> int:
        """Return about how many epochs the study will train, confirmation included."""
        config = self.config
        folds = config.validation.fold_count
        trials = min(config.trials, space_size(config.search))
        # A median rule lets about two thirds of the epochs run.
        ahead = round(0.7 * trials * folds * config.epochs)
        if config.confirm.finalists:
            ahead += (config.confirm.finalists + 1) * config.confirm.repeats * folds * config.epochs
        return ahead

    @contextlib.contextmanager
    def _watched(self, study: SeenStudy, queue: TrialQueue) -> Iterator[None]:
        """Show the progress of all workers, read from the storage, while they work."""
        ended = threading.Event()
        total = self._total(queue.space)

        def watch() -> None:
            with self.reporter.bar("trials", total, self._finished(study)) as bar:
                while not ended.wait(0.5):
                    trials = study.get_trials(deepcopy=False)
                    bar.update(sum(t.state.is_finished() for t in trials), self._note(study, trials))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _note(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> str:
        complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
        if not complete:
            return ""
        best = min(complete, key=lambda t: float(self.prepared.monitor.cost(t.value)))
        diverged = sum(bool(t.user_attrs.get("diverged_at")) for t in trials)
        pruned = sum(t.state == TrialState.PRUNED for t in trials) - diverged
        ended = "".join(f", {count} {what}" for count, what in ((pruned, "pruned"), (diverged, "diverged")) if count)
        return f"best {self.prepared.monitor.label} {best.value:.4g}: {configuration_of(best).describe()}{ended}"


def _has_begun(trial: FrozenTrial) -> bool:
    """Return whether a trial that was cut off has left what it had come to."""
    return bool(trial.user_attrs.get("partial"))


def describe_test(test: RangeTest) -> str:
    """Return a range test in one line: its smoothed losses as a sparkline, bounds, suggestion and what they rest on."""
    line = sparkline([min(float(v), float(test.smoothed[0]) * 1.5) for v in test.smoothed])
    bounds = f"{test.optimizer:<9} {line:<20} {test.low:8.2g} … {test.high:<8.2g}"
    return f"{bounds} try {test.suggested:<8.2g} {test.note}"


def seconds_worked(trials: Sequence[FrozenTrial]) -> float:
    """Return the seconds during which at least one trial ran; trials side by side count once."""
    spans = sorted(
        (t.datetime_start.timestamp(), t.datetime_complete.timestamp())
        for t in trials
        if t.datetime_start is not None and t.datetime_complete is not None
    )
    worked, until = 0.0, float("-inf")
    for start, end in spans:
        worked += max(0.0, end - max(start, until))
        until = max(until, end)
    return worked


def programs_of(search: SearchSection) -> int:
    """Return how many training loops a search traces: one per optimizer, its searched settings and batch size."""
    traced = {name: values for name, values in search.settings().items() if name != "warmup_fraction"}
    return sum(
        math.prod(
            len(values)
            for name, values in traced.items()
            if name in OPTIMIZERS[optimizer].settings or name in ("clipnorm", "batch_size")
        )
        for optimizer in search.optimizers
    )


def at_once(study: Study) -> int:
    """Return how many trials may run at once, which is how many numbers back a trial's knowledge ends."""
    from pipeline.search.workers import cluster_size

    settings = study.config.workers
    if settings.at_once != "auto":
        return int(settings.at_once)
    if settings.count == "auto":
        return max(DISTANCE, cluster_size(study)) if settings.backend != "loky" else DISTANCE
    return max(DISTANCE, int(settings.count))


def _own_parameters(study: optuna.Study, space: Space) -> dict[str, Any] | None:
    """Return the parameters of the optimizer that the model was compiled with; None where the space has it not."""
    own = study.user_attrs.get("about", {}).get("own")
    return space.own_parameters(*own) if own else None
