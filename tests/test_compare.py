"""Comparing studies, the dashboard's note and artifact, JSON for programs, and figures by value."""

from __future__ import annotations

import json
import threading
import urllib.request

import numpy as np
import optuna
import pytest

from pipeline.report.compare import compare_rows, compare_text, differences
from pipeline.report.dashboard import ARTIFACT, artifact_folder, note, publish
from pipeline.report.export import write_results
from pipeline.report.figures.compared import search_course
from pipeline.report.figures.course import divergences, failures, history_info, time_info, timeline_info
from pipeline.report.figures.mattered import cross_table, importance_info
from pipeline.report.figures.range_tests import inside_info
from pipeline.report.page import render
from pipeline.report.records import load_record, recommend
from pipeline.storage import open_storage
from tests.made_study import make_study


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two studies in one folder; the second reaches lower losses."""
    folder = tmp_path_factory.mktemp("two")
    return make_study(folder, "first", best=0.5), make_study(folder, "second", best=0.2, seed=1, trials=30)


def test_the_comparison_names_the_better_study(two, tmp_path, lrtune_here):
    """Text, JSON and page agree with what each study recommends by itself."""
    records = [load_record(study) for study in two]
    rows = compare_rows(records)
    assert [row["study"] for row in rows] == ["first", "second"]
    for row, record in zip(rows, records, strict=True):
        answer = recommend(record)
        assert row["value"] == answer.value
        assert row["epochs_trained"] == sum(t.epochs_run for t in record.trials)
    assert compare_text(records).startswith("second has the best val_loss")
    assert differences(records) == []
    page = tmp_path / "both.html"
    ended = lrtune_here("compare", two[0].path, two[1].path, "--output", page, "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["studies"][1]["value"] == rows[1]["value"]
    assert "second has the best val_loss" in page.read_text()


def test_what_does_not_compare_is_said(two, tmp_path):
    """Other folds and lengths are named with their numbers; one study alone is wrong usage."""
    other = make_study(tmp_path, "other", folds=4, epochs=9)
    said = " ".join(differences([load_record(two[0]), load_record(other)]))
    assert "folds first 3, other 4" in said
    assert "epochs first 12, other 9" in said


def test_one_study_is_not_a_comparison(two, lrtune_here):
    """Wrong usage, exit code 2."""
    assert lrtune_here("compare", two[0].path).returncode == 2


def test_the_course_of_a_search_only_falls(two):
    """The best value so far never rises, and ends with all epochs that were trained."""
    record = load_record(two[0])
    epochs, best = search_course(record)
    assert best == sorted(best, reverse=True)
    assert epochs == sorted(epochs)
    assert epochs[-1] == sum(t.epochs_run for t in record.trials)


def test_the_dashboard_shows_note_and_report(two):
    """Served over HTTP: the note has the recommendation, the artifact is the report, replaced in place."""
    from wsgiref.simple_server import WSGIRequestHandler, make_server

    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    study = two[0]
    record = load_record(study)
    write_results(record, study.output, render(record))
    report = study.output / "report.html"
    publish(study, record, report)
    report.write_text(report.read_text() + "<!-- anew -->")
    publish(study, record, report)
    assert len(list(artifact_folder(study).iterdir())) == 1
    storage = open_storage(study.storage_url, create=False)
    stored = optuna.load_study(study_name=study.name, storage=storage)
    assert optuna_dashboard.get_note(stored) == note(record)

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    app = optuna_dashboard.wsgi(storage, artifact_store=FileSystemArtifactStore(artifact_folder(study)))
    with make_server("127.0.0.1", 0, app, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            with urllib.request.urlopen(f"{base}/artifacts/{stored._study_id}/{stored.user_attrs[ARTIFACT]}") as answer:
                assert answer.headers["Content-Type"].startswith("text/html")
                assert answer.read().decode() == report.read_text()
            with urllib.request.urlopen(f"{base}/api/studies/{stored._study_id}") as answer:
                detail = json.load(answer)
        finally:
            server.shutdown()
            thread.join()
    answer = recommend(record)
    assert f"Train with {answer.configuration.describe()}" in detail["note"]["body"]


def test_programs_get_json(tiny, lrtune_here):
    """tune, status, range-test and check print one JSON object; progress is one object per line."""
    ended = lrtune_here("tune", tiny, "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["answer"] == json.loads((tiny.parent / "tiny_study" / "best.json").read_text())
    events = [json.loads(line) for line in ended.stderr.splitlines() if line.startswith("{")]
    assert {event["stage"] for event in events if "stage" in event} >= {"data", "range test", "trials", "done"}
    status = json.loads(lrtune_here("status", tiny, "--json").stdout)
    assert (status["finished"], status["total"], status["confirmed"]) == (8, 8, True)
    assert sum(status["counts"].values()) == 8
    bounds = json.loads(lrtune_here("range-test", tiny, "--json").stdout)["bounds"]
    assert [one["optimizer"] for one in bounds] == ["sgd", "adam"]
    assert json.loads(lrtune_here("check", tiny, "--json").stdout)["monitor"] == "val_loss"


def test_importance_finds_what_decides(tmp_path):
    """Made studies depend on the place of the rate above all; too few trials say nothing."""
    info = importance_info(load_record(make_study(tmp_path, "many", trials=200)))
    assert next(iter(info.shares)) == "learning rate"
    assert sum(info.shares.values()) == pytest.approx(1.0)
    assert importance_info(load_record(make_study(tmp_path, "few", trials=8))) is None


def test_figures_of_the_search_hold_what_is_stored(two):
    """Counts, best values, spans and shares are those of the trials."""
    record = load_record(two[0])
    table = cross_table(record)
    assert sum(table.counts.values()) == sum(t.outcome in ("complete", "pruned", "diverged") for t in record.trials)
    assert min(table.best.values()) == record.ranked()[0].value
    best_cell = max(table.strength, key=table.strength.get)
    assert table.best[best_cell] == record.ranked()[0].value
    history = history_info(record)
    assert history.best[-1] == record.ranked()[0].value
    assert list(history.best) == sorted(history.best, reverse=True)
    spans = timeline_info(record).spans
    assert sum(map(len, spans.values())) == sum(t.seconds is not None for t in record.trials)
    seconds = time_info(record).seconds
    spent = sum(t.seconds for t in record.trials if t.seconds is not None and t.configuration is not None)
    assert sum(sum(row.values()) for row in seconds.values()) == pytest.approx(spent)
    assert sum(one.count for one in divergences(record)) == record.count("diverged")
    assert sum(count for _, count in failures(record)) == record.count("failed")
    inside = inside_info(record)
    assert sum(map(len, inside.trials.values())) == sum(
        t.state in ("complete", "pruned") and t.configuration is not None for t in record.trials
    )
    low, _, high = inside.bounds[inside.best[0]]
    assert np.log(low) <= np.log(inside.best[1]) <= np.log(high)
