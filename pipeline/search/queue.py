"""Trials given out one at a time to all processes that work on a study, and taken back from dead ones.

Two things keep a study the same whoever runs its trials.  A trial is drawn, and pruned, by what
the trials up to a fixed distance before it have shown, and waits until those have ended: so a
study with one seed has the same trials with one worker and with several.  And every process holds
a lock file for the trial it runs, which the operating system drops when the process dies: so its
trial goes back into the queue at once, under its own number.
"""

from __future__ import annotations

import contextlib
import math
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.search.samplers import make_sampler
from pipeline.search.space import Configuration, Space, widened
from pipeline.search.stopping import StopRule
from pipeline.storage import LiveMark, exclusively

MAXIMUM_RETRIES = 3
"""A trial whose process died this often is given up as failed."""

DISTANCE = 4
"""A trial sees the trials up to this many numbers before it: so many can run at once without changing a result."""


WIDENING = ("tpe", "random")
"""Samplers whose range of learning rates may grow while they sample."""


class SeenStudy(optuna.Study):
    """A study whose samplers see only the trials up to a number.

    Attributes:
        horizon: the last number that is seen, or None for all.
    """

    horizon: int | None = None

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        trials = super()._get_trials(*args, **kwargs)
        return trials if self.horizon is None else [t for t in trials if t.number <= self.horizon]


@dataclass
class Taken:
    """A trial that this process runs.

    Attributes:
        trial: the trial.
        configuration: what it trains.
        horizon: number of the last trial that it may be compared with.
        mark: its lock file.
        space: what it was drawn from.
    """

    trial: optuna.Trial
    configuration: Configuration
    horizon: int
    mark: LiveMark
    space: Space


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
        lock_path: function from a purpose to the path of a lock file.
        distance: see `DISTANCE`; a study run by more workers than that needs as many.
        sampler: name of the sampler.
        seed: seed of the study.
        remote: whether other machines may work on the study too; each takes back only its own trials.
        rule: when more trials are not worth it, or None.
    """

    def __init__(
        self,
        study: SeenStudy,
        space: Space,
        lock_path: Callable[[str], Path],
        *,
        distance: int,
        sampler: str,
        seed: int,
        remote: bool,
        rule: StopRule | None = None,
    ) -> None:
        self.remote, self.rule = remote, rule
        self.study, self.space, self.lock_path = study, space, lock_path
        self.distance, self.sampler, self.seed = distance, sampler, seed
        self._host = socket.gethostname()

    def take(self, total: int) -> Taken | None:
        """Return the next trial, or None when it must wait for earlier ones or there is none left.

        Args:
            total: trials of the study in all.
        """
        study = self.study
        with exclusively(self.lock_path("queue")), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the baseline's position may lie outside its range
            trials = study.get_trials(deepcopy=False)
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
            mark = LiveMark(self._mark_path(number))
            mark.__enter__().share()  # held, and yet open to whoever asks whether it is
            try:
                trial = study.ask()
                if self.remote:
                    trial.set_user_attr("host", self._host)
                configuration = space.suggest(trial)
            except BaseException:
                mark.__exit__()
                raise
            finally:
                study.horizon = None
        return Taken(trial, configuration, horizon, mark, space)

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
        if not self.study.user_attrs.get("widens"):
            return self.space
        sign = 1.0 if self.study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        return replace(self.space, positions=positions_after(trials[: max(0, horizon + 1)], sign))

    def release(self, taken: Taken) -> None:
        """Drop the lock of a trial that has ended or gone back into the queue."""
        taken.mark.__exit__()
        with contextlib.suppress(OSError):
            taken.mark.path.unlink()

    def put_back(self, taken: Taken) -> None:
        """Return an interrupted trial to the queue under its own number."""
        storage = self.study._storage
        if storage.get_trial(taken.trial._trial_id).state == TrialState.RUNNING:
            storage.set_trial_state_values(taken.trial._trial_id, TrialState.WAITING)

    def take_back_orphans(self, *, died: bool = True) -> list[int]:
        """Return trials of processes that are gone to the queue; give up those that lost several.

        Args:
            died: whether their processes died; a worker that was told to end costs no retry.

        Returns:
            The numbers of the trials.
        """
        with exclusively(self.lock_path("queue")):
            return self._take_back(self.study.get_trials(deepcopy=False), died)

    def _take_back(self, trials: list[FrozenTrial], died: bool = True) -> list[int]:
        storage, found = self.study._storage, []
        for trial in trials:
            if trial.state != TrialState.RUNNING or trial.user_attrs.get("host", self._host) != self._host:
                continue
            with LiveMark(self._mark_path(trial.number)) as mark:
                if not mark.alone:
                    continue  # its process lives
                with contextlib.suppress(OSError):
                    mark.path.unlink()
                if storage.get_trial(trial._trial_id).state != TrialState.RUNNING:
                    continue  # it ended a moment ago
                found.append(trial.number)
                retries = int(trial.user_attrs.get("retries", 0)) + died
                if retries > MAXIMUM_RETRIES:
                    storage.set_trial_user_attr(trial._trial_id, "error", f"its process died {MAXIMUM_RETRIES} times")
                    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                    continue
                if died:
                    storage.set_trial_user_attr(trial._trial_id, "retries", retries)
                storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        return found

    def _mark_path(self, number: int) -> Path:
        return self.lock_path(f"trial-{number}")
