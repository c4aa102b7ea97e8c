"""Trials as runs of MLflow, in a real tracking database."""

from __future__ import annotations

import pytest

from pipeline.errors import KnownError
from pipeline.report.mlflow import tracking_uri, write_runs
from pipeline.report.records import load_record, recommend
from tests.made_study import make_study


def test_every_trial_becomes_one_run(tmp_path):
    """Parameters, mean curves and outcome are those of the trial; written again, nothing is doubled."""
    from mlflow import MlflowClient

    study = make_study(tmp_path, trials=12)
    record = load_record(study)
    uri = tracking_uri("sqlite:///runs.db", tmp_path)
    assert write_runs(record, uri) == 12
    assert write_runs(record, uri) == 0
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("made").experiment_id])
    by_trial = {int(run.data.tags["lrtune.trial"]): run for run in runs}
    assert sorted(by_trial) == list(range(12))
    best = recommend(record).trial
    run = by_trial[best.number]
    assert run.data.params["optimizer"] == best.configuration.optimizer
    assert float(run.data.params["learning_rate"]) == best.configuration.learning_rate
    assert run.data.metrics["value"] == pytest.approx(best.value)
    curve = client.get_metric_history(run.info.run_id, "val_loss")
    assert [m.value for m in sorted(curve, key=lambda m: m.step)] == pytest.approx(best.mean_curve("val_loss").tolist())
    recommended = [n for n, one in by_trial.items() if one.data.tags["lrtune.recommended"] == "true"]
    assert recommended == [best.number]


def test_where_runs_go(tmp_path, monkeypatch):
    """The key comes first, then MLflow's variable, then a file beside the study file."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(None, tmp_path) == "http://127.0.0.1:5000"
    assert tracking_uri("sqlite:////x.db", tmp_path) == "sqlite:////x.db"


def test_a_store_that_cannot_be_reached_is_one_message(tmp_path):
    """It names the key, and says that the trials are safe."""
    record = load_record(make_study(tmp_path, trials=3))
    (tmp_path / "taken").write_text("")
    with pytest.raises(KnownError, match=r"mlflow.*tracking_uri.*trials are safe"):
        write_runs(record, f"sqlite:///{tmp_path}/taken/x.db")
