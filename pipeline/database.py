"""Optuna's database storage, made quick for very many trials and patient with a server that is away.

Optuna reads trials as objects of its tables, one per parameter and value: 10,000 trials take it a dozen
seconds.  Here the rows are read as they are and give the same trials in a fraction of that.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sqlite3
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.distributions import json_to_distribution
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import reason_of

NAMED = 200
"""Up to so many trials are asked for by their ids, more by their study."""

_distribution = functools.lru_cache(maxsize=4096)(json_to_distribution)


class Database(optuna.storages.RDBStorage):
    """Optuna's storage with a quick reading of trials."""

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Return the study's trials in these states with an id above the limit, or among the included ones."""
        trial = models.TrialModel
        wanted = [trial.trial_id > trial_id_greater_than]
        included = sorted(i for i in included_trial_ids if i <= trial_id_greater_than)
        if len(included) > NAMED:  # a database takes only so many values in a question
            wanted = [trial.trial_id >= included[0]]
        elif included:
            wanted = [sqlalchemy.or_(*wanted, trial.trial_id.in_(included))]
        start, complete = trial._datetime_start_utc, trial._datetime_complete_utc
        columns: Any = trial.trial_id, trial.number, trial.state, start.label("start"), complete.label("complete")
        with _create_scoped_session(self.scoped_session) as session:
            models.StudyModel.find_or_raise_by_id(study_id, session)
            question = sqlalchemy.select(*columns).where(trial.study_id == study_id, *wanted)
            rows = [
                row
                for row in session.execute(question.order_by(trial.trial_id)).all()
                if (states is None or row.state in states)
                and (row.trial_id > trial_id_greater_than or row.trial_id in included_trial_ids)
            ]
            if not rows:
                return []
            with _no_garbage(len(rows) > NAMED):
                return self._whole(rows, _Parts(session, study_id, [row.trial_id for row in rows]))

    def _whole(self, rows: Sequence[Any], parts: _Parts) -> list[FrozenTrial]:
        return [
            FrozenTrial(
                number=row.number,
                state=row.state,
                value=None,
                values=parts.values.get(row.trial_id),
                datetime_start=_local(row.start),
                datetime_complete=_local(row.complete),
                params=parts.params[row.trial_id],
                distributions=parts.distributions[row.trial_id],
                user_attrs=parts.user_attributes[row.trial_id],
                system_attrs=parts.system_attributes[row.trial_id],
                intermediate_values=parts.intermediate[row.trial_id],
                trial_id=row.trial_id,
            )
            for row in rows
        ]


@contextlib.contextmanager
def _no_garbage(many: bool) -> Iterator[None]:
    """Spare the search for garbage while very much is made that is none."""
    paused = many and gc.isenabled()
    if paused:
        gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def _local(utc: datetime | None) -> datetime | None:
    """Return a stored time, universal and without a zone, as local time without a zone."""
    return None if utc is None else utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


class _Parts:
    """What belongs to trials, by their ids.

    Args:
        session: an open session.
        study_id: the study of the trials.
        ids: the trials, in ascending order.
    """

    def __init__(self, session: Any, study_id: int, ids: list[int]) -> None:
        self._session, self._study_id, self._ids = session, study_id, ids
        self.params: dict[int, dict[str, Any]] = defaultdict(dict)
        self.distributions: dict[int, dict[str, Any]] = defaultdict(dict)
        self.user_attributes: dict[int, dict[str, Any]] = defaultdict(dict)
        self.system_attributes: dict[int, dict[str, Any]] = defaultdict(dict)
        self.intermediate: dict[int, dict[int, float]] = defaultdict(dict)
        values: dict[int, dict[int, float]] = defaultdict(dict)

        param = models.TrialParamModel
        columns = param.trial_id, param.param_name, param.param_value, param.distribution_json
        for trial, name, value, described in self._rows(param, columns, param.param_id):
            distribution = self.distributions[trial][name] = _distribution(described)
            self.params[trial][name] = distribution.to_external_repr(value)
        for model, target in (
            (models.TrialUserAttributeModel, self.user_attributes),
            (models.TrialSystemAttributeModel, self.system_attributes),
        ):
            for trial, key, content in self._rows(model, (model.trial_id, model.key, model.value_json)):
                target[trial][key] = json.loads(content)
        between = models.TrialIntermediateValueModel
        columns = between.trial_id, between.step, between.intermediate_value, between.intermediate_value_type
        finite, number = between.TrialIntermediateValueType.FINITE, between.stored_repr_to_intermediate_value
        for trial, step, value, kind in self._rows(between, columns):
            self.intermediate[trial][step] = value if kind == finite else number(value, kind)
        final = models.TrialValueModel
        columns = final.trial_id, final.objective, final.value, final.value_type
        for trial, objective, value, kind in self._rows(final, columns):
            values[trial][objective] = final.stored_repr_to_value(value, kind)
        self.values = {trial: [found[i] for i in sorted(found)] for trial, found in values.items()}

    def _rows(self, model: Any, columns: Iterable[Any], order: Any = None) -> Any:
        question = sqlalchemy.select(*columns)
        if len(self._ids) <= NAMED:
            question = question.where(model.trial_id.in_(self._ids))
        else:
            trial = models.TrialModel
            question = question.join(trial, trial.trial_id == model.trial_id)
            question = question.where(trial.study_id == self._study_id, trial.trial_id >= self._ids[0])
        return self._session.execute(question if order is None else question.order_by(order))


class PatientDatabase(Database):
    """A server's database, whose calls are made again while the server cannot be reached.

    Args:
        url: an SQLAlchemy URL.
        arguments: options of a connection.
        beat: seconds between two heartbeats of a trial, and after how many a silent one is taken for dead.
        patience: seconds to go on asking.
    """

    def __init__(self, url: str, arguments: dict[str, Any], *, beat: tuple[int, int], patience: float) -> None:
        self.waiting = Patience(patience)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(
                url,
                engine_kwargs={"pool_pre_ping": True, "connect_args": arguments},
                heartbeat_interval=beat[0],
                grace_period=beat[1],
            )

    def set_trial_state_values(self, trial_id: int, state: Any, values: Any = None) -> bool:
        """Set the state; a commit whose answer was lost counts as made."""
        call = super().set_trial_state_values
        try:
            return bool(self.waiting.call(lambda: call(trial_id, state, values)))
        except optuna.exceptions.UpdateFinishedTrialError:
            if self.waiting.waited and self.get_trial(trial_id).state == state:
                return True
            raise


PATIENT = (
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_all_studies",
    "get_trial",
    "_get_trials",
    "_get_stale_trial_ids",
    "set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
)
"""Calls that may be made twice.

Not `create_new_trial`: one whose answer was lost is found by the queue as a trial of nobody.
"""


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: PatientDatabase, *args: Any, **kwargs: Any) -> Any:
        return self.waiting.call(lambda: method(self, *args, **kwargs))

    return call


for _name in PATIENT:
    setattr(PatientDatabase, _name, _patient(getattr(Database, _name)))


class Patience:
    """Makes a call again while the database cannot be reached.

    Args:
        seconds: how long.

    Attributes:
        on_wait: told once per outage what is waited for.
        waited: whether the last call had to wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waited = False
        self._last_outage = float("-inf")
        self.on_wait: Callable[[str], object] = lambda text: None

    @property
    def seconds_since_outage(self) -> float:
        """Return how long ago the database could last not be reached."""
        return time.monotonic() - self._last_outage

    def call(self, function: Callable[[], Any]) -> Any:
        """Return the function's value.

        Raises:
            Exception: what the function raised, when it is no matter of waiting or the time is over.
        """
        began, pause, self.waited = time.monotonic(), 0.1, False
        while True:
            try:
                return function()
            except Exception as error:
                if not is_transient(error) or time.monotonic() - began + pause > self.seconds:
                    raise
                if not self.waited:
                    self.on_wait(f"{reason_of(error)}; waiting up to {self.seconds:.0f} s for the database")
                self.waited = True
                time.sleep(pause)
                self._last_outage = time.monotonic()
                pause = min(2 * pause, 5.0)


def patience_of(storage: Any) -> Patience:
    """Return the patience of a storage; one that is a file needs none."""
    found = getattr(getattr(storage, "_backend", storage), "waiting", None)
    return found if isinstance(found, Patience) else Patience(0)


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error says that a database server cannot be reached, or asks to try again."""
    while error is not None:
        if isinstance(error, sqlalchemy.exc.DBAPIError):
            code = getattr(error.orig, "sqlstate", None)
            unreachable = isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
            if error.connection_invalidated or (unreachable and code is None):
                return not isinstance(error.orig, sqlite3.Error)
            return code is not None and (code[:2] in ("08", "40") or code in ("57P01", "57P02", "57P03", "25P03"))
        error = error.__cause__ or error.__context__
    return False
