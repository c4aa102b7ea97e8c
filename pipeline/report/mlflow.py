"""A study's trials once more, as runs of MLflow."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pipeline.errors import KnownError, require_package
from pipeline.report.doubts import learned_nothing
from pipeline.report.records import StudyRecord, TrialRecord, recommend
from pipeline.storage import anchored

TRIAL = "lrtune.trial"
"""Tag of a run that holds its trial's number."""

BATCH = 1000
"""Metrics that MLflow takes at once."""


def tracking_uri(given: str | None, folder: Path) -> str:
    """Return where runs go: the study file's key, else MLflow's own variable, else a database beside the study file.

    Args:
        given: `mlflow.tracking_uri`; relative SQLite paths start at `folder`.
        folder: the study file's folder.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    return anchored(uri, folder)


def write_runs(record: StudyRecord, uri: str) -> int:
    """Write a run per finished trial that has none yet, in an experiment named after the study.

    A run holds the configuration, the mean curves of every metric, value, outcome and verdict; the one
    of the recommended trial is tagged `lrtune.recommended`.

    Args:
        record: the study.
        uri: MLflow's tracking URI.

    Returns:
        The number of runs written.

    Raises:
        KnownError: when MLflow cannot be reached, or the package is missing.
    """
    require_package("mlflow", "mlflow.runs")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    answer = recommend(record)
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(record.name)
        experiment = found.experiment_id if found is not None else client.create_experiment(record.name)
        known = _known(client, experiment)
        new = [t for t in record.trials if t.state in ("complete", "pruned", "failed") and t.number not in known]
        for trial in new:
            known[trial.number] = _write(client, experiment, record, trial)
        for number, run in known.items():
            best = answer is not None and number == answer.trial.number and learned_nothing(record) is None
            client.set_tag(run, "lrtune.recommended", str(best).lower())
    except Exception as error:  # its stores raise errors of many libraries
        raise KnownError(
            f"mlflow: the runs cannot be written ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Check "
            "mlflow.tracking_uri, or set mlflow.runs to false; the trials are safe in the storage."
        ) from error
    return len(new)


def _known(client: Any, experiment: str) -> dict[int, str]:
    """Return the runs that are there, by their trial's number."""
    found: dict[int, str] = {}
    token = None
    while True:
        page = client.search_runs([experiment], filter_string=f"tags.`{TRIAL}` != ''", page_token=token)
        found |= {int(run.data.tags[TRIAL]): run.info.run_id for run in page}
        token = page.token
        if not token:
            return found


def _write(client: Any, experiment: str, record: StudyRecord, trial: TrialRecord) -> str:
    """Write one run and return its id."""
    from mlflow.entities import Metric, Param, RunTag

    began = round(trial.started.timestamp() * 1000) if trial.started is not None else None
    ended = round(began + 1000 * (trial.seconds or 0.0)) if began is not None else None
    tags = {TRIAL: str(trial.number), "lrtune.outcome": trial.outcome, "lrtune.verdict": trial.verdict or ""}
    run = client.create_run(experiment, start_time=began, run_name=f"trial {trial.number}", tags=tags)
    name = str(run.info.run_id)
    c = trial.configuration
    if c is not None:
        values = {**c.as_dict(), "batch_size": record.batch_size(c)}
        client.log_batch(name, params=[Param(key, str(value)) for key, value in values.items() if value is not None])
    metrics = [
        Metric(metric, float(value), ended or 0, epoch)
        for metric in trial.curves
        for epoch, value in enumerate(trial.mean_curve(metric), start=1)
    ]
    if trial.value is not None:
        metrics.append(Metric("value", trial.value, ended or 0, 0))
    for start in range(0, len(metrics), BATCH):
        client.log_batch(name, metrics=metrics[start : start + BATCH])
    if trial.error:
        client.log_batch(name, tags=[RunTag("lrtune.error", trial.error)])
    client.set_terminated(name, "FAILED" if trial.state == "failed" else "FINISHED", end_time=ended)
    return name
