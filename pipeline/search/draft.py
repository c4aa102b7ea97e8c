"""Few and whole steps in the storage: a trial is drawn in memory and created at once, and ended at once.

Optuna writes every parameter and attribute in a transaction of its own, some forty per trial.  Here
a trial takes two: nothing of it is ever half there, and its cost falls to a few milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState


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
        """Create the trial in the storage, parameters and attributes and all, as running, in one transaction.

        Args:
            alive: whether its first heartbeat belongs to it: without one nobody elsewhere could tell that its
                process is gone.
        """
        from optuna.distributions import distribution_to_json
        from optuna.storages._rdb import models
        from optuna.storages._rdb.storage import _create_scoped_session

        storage, frozen = self.study._storage, self.frozen
        frozen.user_attrs, frozen.datetime_start = dict(self.user_attrs), datetime.now()
        with _create_scoped_session(backend_of(storage).scoped_session) as session:
            # The study's row is locked while the number is counted, as Optuna does.
            models.StudyModel.find_or_raise_by_id(self.study._study_id, session, for_update=True)
            row = models.TrialModel(
                study_id=self.study._study_id,
                number=None,
                state=TrialState.RUNNING,
                datetime_start=frozen.datetime_start,
                datetime_complete=None,
            )
            session.add(row)
            session.flush()
            for name, distribution in frozen.distributions.items():
                session.add(
                    models.TrialParamModel(
                        trial_id=row.trial_id,
                        param_name=name,
                        param_value=distribution.to_internal_repr(frozen.params[name]),
                        distribution_json=distribution_to_json(distribution),
                    )
                )
            if alive:
                session.add(models.TrialHeartbeatModel(trial_id=row.trial_id))
            for key, value in frozen.user_attrs.items():
                session.add(
                    models.TrialUserAttributeModel(trial_id=row.trial_id, key=key, value_json=json.dumps(value))
                )
            frozen.number = row.count_past_trials(session)
            row.number = frozen.number
            frozen._trial_id = int(row.trial_id)
        # What `optuna.trial.Trial(study, id)` makes, without reading the trial that has just been written.
        trial = optuna.trial.Trial.__new__(optuna.trial.Trial)
        trial.study, trial.storage, trial._trial_id = self.study, storage, frozen._trial_id
        trial._cached_frozen_trial = frozen
        trial.relative_search_space, trial._relative_params, trial._fixed_params = {}, {}, {}
        return trial


def backend_of(storage: Any) -> Any:
    """Return the database behind Optuna's cache."""
    return getattr(storage, "_backend", storage)


def end_trial(
    storage: Any,
    trial_id: int,
    state: TrialState,
    value: float | None,
    attributes: Mapping[str, Any],
    intermediate: Mapping[int, float],
    *,
    fresh: bool = False,
) -> None:
    """End a trial with all that came of it, in one transaction.

    Args:
        storage: the study's storage.
        trial_id: the trial's id.
        state: how it ended.
        value: its value, where it ran through.
        attributes: what is to be known of it.
        intermediate: values by step; those that are there already stay.
        fresh: whether nothing of these can be there yet, which spares a look.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: when it has ended already.
    """
    from optuna.storages._rdb import models
    from optuna.storages._rdb.storage import _create_scoped_session

    backend = backend_of(storage)
    with _create_scoped_session(backend.scoped_session) as session:
        trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        backend.check_trial_is_updatable(trial_id, trial.state)
        attribute = models.TrialUserAttributeModel
        rows = () if fresh else session.query(attribute).filter(attribute.trial_id == trial_id)
        known: dict[Any, Any] = {row.key: row for row in rows}
        for key, content in attributes.items():
            if key in known:
                known[key].value_json = json.dumps(content)
            else:
                session.add(attribute(trial_id=trial_id, key=key, value_json=json.dumps(content)))
        between = models.TrialIntermediateValueModel
        steps = () if fresh else session.query(between.step).filter(between.trial_id == trial_id)
        reported = {row.step for row in steps}
        for step, number in intermediate.items():
            if step not in reported:
                stored, kind = between.intermediate_value_to_stored_repr(number)
                session.add(
                    between(trial_id=trial_id, step=step, intermediate_value=stored, intermediate_value_type=kind)
                )
        if value is not None and not math.isnan(value):
            final, sort = models.TrialValueModel.value_to_stored_repr(value)
            session.add(models.TrialValueModel(trial_id=trial_id, objective=0, value=final, value_type=sort))
        trial.state = state
        trial.datetime_complete = datetime.now()
