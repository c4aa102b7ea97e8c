"""Optuna's database storage, made quick for very many trials and patient with a server that is away.

Optuna reads trials as objects of its tables, one per parameter and value: 10,000 trials take it a dozen
seconds.  Here the rows are read as they are and give the same trials in a fraction of that.  And it
writes every parameter and attribute in a transaction of its own, some forty per trial; here a trial
takes two, one that creates it and one that ends it: nothing of it is ever half there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import sqlite3
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import reason_of

NAMED = 200
"""Up to so many trials are asked for by their ids, more by their study."""

_STUDIES, _TRIALS = models.StudyModel.__table__, models.TrialModel.__table__
_PARAMS, _HEARTBEATS = models.TrialParamModel.__table__, models.TrialHeartbeatModel.__table__
_USER, _SYSTEM = models.TrialUserAttributeModel.__table__, models.TrialSystemAttributeModel.__table__
_BETWEEN, _VALUES = models.TrialIntermediateValueModel.__table__, models.TrialValueModel.__table__

_distribution = functools.lru_cache(maxsize=4096)(json_to_distribution)


class Database(optuna.storages.RDBStorage):
    """Optuna's storage, which reads, creates and ends trials in few questions and whole steps."""

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Return the study's trials in these states with an id above the limit, or among the included ones."""
        trial, wanted = _TRIALS.c, [_TRIALS.c.trial_id > trial_id_greater_than]
        included = sorted(i for i in included_trial_ids if i <= trial_id_greater_than)
        if len(included) > NAMED:  # a database takes only so many values in a question
            wanted = [trial.trial_id >= included[0]]
        elif included:
            wanted = [sqlalchemy.or_(*wanted, trial.trial_id.in_(included))]
        columns = trial.trial_id, trial.number, trial.state, trial.datetime_start, trial.datetime_complete
        question = sqlalchemy.select(*columns).where(trial.study_id == study_id, *wanted)
        with self.engine.connect() as connection:
            rows = [
                row
                for row in connection.execute(question.order_by(trial.trial_id)).all()
                if (states is None or row.state in states)
                and (row.trial_id > trial_id_greater_than or row.trial_id in included_trial_ids)
            ]
            if not rows:
                if connection.execute(_study_row(study_id)).first() is None:
                    raise KeyError(models.NOT_FOUND_MSG)
                return []
            with no_garbage(len(rows) > NAMED):
                return self._whole(rows, _Parts(connection, study_id, [row.trial_id for row in rows]))

    def _whole(self, rows: Sequence[Any], parts: _Parts) -> list[FrozenTrial]:
        return [
            FrozenTrial(
                number=row.number,
                state=row.state,
                value=None,
                values=parts.values.get(row.trial_id),
                datetime_start=_local(row.datetime_start),
                datetime_complete=_local(row.datetime_complete),
                params=parts.params[row.trial_id],
                distributions=parts.distributions[row.trial_id],
                user_attrs=parts.user_attributes[row.trial_id],
                system_attrs=parts.system_attributes[row.trial_id],
                intermediate_values=parts.intermediate[row.trial_id],
                trial_id=row.trial_id,
            )
            for row in rows
        ]

    def create_trial(self, study_id: int, trial: FrozenTrial, *, alive: bool) -> None:
        """Create a running trial, parameters and attributes and all, in one transaction; it gets number and id.

        Args:
            study_id: the study.
            trial: what is drawn; its number, id and time of start are set.
            alive: whether its first heartbeat belongs to it: without one nobody elsewhere could tell that its
                process is gone.
        """
        trial.datetime_start = datetime.now()
        with self.engine.begin() as connection:
            # The study's row is locked while trials are counted, and the row of the trial is there before:
            # SQLite knows no lock of a row, and locks its file with the first that is written.
            if connection.execute(_study_row(study_id).with_for_update()).first() is None:
                raise KeyError(models.NOT_FOUND_MSG)
            row = {
                "study_id": study_id,
                "state": TrialState.RUNNING,
                "datetime_start": _universal(trial.datetime_start),
            }
            key = connection.execute(_TRIALS.insert().values(row)).inserted_primary_key
            assert key is not None
            trial_id = trial._trial_id = int(key[0])
            earlier = _TRIALS.c.study_id == study_id, _TRIALS.c.trial_id < trial_id
            count = sqlalchemy.select(sqlalchemy.func.count()).select_from(_TRIALS).where(*earlier)
            trial.number = int(connection.execute(count).scalar_one())
            own = _TRIALS.update().where(_TRIALS.c.trial_id == trial_id)
            connection.execute(own.values(number=trial.number))
            params = [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": distribution.to_internal_repr(trial.params[name]),
                    "distribution_json": distribution_to_json(distribution),
                }
                for name, distribution in trial.distributions.items()
            ]
            if params:
                connection.execute(_PARAMS.insert(), params)
            if alive:
                connection.execute(_HEARTBEATS.insert(), [{"trial_id": trial_id}])
            if trial.user_attrs:
                connection.execute(_USER.insert(), _attributes(trial_id, trial.user_attrs))

    def end_trial(
        self,
        trial_id: int,
        state: TrialState,
        value: float | None,
        attributes: Mapping[str, Any],
        intermediate: Mapping[int, float],
        *,
        fresh: bool = False,
        owner: str = "",
    ) -> bool:
        """End a trial with all that came of it, in one transaction.

        Args:
            trial_id: the trial's id.
            state: how it ended.
            value: its value, where it ran through.
            attributes: what is to be known of it.
            intermediate: values by step; those that are there already stay.
            fresh: whether nothing of these can be there yet, which spares a look.
            owner: who must still own the trial; empty where only one process can.

        Returns:
            Whether it was ended; a trial that has another owner is left alone.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: when it has ended already.
        """
        own, number = _TRIALS.c.trial_id == trial_id, models.TrialIntermediateValueModel
        with self.engine.begin() as connection:
            before = connection.execute(sqlalchemy.select(_TRIALS.c.state).where(own).with_for_update()).first()
            if before is None:
                raise KeyError(models.NOT_FOUND_MSG)
            self.check_trial_is_updatable(trial_id, before.state)
            if owner:
                mine = _USER.c.trial_id == trial_id, _USER.c.key == "owner"
                said = connection.execute(sqlalchemy.select(_USER.c.value_json).where(*mine)).scalar()
                if before.state != TrialState.RUNNING or said is None or json.loads(said) != owner:
                    return False
            reported: set[int] = set()
            if not fresh:
                known = _USER.c.trial_id == trial_id, _USER.c.key.in_(list(attributes))
                connection.execute(_USER.delete().where(*known))
                there = sqlalchemy.select(_BETWEEN.c.step).where(_BETWEEN.c.trial_id == trial_id)
                reported = set(connection.execute(there).scalars())
            if attributes:
                connection.execute(_USER.insert(), _attributes(trial_id, attributes))
            steps = []
            for step, reached in intermediate.items():
                if step not in reported:
                    stored, kind = number.intermediate_value_to_stored_repr(reached)
                    row = {"trial_id": trial_id, "step": step}
                    steps.append(row | {"intermediate_value": stored, "intermediate_value_type": kind})
            if steps:
                connection.execute(_BETWEEN.insert(), steps)
            if value is not None and not math.isnan(value):
                final, sort = models.TrialValueModel.value_to_stored_repr(value)
                only = {"trial_id": trial_id, "objective": 0, "value": final, "value_type": sort}
                connection.execute(_VALUES.insert(), [only])
            ended = {"state": state, "datetime_complete": _universal(datetime.now())}
            connection.execute(_TRIALS.update().where(own).values(ended))
        return True


def _study_row(study_id: int) -> Any:
    return sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id)


def _attributes(trial_id: int, attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(content)} for key, content in attributes.items()
    ]


@contextlib.contextmanager
def no_garbage(many: bool = True) -> Iterator[None]:
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


def _universal(local: datetime) -> datetime:
    """Return a local time as it is stored."""
    return local.astimezone(UTC).replace(tzinfo=None)


class _Parts:
    """What belongs to trials, by their ids.

    Args:
        connection: an open connection.
        study_id: the study of the trials.
        ids: the trials, in ascending order.
    """

    def __init__(self, connection: sqlalchemy.Connection, study_id: int, ids: list[int]) -> None:
        self._connection, self._study_id, self._ids = connection, study_id, ids
        self.params: dict[int, dict[str, Any]] = defaultdict(dict)
        self.distributions: dict[int, dict[str, Any]] = defaultdict(dict)
        self.user_attributes: dict[int, dict[str, Any]] = defaultdict(dict)
        self.system_attributes: dict[int, dict[str, Any]] = defaultdict(dict)
        self.intermediate: dict[int, dict[int, float]] = defaultdict(dict)
        values: dict[int, dict[int, float]] = defaultdict(dict)

        for trial, name, value, described in self._rows(
            _PARAMS, ("param_name", "param_value", "distribution_json"), _PARAMS.c.param_id
        ):
            distribution = self.distributions[trial][name] = _distribution(described)
            self.params[trial][name] = distribution.to_external_repr(value)
        for table, target in ((_USER, self.user_attributes), (_SYSTEM, self.system_attributes)):
            for trial, key, content in self._rows(table, ("key", "value_json")):
                target[trial][key] = json.loads(content)
        between = models.TrialIntermediateValueModel
        finite, number = between.TrialIntermediateValueType.FINITE, between.stored_repr_to_intermediate_value
        columns = "step", "intermediate_value", "intermediate_value_type"
        for trial, step, value, kind in self._rows(_BETWEEN, columns):
            self.intermediate[trial][step] = value if kind == finite else number(value, kind)
        final = models.TrialValueModel
        for trial, objective, value, kind in self._rows(_VALUES, ("objective", "value", "value_type")):
            values[trial][objective] = final.stored_repr_to_value(value, kind)
        self.values = {trial: [found[i] for i in sorted(found)] for trial, found in values.items()}

    def _rows(self, table: Any, columns: Iterable[str], order: Any = None) -> Any:
        question = sqlalchemy.select(table.c.trial_id, *(table.c[name] for name in columns))
        if len(self._ids) <= NAMED:
            question = question.where(table.c.trial_id.in_(self._ids))
        else:
            question = question.join(_TRIALS, _TRIALS.c.trial_id == table.c.trial_id)
            question = question.where(_TRIALS.c.study_id == self._study_id, _TRIALS.c.trial_id >= self._ids[0])
        return self._connection.execute(question if order is None else question.order_by(order))


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
    "_set_trial_param",
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


def database_of(storage: Any) -> Database:
    """Return the database behind Optuna's cache."""
    found = getattr(storage, "_backend", storage)
    assert isinstance(found, Database)
    return found


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
