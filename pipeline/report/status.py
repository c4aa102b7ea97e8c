"""Where a study stands, from its storage, also while it runs elsewhere.

A glance must not cost a second, so this one module asks Optuna's tables with a few counting
queries instead of loading Optuna and every trial; the tests hold it to what Optuna itself reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import StorageError
from pipeline.search.space import space_size
from pipeline.search.trial import Monitor
from pipeline.storage import check_exists, check_layout, server_arguments, storage_errors, without_password
from pipeline.words import FURTHER, describe_configuration, duration

if TYPE_CHECKING:
    from pipeline.study_file import Study

STATES = (
    ("ran through", "COMPLETE"),
    ("pruned", "PRUNED"),
    ("failed", "FAIL"),
    ("running", "RUNNING"),
    ("waiting", "WAITING"),
)
FINISHED = ("COMPLETE", "PRUNED", "FAIL")


class _Tables:
    """Questions to the tables of one study."""

    def __init__(self, connection: Any, name: str) -> None:
        from sqlalchemy import text

        self._run, self._text = connection.execute, text
        rows = self.ask("SELECT study_id FROM studies WHERE study_name = :name", name=name)
        self.study_id = rows[0][0] if rows else None

    def ask(self, query: str, **values: Any) -> list[Any]:
        return list(self._run(self._text(query), values))

    def attribute(self, key: str) -> Any:
        rows = self.ask(
            "SELECT value_json FROM study_user_attributes WHERE study_id = :id AND key = :key",
            id=self.study_id,
            key=key,
        )
        return json.loads(rows[0][0]) if rows else None

    def counts(self) -> dict[str, int]:
        rows = self.ask("SELECT state, COUNT(*) FROM trials WHERE study_id = :id GROUP BY state", id=self.study_id)
        return {str(state): int(count) for state, count in rows}

    def diverged(self) -> int:
        rows = self.ask(
            "SELECT COUNT(*) FROM trial_user_attributes a JOIN trials t ON a.trial_id = t.trial_id "
            "WHERE t.study_id = :id AND a.key = 'diverged_at' AND a.value_json <> 'null'",
            id=self.study_id,
        )
        return int(rows[0][0])

    def best(self) -> tuple[int, int, float] | None:
        """Return (trial id, number, value) of the best trial that ran through."""
        direction = self.ask("SELECT direction FROM study_directions WHERE study_id = :id", id=self.study_id)
        order = "DESC" if direction and direction[0][0] == "MAXIMIZE" else "ASC"
        rows = self.ask(
            "SELECT t.trial_id, t.number, v.value FROM trials t JOIN trial_values v ON v.trial_id = t.trial_id "
            f"WHERE t.study_id = :id AND t.state = 'COMPLETE' AND v.value_type = 'FINITE' "
            f"ORDER BY v.value {order}, t.number LIMIT 1",
            id=self.study_id,
        )
        return (int(rows[0][0]), int(rows[0][1]), float(rows[0][2])) if rows else None

    def configuration(self, trial_id: int) -> str:
        """Return what a trial trained with, in words."""
        params = {}
        for name, value, distribution in self.ask(
            "SELECT param_name, param_value, distribution_json FROM trial_params WHERE trial_id = :id", id=trial_id
        ):
            choices = json.loads(distribution)["attributes"].get("choices")
            params[name] = choices[int(value)] if choices else value
        attributes = {
            key: json.loads(value)
            for key, value in self.ask(
                "SELECT key, value_json FROM trial_user_attributes WHERE trial_id = :id "
                "AND key IN ('learning_rate', 'baseline')",
                id=trial_id,
            )
        }
        if attributes.get("baseline"):
            return f"the Keras default, adam at {attributes['learning_rate']:g}"
        return describe_configuration(
            params["optimizer"],
            attributes["learning_rate"],
            params["decay"],
            params.get("final_fraction", 1.0),
            **{name: params.get(name) for name in FURTHER},
        )

    def mean_seconds(self) -> float | None:
        """Return the mean duration of a finished trial."""
        rows = self.ask(
            "SELECT datetime_start, datetime_complete FROM trials "
            "WHERE study_id = :id AND datetime_complete IS NOT NULL ORDER BY number DESC LIMIT 200",
            id=self.study_id,
        )
        spans = [(_time(end) - _time(start)).total_seconds() for start, end in rows if start is not None]
        return sum(spans) / len(spans) if spans else None


def _time(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(str(value))


@dataclass(frozen=True)
class Status:
    """Where a study stands.

    Attributes:
        name: the study.
        finished, total: trials that have ended, and how many there are to be.
        stopped: whether its rule ended it early.
        counts: trials by what became of them.
        best: best value so far, what it is a value of, with which configuration and in which trial; or None.
        seconds_left: at the pace so far, or None.
        confirmed: whether the confirmation is whole; None where it is not wanted or not due yet.
        confirm_runs: confirmation runs so far.
    """

    name: str
    finished: int
    total: int
    stopped: bool
    counts: dict[str, int]
    best: dict[str, Any] | None
    seconds_left: float | None
    confirmed: bool | None
    confirm_runs: int

    def text(self) -> str:
        """Return it for people."""
        lines = [
            f"{self.name}: {self.finished} of {self.total} trials" + (" (stopped by its rule)" if self.stopped else ""),
            "  " + (", ".join(f"{count} {label}" for label, count in self.counts.items() if count) or "none yet"),
        ]
        if self.best is not None:
            found = f"{self.best['value']:.5g}: {self.best['configuration']} (trial {self.best['trial']})"
            lines.append(f"  best {Monitor(self.best['monitor'], 'min').label} {found}")
        if self.seconds_left is not None:
            lines.append(f"  about {duration(self.seconds_left)} of trials left")
        if self.confirmed is not None:
            runs = f"not confirmed yet ({self.confirm_runs} confirmation runs)"
            lines.append(f"  {'confirmed on fresh seeds' if self.confirmed else runs}")
        return "\n".join(lines)


def status_of(study: Study) -> Status:
    """Return trials by state, the best so far, and the time left at the pace so far.

    Raises:
        StorageError: when the storage or the study is not there.
    """
    url = study.storage_url
    check_exists(url)
    with storage_errors(url):
        from sqlalchemy import create_engine

        with create_engine(url, connect_args=server_arguments(url)).connect() as connection:
            return _describe(study, _Tables(connection, study.name))


def _describe(study: Study, tables: _Tables) -> Status:
    if tables.study_id is None:
        raise StorageError(
            f"{study.path}: the storage {without_password(study.storage_url)} holds no study named '{study.name}'. "
            f"Run 'lrtune tune {study.path}' first."
        )
    if tables.attribute("definition"):
        check_layout(study.path, tables.attribute("layout"))
    counts, diverged = tables.counts(), tables.diverged()
    finished = sum(counts.get(state, 0) for state in FINISHED)
    wanted = int(min(study.config.trials, space_size(study.config.search)))
    total = max(wanted, sum(counts.values()))
    stop = tables.attribute("stopped")
    if stop and stop["trials"] == finished == sum(counts.values()) and study.config.stop.patience is not None:
        total = finished
    shown = {label: counts.get(state, 0) for label, state in STATES}
    shown["pruned"] -= diverged
    ordered = {"ran through": shown.pop("ran through"), "pruned": shown.pop("pruned"), "diverged": diverged, **shown}
    best = None
    found = tables.best()
    if found is not None:
        trial_id, number, value = found
        monitor = (tables.attribute("about") or {}).get("monitor", "val_loss")
        best = {"monitor": monitor, "value": value, "configuration": tables.configuration(trial_id), "trial": number}
    mean = tables.mean_seconds()
    confirmed, runs = None, 0
    if finished >= total and study.config.confirm.finalists:
        confirm = tables.attribute("confirm") or {"values": {}, "candidates": [], "repeats": 0}
        runs = sum(len(confirm["values"].get(str(number), [])) for number in confirm["candidates"])
        asked = confirm["repeats"] * len(confirm["candidates"])
        confirmed = bool(asked) and runs >= asked
    return Status(
        name=study.name,
        finished=finished,
        total=total,
        stopped=total < wanted,
        counts=ordered,
        best=best,
        seconds_left=mean * (total - finished) if mean is not None and finished < total else None,
        confirmed=confirmed,
        confirm_runs=runs,
    )
