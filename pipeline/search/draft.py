"""A trial that is drawn in memory and then created in the storage at once, parameters and all."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from pipeline.database import database_of


class Draft:
    """A trial in memory: draws parameters from the study's sampler as Optuna's own trial does.

    Args:
        study: the study, with its sampler.
        number: the number that the trial will have.
    """

    def __init__(self, study: optuna.Study, number: int) -> None:
        self.study, self.sampler = study, study.sampler
        self.user_attrs: dict[str, Any] = {}
        self.frozen = FrozenTrial(
            number=number,
            trial_id=-1,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=datetime.now(),
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )
        self.sampler.before_trial(study, self.frozen)
        self._relative: dict[str, Any] | None = None

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Draw one of the choices."""
        return self._suggest(name, CategoricalDistribution(choices))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""
        return float(self._suggest(name, FloatDistribution(low, high, log=log)))

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if self._relative is None:
            space = self.sampler.infer_relative_search_space(self.study, self.frozen)
            self._relative = self.sampler.sample_relative(self.study, self.frozen, space)
        if distribution.single():
            value = distribution.to_external_repr(
                distribution.low if isinstance(distribution, FloatDistribution) else 0.0
            )
        elif name in self._relative:
            value = self._relative[name]
        else:
            value = self.sampler.sample_independent(self.study, self.frozen, name, distribution)
        distribution.to_internal_repr(value)  # refuses what is no value
        self.frozen.params[name] = value
        self.frozen.distributions[name] = distribution
        return value

    def create(self, *, alive: bool) -> optuna.trial.Trial:
        """Create the trial in the storage, as running.

        Args:
            alive: whether its first heartbeat belongs to it.
        """
        storage, frozen = self.study._storage, self.frozen
        frozen.user_attrs = dict(self.user_attrs)
        database_of(storage).create_trial(self.study._study_id, frozen, alive=alive)
        # What `optuna.trial.Trial(study, id)` makes, without reading the trial that has just been written.
        trial = optuna.trial.Trial.__new__(optuna.trial.Trial)
        trial.study, trial.storage, trial._trial_id = self.study, storage, frozen._trial_id
        trial._cached_frozen_trial = frozen
        trial.relative_search_space, trial._relative_params, trial._fixed_params = {}, {}, {}
        return trial
