"""Result files: complete, exact, readable without TensorFlow, safe with hostile names."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pipeline.errors import KnownError
from pipeline.progress import Reporter
from pipeline.report.doubts import doubts_of
from pipeline.report.export import check_writable, write_files, write_results
from pipeline.report.figures.curves import curves_info
from pipeline.report.figures.mattered import landscape_info
from pipeline.report.figures.range_tests import range_test_info
from pipeline.report.page import render
from pipeline.report.records import load_record, recommend
from pipeline.report.summary import _evidence, summary
from pipeline.search.intervals import Interval
from pipeline.search.prepare import prepare
from pipeline.search.study import StudyRunner
from pipeline.study_file import Study, read_study
from pipeline.training.decays import rate_table
from tests.conftest import ROOT, TINY_OBJECTIVE, TINY_STUDY

FILES = {
    "report.html",
    "best.json",
    "best.py",
    "trials.csv",
    "curves.csv",
    "range_test.csv",
    "bounds.csv",
    "overfitting.csv",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Study:
    """A finished study whose name and path are hostile to HTML and to shells."""
    folder = tmp_path_factory.mktemp("report <b>&'\"é")
    (folder / "tiny.py").write_text(TINY_OBJECTIVE)
    path = folder / "a<script>alert(1)<.toml"
    path.write_text(TINY_STUDY)
    study = read_study(path)
    StudyRunner(prepare(study, Reporter(quiet=True)), Reporter(quiet=True)).run()
    record = load_record(study)
    write_results(record, study.output, render(record))
    return study


def test_every_file_of_the_contract_is_there_and_no_other(finished):
    """Eight files, none half-written beside them."""
    assert {path.name for path in finished.output.iterdir()} == FILES


def test_best_json_has_exactly_the_keys_of_the_contract(finished):
    """Names and kinds of values as documented."""
    best = json.loads((finished.output / "best.json").read_text())
    assert list(best) == [
        "study", "objective", "recommended", "optimizer", "learning_rate", "decay", "final_fraction", "epochs",
        "batch_size", "momentum", "weight_decay", "warmup_fraction", "monitor", "mode", "value", "value_std", "trial",
        "baseline", "improvement", "tied_with", "doubts",
    ]  # fmt: skip
    assert best["baseline"]["optimizer"] == "adam"
    assert best["baseline"]["learning_rate"] == 0.001
    assert best["study"] == finished.name
    if best["improvement"] is not None:
        gain = best["baseline"]["value"] - best["value"]
        assert best["improvement"]["mean"] == pytest.approx(gain, rel=1e-6)
        assert best["improvement"]["ci_low"] <= gain <= best["improvement"]["ci_high"]


def test_best_py_runs_and_gives_the_studys_rate_at_every_step(finished):
    """The pasted schedule equals the table that the winning trial trained with."""
    best = json.loads((finished.output / "best.json").read_text())
    scope: dict = {}
    exec((finished.output / "best.py").read_text(), scope)
    steps = 3 * -(-load_record(finished).about["fold_sizes"][0][0] // 16)
    table = rate_table(best["decay"], best["learning_rate"], best["final_fraction"] or 1.0, steps)
    schedule = scope["learning_rate"]
    rates = [float(schedule(i)) if callable(schedule) else schedule for i in range(steps)]
    np.testing.assert_allclose(rates, table, rtol=2e-5)
    assert scope["optimizer"].__class__.__name__.lower() in ("sgd", "adam")
    assert scope["EPOCHS"] == best["epochs"]


def test_the_tables_agree_with_each_other(finished):
    """A row per trial; a row per trial, fold and epoch; bounds within the ramp."""
    trials, curves = (pd.read_csv(finished.output / f"{name}.csv") for name in ("trials", "curves"))
    assert trials["number"].tolist() == list(range(8))
    assert (curves.groupby("trial").size().reindex(trials["number"], fill_value=0) == trials["epochs_run"]).all()
    assert {"learning_rate", "loss", "accuracy", "val_loss", "val_accuracy"} <= set(curves.columns)
    first = curves[curves["epoch"] == 1].groupby("trial")["learning_rate"].first()
    np.testing.assert_allclose(first, trials.set_index("number")["learning_rate"].loc[first.index], rtol=1e-9)
    complete = trials[trials["state"] == "complete"]
    means = curves.groupby(["trial", "epoch"])["val_loss"].mean().groupby("trial").min()
    np.testing.assert_allclose(complete["value"], means.loc[complete["number"]], rtol=1e-5)
    bounds = pd.read_csv(finished.output / "bounds.csv")
    assert (bounds["low"] < bounds["high"]).all()
    ramp = pd.read_csv(finished.output / "range_test.csv")
    assert set(ramp["optimizer"]) == set(bounds["optimizer"]) == {"sgd", "adam"}


class Page(HTMLParser):
    """Collects tags, scripts' sources and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.scripts, self.headings, self._inside = [], 0, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.scripts += tag == "script"
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self._inside in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())


def test_the_report_is_one_file_without_external_requests(finished):
    """Nothing is loaded from elsewhere; it is under 6 MB."""
    text = (finished.output / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith(("data:", "#")) or link.endswith(".csv") for link in page.links)
    assert len(text.encode()) < 6_000_000


def test_user_text_is_escaped_in_the_report(finished):
    """A study name that is a script tag is shown as text."""
    text = (finished.output / "report.html").read_text()
    assert "<script>alert(1)" not in text
    assert "a&lt;script&gt;alert(1)&lt;" in text


def test_the_report_gives_the_answer_first(finished):
    """The first heading after the name is the recommendation."""
    headings = Page((finished.output / "report.html").read_text()).headings
    answer = recommend(load_record(finished))
    assert headings[1] == f"Train with {answer.configuration.describe()} for {answer.epochs} epochs"


def test_figures_are_made_of_plain_data(finished):
    """What is drawn equals what is stored."""
    record = load_record(finished)
    infos = range_test_info(record)
    assert [info.optimizer for info in infos] == ["sgd", "adam"]
    assert all(info.low <= info.suggested <= info.high for info in infos)
    best = record.ranked()[0]
    info = curves_info(record, best)
    assert info.epochs == [1, 2, 3]
    assert len(info.validation_folds) == 3
    np.testing.assert_allclose(info.validation, np.mean(best.curves["val_loss"], axis=0))
    points = landscape_info(record)
    drawn = sum(len(p["rate"]) for p in points.values())
    assert drawn == sum(t.outcome in ("complete", "pruned") for t in record.trials)


def test_report_and_status_need_no_tensorflow(finished, lrtune):
    """Both run in a Python in which TensorFlow and Keras cannot be imported."""
    for command in ("report", "status"):
        code = (
            "import sys\nfor name in ('tensorflow', 'keras'): sys.modules[name] = None\n"
            f"sys.argv = ['lrtune', '{command}', sys.argv[1]]\nfrom pipeline.cli import main\nmain()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(finished.path)],
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "trials" in done.stdout or "Train with" in done.stdout


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """A fault while writing leaves the old file and no fragment."""
    write_files(tmp_path, {"a.txt": "old"})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(KnownError, match=r"No space left on device.*free some space"):
        write_files(tmp_path, {"a.txt": "new"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_results_folder_that_is_a_file_is_refused(tmp_path):
    """Checked before any work, and nothing is written."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(KnownError, match=r"need a folder, but .*taken is a file"):
        check_writable(tmp_path / "taken" / "below")
    check_writable(tmp_path / "new" / "below")
    assert [p.name for p in Path(tmp_path).iterdir()] == ["taken"]


def test_repeats_that_share_their_split_have_the_plain_paired_interval(finished):
    """With validation data of the user's own, as SciPy has it; the answer says what it speaks of."""
    record = load_record(finished)
    default, other = record.baseline.number, next(t.number for t in record.ranked() if not t.baseline)
    values = {str(default): [[0.62], [0.94], [0.87], [1.08]], str(other): [[0.31], [0.36], [0.35], [0.36]]}
    confirm = {"values": values, "candidates": [default, other], "repeats": 4}
    fresh, shared = (
        replace(record, confirm=confirm, definition={**record.definition, "validation.scheme": scheme})
        for scheme in ("hold-out", "given")
    )
    plain = stats.ttest_rel([0.62, 0.94, 0.87, 1.08], [0.31, 0.36, 0.35, 0.36]).confidence_interval()
    interval = recommend(shared).improvement
    assert (interval.low, interval.high) == (pytest.approx(plain.low), pytest.approx(plain.high))
    assert "on this validation data" in summary(shared, [])
    wider = recommend(fresh).improvement
    assert wider.low < interval.low and wider.high > interval.high
    assert "on this validation data" not in summary(fresh, [])


def test_a_search_that_mostly_diverged_says_so(finished):
    """Not where half of the trials ran, nor where there were few."""
    record = load_record(finished)
    assert len(record.trials) == 8
    for count, said in ((4, False), (5, True)):
        trials = [replace(t, diverged_at=(0, 3) if i < count else None) for i, t in enumerate(record.trials)]
        found = doubts_of(replace(record, trials=trials), recommend(record))
        assert any(f"{count} of 8 trials diverged" in doubt for doubt in found) is said
    few = [replace(t, diverged_at=(0, 3)) for t in record.trials[:3]]
    assert not any("diverged:" in doubt for doubt in doubts_of(replace(record, trials=few), recommend(record)))


def test_two_repeats_are_no_interval(finished):
    """A hold-out confirmed twice says so in place of bounds that look absurd; equal repeats say what was fixed."""
    record = load_record(finished)
    answer = recommend(record)
    assert answer is not None
    wide = Interval(0.08, -0.41, 0.57)
    two = replace(answer, fold_runs=2, improvement=wide, tied_with=())
    assert "two repeats can hardly tell anything" in two.headline
    assert not two.tells
    assert "interval" not in _evidence(two)
    same = replace(answer, fold_runs=5, improvement=Interval(0.1, 0.1, 0.1), value_std=0.0)
    assert "weights, the samples and their order" in str(same.sameness)
    assert replace(answer, fold_runs=5, improvement=wide, value_std=0.1).sameness is None
