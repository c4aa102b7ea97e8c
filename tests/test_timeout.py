"""A study's time: kept to within an epoch, with an answer from what there is; what was cut goes on later."""

from __future__ import annotations

import json
import math

from optuna.trial import TrialState

from pipeline.report.records import load_record, recommend
from pipeline.search.deadline import ENDLESS, Deadline
from pipeline.study_file import read_study
from tests.conftest import PAUSING_OBJECTIVE, TINY_STUDY, pause
from tests.test_study import stored, tune


def slow_study(folder, steps: str):
    """Write a study whose steps take so many seconds."""
    (folder / "tiny.py").write_text(PAUSING_OBJECTIVE)
    (folder / "tiny_study.toml").write_text(
        TINY_STUDY.replace("trials     = 8", "trials     = 8\n[engine]\nxla = false").replace(
            "epochs     = 3", "epochs = 40"
        )
    )
    pause(folder, steps)
    return folder / "tiny_study.toml"


def test_a_study_whose_first_trial_is_too_long_still_answers(tmp_path, lrtune_here):
    """Its best epoch so far, said to be little; the trial waits, and goes on from there at the next run."""
    path = slow_study(tmp_path, "0.03")
    ended = lrtune_here("tune", path, "--timeout", "6s")
    assert ended.returncode == 0, ended.stderr
    assert "are used up after" in ended.stderr
    first = stored(path).trials[0]
    assert first.state == TrialState.WAITING
    trained = len(first.user_attrs["partial"]["loss"][0])
    assert trained >= 1
    best = json.loads((tmp_path / "tiny_study" / "best.json").read_text())
    assert best["optimizer"] == "adam" and 1 <= best["epochs"] <= trained
    assert any("time was up before a trial had run through" in doubt for doubt in best["doubts"])
    assert best["improvement"] is None
    assert "the best so far, since no trial has run through" in ended.stdout
    assert (tmp_path / "tiny_study" / "checkpoints" / "trial-0.npz").exists()

    pause(tmp_path, "0")
    ended = lrtune_here("tune", path, "--epochs", "40", "--confirm.finalists", "0")
    assert ended.returncode == 0, ended.stderr
    trials = stored(path).trials
    assert all(t.state.is_finished() for t in trials)
    assert trials[0].user_attrs["partial"] is None
    assert len(trials[0].user_attrs["curves"]["loss"][0]) == 40
    answer = recommend(load_record(read_study(path)))
    assert answer is not None and answer.trial.state == "complete"


def test_a_trial_that_was_cut_ends_as_if_it_had_not_been(tmp_path):
    """Curves of the interrupted study are those of one without a timeout, to the last digit."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    cut, whole = slow_study(tmp_path / "a", "0.03"), slow_study(tmp_path / "b", "0")
    tune(cut, timeout="6s", trials=2)
    pause(tmp_path / "a", "0")
    curves = [tune(path, trials=2).trials[0].user_attrs["curves"] for path in (cut, whole)]
    assert curves[0] == curves[1]


def test_a_confirmation_that_was_cut_counts_with_its_whole_repeats(tiny):
    """The answer says by how many, and the rest is run later."""
    study = tune(tiny)
    kept = dict(study.user_attrs["confirm"])
    numbers = [str(n) for n in kept["candidates"]]
    values = {n: kept["values"][n][: 2 - i] for i, n in enumerate(numbers)}  # one candidate has lost a repeat
    study.set_user_attr("confirm", {**kept, "values": values})
    record = load_record(read_study(tiny))
    assert record.confirmed_repeats == 1
    answer = recommend(record)
    assert answer is not None and answer.confirmed and answer.fold_runs == 3
    tune(tiny)
    assert dict(stored(tiny).user_attrs["confirm"]) == kept


def test_a_deadline_that_is_not_there_never_passes():
    """However much is kept for something else."""
    assert not ENDLESS.passed(math.inf)
    assert Deadline(10.0, 0.0).passed()
