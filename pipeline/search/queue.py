"""Trials given out one at a time to all processes that work on a study, and taken back from dead ones.

Two things keep a study the same whoever runs its trials.  A trial is drawn, and pruned, by what
the trials up to a fixed distance before it have shown, and waits until those have ended: so a
study with one seed has the same trials with one worker and with several.  And every process holds
a lock file for the trial it runs, which the operating system drops when the process dies: so its
trial goes back into the queue at once, under its own number.  Where machines share a study, each
tells the others by heartbeats which trials it runs; one that freezes and wakes finds that its
trial has a new owner, and leaves it alone.
"""

from __future__ import annotations

import contextlib
import math
import uuid
import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.database import is_transient, patience_of
from pipeline.locks import Heart, LiveMark, Locks, LostLock
from pipeline.search.draft import Draft
from pipeline.search.samplers import make_sampler
from pipeline.search.space import Configuration, Space, widened
from pipeline.search.stopping import StopRule
from pipeline.storage import STALE_BEATS

MAXIMUM_RETRIES = 3
"""A trial whose process died this often is given up as failed."""

DISTANCE = 4
"""A trial sees the trials up to this many numbers before it: so many can run at once without changing a result."""


CALLED_BACK = "called_back"
"""The study's attribute that holds the token of the last workers of a cluster that are to end."""

SEEN = 1000
"""A sampler sees at most so many trials."""

BEST_SEEN = 100
"""The best of them that it always sees."""

DRAFTED = ("tpe", "random")
"""Samplers that draw without writing anything, so that a trial can be created whole."""

WIDENING = ("tpe", "random")
"""Samplers whose range of learning rates may grow while they sample."""


class SeenStudy(optuna.Study):
    """A study whose samplers see only the trials up to a number.

    Attributes:
        horizon: the last number that is seen, or None for all.
    """

    horizon: int | None = None
    _thinned: tuple[tuple[int, int], list[FrozenTrial]] | None = None

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if self.horizon is None:
            return super()._get_trials(deepcopy, states, use_cache)
        trials = super()._get_trials(deepcopy, None, use_cache)
        key = self.horizon, len(trials)
        if self._thinned is None or self._thinned[0] != key:
            seen = [t for t in trials if t.number <= self.horizon]
            self._thinned = key, thinned(seen, self.direction == optuna.study.StudyDirection.MINIMIZE)
        return [t for t in self._thinned[1] if states is None or t.state in states]


def thinned(trials: list[FrozenTrial], minimize: bool) -> list[FrozenTrial]:
    """Return at most `SEEN` of many trials: the best, and others evenly over the whole study.

    The Tree-structured Parzen Estimator models its best 25 trials and all others; a tenth of the others
    says of them what all do, and the time of a suggestion no longer grows with the study.
    """
    if len(trials) <= SEEN:
        return trials
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    complete.sort(key=lambda t: ((t.value or 0.0) if minimize else -(t.value or 0.0), t.number))
    kept = {t.number for t in complete[:BEST_SEEN]}
    others = [t.number for t in trials if t.number not in kept]
    count = SEEN - len(kept)
    kept |= {others[i * len(others) // count] for i in range(count)}
    return [t for t in trials if t.number in kept]


@dataclass
class Taken:
    """A trial that this process runs.

    Attributes:
        trial: the trial.
        configuration: what it trains.
        horizon: number of the last trial that it may be compared with.
        mark: its lock file.
        space: what it was drawn from.
        owner: what tells this run of the trial from others; empty where one machine works alone.
        fresh: whether it was created just now: one that was cut off has left values in the storage.
    """

    trial: optuna.Trial
    configuration: Configuration
    horizon: int
    mark: LiveMark
    space: Space
    owner: str = ""
    fresh: bool = False


def positions_after(trials: Sequence[FrozenTrial], sign: float) -> tuple[float, float]:
    """Return the range of `lr_position` after these trials.

    Args:
        trials: in the order of their numbers.
        sign: 1 when their values are minimized, else -1.
    """
    return widened(
        (
            trial.params.get("lr_position"),
            sign * trial.value if trial.state == TrialState.COMPLETE and trial.value is not None else math.inf,
        )
        for trial in trials
    )


class TrialQueue:
    """Gives out the trials of a study.

    Args:
        study: the study.
        space: what is searched.
        locks: the locks of the study.
        distance: see `DISTANCE`; a study run by more workers than that needs as many.
        sampler: name of the sampler.
        seed: seed of the study.
        heartbeat: seconds between two signs of life of a trial, where machines share the study.
        rule: when more trials are not worth it, or None.

    Attributes:
        seen: the trials as `take` has last read them.
    """

    def __init__(
        self,
        study: SeenStudy,
        space: Space,
        locks: Locks,
        *,
        distance: int,
        sampler: str,
        seed: int,
        heartbeat: float = 20.0,
        rule: StopRule | None = None,
    ) -> None:
        self.rule, self._widens = rule, bool(study.user_attrs.get("widens"))
        self.study, self.space, self.locks = study, space, locks
        self.distance, self.sampler, self.seed = distance, sampler, seed
        self.seen: list[FrozenTrial] = []
        self._storage: Any = study._storage
        self._heart = Heart(lambda trial_id: self._storage.record_heartbeat(trial_id), heartbeat)

    def take(self, total: int) -> Taken | None:
        """Return the next trial, or None when it must wait for earlier ones or there is none left.

        Args:
            total: trials of the study in all.
        """
        try:
            return self._take(total)
        except LostLock:
            return None  # another process goes on; what was begun here is a trial of nobody

    def _take(self, total: int) -> Taken | None:
        study, machine = self.study, self.locks.machine
        with self.locks.exclusively("queue") as still_held, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the baseline's position may lie outside its range
            trials = self.seen = study.get_trials(deepcopy=False)
            total = self.limit(trials, total)
            waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
            if not waiting and len(trials) >= total:
                return None
            number = waiting[0] if waiting else len(trials)
            horizon = number - self.distance
            before = trials[: max(0, horizon + 1)]
            if any(not trial.state.is_finished() for trial in before):
                self._take_back(before)
                return None
            # A sampler of its own per trial: a resumed study draws what an uninterrupted one draws.
            space = self.space_after(trials, horizon)
            study.sampler = make_sampler(self.sampler, self.seed, number, space)
            study.horizon = horizon if self.sampler in ("tpe", "gp") else None
            mark = self._mark(number)
            mark.__enter__().share()  # held, and yet open to whoever asks whether it is
            owner = f"{machine}/{uuid.uuid4().hex}" if machine else ""
            trial: optuna.Trial | None = None
            try:
                still_held()
                if waiting or self.sampler not in DRAFTED:
                    trial = self._as_planned(study.ask(), number)
                    if machine:
                        still_held()
                        # In this order: a trial with an owner has a heartbeat, whenever its process dies.
                        self._heart.start(trial._trial_id)
                        trial.set_user_attr("owner", owner)
                    configuration = space.suggest(trial)
                    trial.set_user_attr("learning_rate", configuration.learning_rate)
                else:
                    study._thread_local.cached_all_trials = trials
                    draft = Draft(study, number)
                    configuration = space.suggest(draft)
                    draft.user_attrs = {
                        "learning_rate": configuration.learning_rate,
                        **({"owner": owner} if owner else {}),
                    }
                    still_held()
                    trial = self._as_planned(self._created(draft), number)
                    if machine:
                        self._heart.start(trial._trial_id, now=False)
            except BaseException:
                if trial is not None:
                    self._heart.stop(trial._trial_id)  # nobody speaks for it any more
                mark.__exit__()
                raise
            finally:
                study.horizon = None
        fresh = not waiting and self.sampler in DRAFTED
        return Taken(trial, configuration, horizon, mark, space, owner, fresh)

    def _created(self, draft: Draft) -> optuna.Trial:
        """Return the trial of a draft.

        Raises:
            LostLock: when the server died meanwhile, and the lock with it; the next call waits for the server.
        """
        try:
            return draft.create(alive=self.locks.machine is not None)
        except Exception as error:
            if self.locks.machine and is_transient(error):
                raise LostLock("queue") from error
            raise

    def _as_planned(self, trial: optuna.Trial, number: int) -> optuna.Trial:
        """Return a trial that has the number for which it was drawn and marked.

        Another has it where the answer to a commit was lost and asking again gave the next one, or where
        somebody adds trials without the lock; it waits for its turn.

        Raises:
            LostLock: when it has another number.
        """
        if trial.number == number:
            return trial
        self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        raise LostLock("queue")

    def limit(self, trials: Sequence[FrozenTrial], total: int) -> int:
        """Return how many trials to run, at most `total`: fewer where the rule says that more are not worth it."""
        if self.rule is None:
            return total
        sign = 1.0 if self.study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        return self.rule.trials(
            (
                (sign * trial.value if trial.state == TrialState.COMPLETE and trial.value is not None else math.inf)
                if trial.state.is_finished()
                else None
                for trial in trials
            ),
            total,
        )

    def space_after(self, trials: Sequence[FrozenTrial], horizon: int) -> Space:
        """Return the space as the trials up to a number have widened it."""
        if not self._widens:
            return self.space
        sign = 1.0 if self.study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        return replace(self.space, positions=positions_after(trials[: max(0, horizon + 1)], sign))

    def release(self, taken: Taken) -> None:
        """Drop the lock of a trial that has ended or gone back into the queue."""
        self._heart.stop(taken.trial._trial_id)
        taken.mark.__exit__()
        with contextlib.suppress(OSError):
            taken.mark.path.unlink()

    def put_back(self, taken: Taken) -> None:
        """Return an interrupted trial to the queue under its own number."""
        with self.owned(taken) as still:
            if still and self._storage.get_trial(taken.trial._trial_id).state == TrialState.RUNNING:
                self._storage.set_trial_state_values(taken.trial._trial_id, TrialState.WAITING)

    @contextmanager
    def owned(self, taken: Taken) -> Iterator[bool]:
        """Yield whether a trial is still this process's to end, and keep it so meanwhile."""
        if not taken.owner:
            yield True  # its lock file is held
            return
        with self.locks.exclusively(f"trial-{taken.trial.number}"):
            stored = self._storage.get_trial(taken.trial._trial_id)
            yield stored.state == TrialState.RUNNING and stored.user_attrs.get("owner") == taken.owner

    def take_back_orphans(self, *, died: bool = True) -> list[int]:
        """Return trials of processes that are gone to the queue; give up those that lost several.

        Args:
            died: whether their processes died; a worker that was told to end costs no retry.

        Returns:
            The numbers of the trials.
        """
        with self.locks.exclusively("queue"):
            return self._take_back(self.study.get_trials(deepcopy=False), died)

    def _take_back(self, trials: list[FrozenTrial], died: bool = True) -> list[int]:
        machine, found = self.locks.machine, []
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        stale = self._stale() if machine and running else set()
        for trial in running:
            owner = str(trial.user_attrs.get("owner", ""))
            if trial._trial_id in stale:
                with self.locks.exclusively(f"trial-{trial.number}"):
                    if trial._trial_id in self._stale():
                        found += self._return(trial, died)
                continue
            if owner and not owner.startswith(f"{machine}/"):
                continue  # another machine speaks for it
            with self._mark(trial.number) as mark:
                if mark.alone:  # else its process lives
                    with contextlib.suppress(OSError):
                        mark.path.unlink()
                    found += self._return(trial, died)
        return found

    def _return(self, trial: FrozenTrial, died: bool) -> list[int]:
        """Put a trial of nobody back into the queue, or give it up; return its number if it had not ended."""
        storage = self._storage
        if storage.get_trial(trial._trial_id).state != TrialState.RUNNING:
            return []  # it ended a moment ago
        retries = int(trial.user_attrs.get("retries", 0)) + died
        if retries > MAXIMUM_RETRIES:
            storage.set_trial_user_attr(trial._trial_id, "error", f"its process died {MAXIMUM_RETRIES} times")
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            return [trial.number]
        if died:
            storage.set_trial_user_attr(trial._trial_id, "retries", retries)
        storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        return [trial.number]

    def _stale(self) -> set[int]:
        """Return the ids of trials whose processes have been silent for too long, by the server's clock.

        After a time without the server nobody could speak, so all are given the same time anew.
        """
        if patience_of(self._storage).seconds_since_outage < STALE_BEATS * self._heart.seconds:
            return set()
        return set(self._storage._get_stale_trial_ids(self.study._study_id))

    def _mark(self, number: int) -> LiveMark:
        return self.locks.mark(f"trial-{number}")
