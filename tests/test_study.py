"""Whole studies: resume after Ctrl-C and kill -9, more trials, a changed meaning, a fixed seed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from pipeline.errors import KnownError
from pipeline.progress import Reporter
from pipeline.report.records import load_record, recommend
from pipeline.search.prepare import prepare
from pipeline.search.study import StudyRunner
from pipeline.study_file import read_study
from tests.conftest import PAUSING_OBJECTIVE, ROOT, pause


def tune(path: Path, *, fresh: bool = False, **overrides: object) -> optuna.Study:
    """Run a study in this process and return it as stored."""
    study = read_study(path, overrides)
    reporter = Reporter(quiet=True)
    StudyRunner(prepare(study, reporter), reporter).run(fresh=fresh)
    return stored(path)


def stored(path: Path) -> optuna.Study:
    """Return a study as stored, through Optuna alone."""
    return optuna.load_study(study_name=path.stem, storage=f"sqlite:///{path.parent}/studies.db")


def facts(study: optuna.Study) -> list[tuple]:
    """Return what makes a trial: number, state, parameters, value, rate and curves, of those that ended."""
    return [
        (t.number, t.state.name, t.params, t.value, t.user_attrs["learning_rate"], t.user_attrs["curves"])
        for t in study.trials
        if t.state.name in ("COMPLETE", "PRUNED")
    ]


def test_a_study_has_exactly_its_trials_with_the_default_first(tiny):
    """Trial 0 is Adam at 0.001, constant, unpruned; the range tests' suggestions come next."""
    study = tune(tiny)
    assert len(study.trials) == 8
    assert all(t.state.name in ("COMPLETE", "PRUNED") for t in study.trials)
    first = study.trials[0]
    assert first.user_attrs["baseline"]
    assert first.params["optimizer"] == "adam"
    assert first.params["decay"] == "constant"
    assert first.user_attrs["learning_rate"] == 0.001
    assert first.state.name == "COMPLETE"
    tests = study.user_attrs["range_test"]
    assert [t.params["optimizer"] for t in study.trials[1:3]] == ["sgd", "adam"]
    for trial in study.trials[1:3]:
        assert trial.user_attrs["learning_rate"] == pytest.approx(
            tests[trial.params["optimizer"]]["suggested"], rel=1e-3
        )


def test_the_value_is_the_best_epoch_of_the_mean_over_folds(tiny):
    """Not the mean of each fold's best epoch."""
    study = tune(tiny, trials=4)
    for trial in study.trials:
        if trial.state.name == "COMPLETE":
            folds = trial.user_attrs["curves"]["val_loss"]
            means = [sum(epoch) / len(epoch) for epoch in zip(*folds, strict=True)]
            assert trial.value == pytest.approx(min(means), rel=1e-5)


@pytest.mark.slow
def test_two_runs_with_one_seed_are_the_same_and_a_resumed_one_too(tiny, tmp_path):
    """Parameters, values and curves of a study in one piece, again, and in three pieces are identical."""
    whole = facts(tune(tiny))
    assert facts(tune(tiny, fresh=True)) == whole
    tune(tiny, fresh=True, trials=2)
    tune(tiny, trials=5)
    assert facts(tune(tiny)) == whole


def test_raising_the_trials_adds_the_difference(tiny):
    """8 after 5 runs 3 more and repeats none."""
    before = facts(tune(tiny, trials=5))
    after = facts(tune(tiny, trials=8))
    assert len(after) == 8
    assert after[:5] == before


def test_another_seed_gives_another_study(tiny):
    """The seed reaches weights, splits and sampler."""
    one = facts(tune(tiny, trials=2))
    other = facts(tune(tiny, trials=2, seed=1, fresh=True))
    assert one[0][3] != other[0][3]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"epochs": 4}, "epochs: was 3, is now 4"),
        ({"search.decays": ["constant"]}, "search.decays: was ['constant', 'cosine'], is now ['constant']"),
        ({"batch_size": 8}, "batch_size: was 16, is now 8"),
    ],
)
def test_a_changed_meaning_is_refused_with_the_difference_and_the_way_out(tiny, override, named):
    """The study in storage stays untouched."""
    before = facts(tune(tiny, trials=2))
    with pytest.raises(KnownError) as error:
        tune(tiny, trials=4, **override)
    message = str(error.value)
    assert named in message
    assert "Undo these changes" in message and "new name" in message and "--fresh" in message
    assert facts(stored(tiny)) == before


def test_changed_data_or_model_is_refused(tiny):
    """Another sample or another layer is another study."""
    tune(tiny, trials=1)
    script = tiny.parent / "tiny.py"
    original = script.read_text()
    script.write_text(original.replace("default_rng(0)", "default_rng(1)"))
    with pytest.raises(KnownError, match="the data's hash"):
        tune(tiny)
    script.write_text(original.replace("Dense(8", "Dense(9"))
    with pytest.raises(KnownError, match="the model's hash"):
        tune(tiny)
    script.write_text(original + "\n# a comment\n")
    assert len(tune(tiny, trials=2).trials) == 2


def test_a_changed_body_of_a_subclass_or_a_function_is_another_model(tiny):
    """What Keras describes only by name is told by its code; a comment there is no difference."""
    script = tiny.parent / "tiny.py"
    lines = script.read_text().splitlines()
    own = "\n".join("    model = Net()" if "keras.Sequential" in line else line for line in lines) + (
        "\n\nclass Net(keras.Model):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = keras.layers.Dense(8), keras.layers.Dense(2)\n\n"
        "    def call(self, x):\n        return self.b(self.a(x))\n"
    )
    script.write_text(own)
    tune(tiny, trials=1)
    script.write_text(own + "\n# a comment\n")
    assert len(tune(tiny, trials=2).trials) == 2
    script.write_text(own.replace("Dense(8)", "Dense(16)"))
    with pytest.raises(KnownError, match="the model's hash"):
        tune(tiny, trials=3)


def test_starting_over_does_not_cost_the_old_study_when_the_new_one_cannot_begin(tiny):
    """With --fresh and inputs that no optimizer can take, the old trials stay."""
    before = facts(tune(tiny, trials=2))
    script = tiny.parent / "tiny.py"
    loss = "keras.losses.SparseCategoricalCrossentropy(from_logits=True)"
    script.write_text(script.read_text().replace(loss, "lambda y, p: p[:, 0] * float('nan')"))
    with pytest.raises(KnownError, match="must have a finite loss"):
        tune(tiny, fresh=True)
    assert facts(stored(tiny)) == before


def test_a_metric_that_is_not_finite_in_an_epoch_neither_wins_nor_fails_the_trial(tiny):
    """NaN and infinity of the monitored metric are the worst value, also when maximizing."""
    script = tiny.parent / "tiny.py"
    metric = (
        "\n\ndef odd(y, p):\n    low = keras.ops.min(p)\n"
        "    nan_or_one = keras.ops.where(low < -3., float('nan'), 0.0 * low + 1.0)\n"
        "    return keras.ops.where(low < -5., float('inf'), nan_or_one)\n"
    )
    script.write_text(script.read_text().replace('"accuracy"', "odd") + metric)
    study = tune(tiny, monitor="val_odd", mode="max", **{"confirm.finalists": 0})
    assert {t.state.name for t in study.trials} <= {"COMPLETE", "PRUNED"}
    assert all(t.value == 1.0 for t in study.trials if t.state.name == "COMPLETE")


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("val_account_loss", "min"), ("val_price_loss", "min"), ("val_account_accuracy", "max"), ("val_loss", "min")],
)
def test_the_direction_is_that_of_the_metric_not_of_the_heads_name(tiny, metric, direction):
    """A head called "account" has a loss to be minimized."""
    script = tiny.parent / "tiny.py"
    script.write_text(
        script.read_text().replace("y[:100])", '{"account": y[:100], "price": y[:100]})')
        .replace("y[100:])", '{"account": y[100:], "price": y[100:]})').split("def build_model")[0]
        + "def build_model():\n    i = keras.Input((4,))\n"
        "    o = {n: keras.layers.Dense(1, activation='sigmoid', name=n)(i) for n in ('account', 'price')}\n"
        "    m = keras.Model(i, o)\n"
        "    m.compile(loss={n: 'binary_crossentropy' for n in o}, metrics={'account': ['accuracy']})\n    return m\n"
    )  # fmt: skip
    assert prepare(read_study(tiny, {"monitor": metric}), Reporter(quiet=True)).monitor.mode == direction


def test_hold_out_without_confirmation_has_an_answer_without_an_interval(tiny):
    """One paired run supports no interval; everything is written all the same."""
    import json

    from pipeline.report.export import write_results
    from pipeline.report.page import render

    tune(tiny, trials=3, **{"validation.scheme": "hold-out", "confirm.finalists": 0})
    record = load_record(read_study(tiny))
    write_results(record, tiny.parent / "out", render(record))
    best = json.loads((tiny.parent / "out" / "best.json").read_text())
    assert best["improvement"]["ci_low"] is None
    assert best["improvement"]["mean"] >= 0


@pytest.mark.slow
def test_a_timeout_leaves_time_for_the_search(tiny):
    """The first trial's tracing does not count against the rest: a study of seconds runs more than one trial."""
    study = tune(tiny, timeout="60s", **{"confirm.repeats": 20})
    assert len(study.trials) == 8


@pytest.mark.slow
def test_two_processes_share_one_study(tiny):
    """Started together they run each trial once, the default once, and no more than there are."""
    children = [spawn(tiny, "--trials", "14") for _ in range(2)]
    for child in children:
        _, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors.decode()
    study = stored(tiny)
    assert len(study.trials) == 14
    assert [t.user_attrs.get("baseline", False) for t in study.trials].count(True) == 1
    assert all(t.state.is_finished() for t in study.trials)
    record = load_record(read_study(tiny))
    assert record.confirm is not None
    assert all(len(record.confirm["values"][str(n)]) == 2 for n in record.confirm["candidates"])


def spawn(path: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start `lrtune tune` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "tune", str(path), *options],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for_trials(path: Path, count: int, child: subprocess.Popen[bytes]) -> None:
    """Wait until the running process has finished that many trials."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if child.poll() is not None:
            pytest.fail(f"the study ended by itself: {child.stderr.read().decode() if child.stderr else ''}")
        try:
            if sum(t.state.is_finished() for t in stored(path).trials) >= count:
                return
        except Exception:  # the study is not there yet
            pass
        time.sleep(0.05)
    pytest.fail("no trial finished in time")


LONG = {"trials": 40, "confirm.finalists": 0}
LONG_OPTIONS = ("--trials", "40", "--confirm.finalists", "0", "--epochs", "30")


def test_kill_9_at_any_moment_loses_and_replays_nothing(tiny):
    """After three kills the study ends with exactly its trials, none changed, in the order of an unbroken run."""
    done: list[tuple] = []
    for count in (1, 9, 20):
        child = spawn(tiny, *LONG_OPTIONS)
        wait_for_trials(tiny, count, child)
        child.send_signal(signal.SIGKILL)
        child.wait()
        finished = facts(stored(tiny))
        assert finished[: len(done)] == done
        done = finished
    study = tune(tiny, epochs=30, **LONG)
    assert [t.number for t in study.trials] == list(range(40))
    assert all(t.state.name in ("COMPLETE", "PRUNED") for t in study.trials)
    assert facts(study)[: len(done)] == done
    broken = facts(study)
    assert facts(tune(tiny, fresh=True, epochs=30, **LONG)) == broken


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_with_130_and_the_command_that_resumes(tiny, sign):
    """The trial that ran goes back into the queue; the report of what is there is written."""
    child = spawn(tiny, *LONG_OPTIONS)
    wait_for_trials(tiny, 3, child)
    child.send_signal(sign)
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 130
    assert f"Resume with: lrtune tune {tiny}" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert not [t for t in stored(tiny).trials if t.state.name == "RUNNING"]
    assert (tiny.parent / "tiny_study" / "report.html").exists()


def test_the_second_interruption_ends_at_once(tiny):
    """Also while a step of training does not come back, where the first can do nothing yet."""
    (tiny.parent / "tiny.py").write_text(PAUSING_OBJECTIVE)
    pause(tiny.parent, "1000")
    child = spawn(tiny)
    until = time.monotonic() + 300
    while not (tiny.parent / "paused").exists():
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    time.sleep(1)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 130
    assert "Resume with: lrtune tune" in errors.decode()


@pytest.mark.slow
def test_a_trial_whose_process_keeps_dying_is_given_up(tiny):
    """A third retry still runs to its end; one more counts as failed, with the reason, and nothing waits."""
    study = tune(tiny, trials=2)
    for retries, state in ((2, ("COMPLETE", "PRUNED")), (3, ("FAIL",))):
        trial = study.ask()  # as a process does that dies right after
        trial.set_user_attr("retries", retries)
        last = tune(tiny, trials=2).trials[-1]
        assert last.number == trial.number
        assert last.state.name in state
    assert last.user_attrs["error"] == "its process died 3 times"


def test_maximizing_a_metric(tiny):
    """`val_accuracy` is maximized without being told; the best trial has the highest value."""
    study = tune(tiny, monitor="val_accuracy", trials=6)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    answer = recommend(load_record(read_study(tiny, {"monitor": "val_accuracy"})))
    assert answer is not None
    complete = [t.value for t in study.trials if t.state.name == "COMPLETE"]
    assert study.best_value == max(complete)


def test_an_unknown_monitor_lists_what_there_is(tiny):
    """The message names the metrics that the model has."""
    with pytest.raises(KnownError, match="'val_auc' is not measured by the model; it has val_loss, val_accuracy"):
        tune(tiny, monitor="val_auc")


def test_a_sweep_runs_every_rate_once_and_no_range_test(tiny):
    """`values` tries each of them and nothing else but the default, however many trials are asked for."""
    study = tune(
        tiny,
        trials=40,
        **{
            "search.optimizers": ["sgd", "adam"],
            "search.decays": ["constant"],
            "search.learning_rate": {"values": [0.1, 0.001]},
        },
    )
    assert study.user_attrs["range_test"] == {}
    tried = [(t.params["optimizer"], t.user_attrs["learning_rate"]) for t in study.trials]
    assert tried == [("adam", 0.001), ("sgd", 0.1), ("adam", 0.1), ("sgd", 0.001)]


def test_hold_out_validation(tiny):
    """One fold, the stated fraction."""
    study = tune(tiny, trials=3, **{"validation.scheme": "hold-out", "validation.fraction": 0.3})
    assert study.user_attrs["about"]["fold_sizes"] == [[70, 30]]
    assert all(len(t.user_attrs["curves"]["loss"]) == 1 for t in study.trials)


def test_a_diverging_trial_is_pruned_and_says_where(tiny):
    """Rates far too high end as PRUNED with fold, epoch, step and reason, never FAIL."""
    study = tune(
        tiny,
        trials=3,
        **{
            "search.optimizers": ["sgd"],
            "search.decays": ["constant"],
            "search.learning_rate": {"values": [1e6, 0.1]},
        },
    )
    diverged = study.trials[1]
    assert diverged.user_attrs["learning_rate"] == 1e6
    assert diverged.state.name == "PRUNED"
    assert diverged.user_attrs["verdict"] == "diverged"
    at = diverged.user_attrs["diverged_at"]
    assert at["fold"] == 1 and at["epoch"] >= 1 and at["step"] >= 1
    assert "loss" in at["reason"]
    assert study.trials[2].state.name == "COMPLETE"


def test_an_exception_in_trials_is_recorded_and_many_in_a_row_stop_the_study(tiny, monkeypatch):
    """A trial that raises is a failed trial with its message; five in a row stop with the commonest cause."""
    from pipeline.search import running as module

    real, calls = module.run_trial, []

    def flaky(*arguments, **options):
        calls.append(1)
        if len(calls) in (2, 3) or len(calls) > 5:
            raise MemoryError("out of memory")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "run_trial", flaky)
    with pytest.raises(KnownError, match=r"five trials in a row failed.*MemoryError: out of memory"):
        tune(tiny, trials=20)
    states = [t.state.name for t in stored(tiny).trials]
    assert states[1:3] == ["FAIL", "FAIL"]
    assert states[3] in ("COMPLETE", "PRUNED")
    assert "MemoryError" in stored(tiny).trials[1].user_attrs["error"]


def test_status_says_what_optuna_reads(tiny):
    """The counts, the best value and its trial are those of Optuna's own loading."""
    from pipeline.report.status import status_of

    study = tune(tiny, trials=6, **{"confirm.finalists": 0})
    text = status_of(read_study(tiny, {"confirm.finalists": 0, "trials": 9})).text()
    complete = sum(t.state.name == "COMPLETE" for t in study.trials)
    assert text.startswith("tiny_study: 6 of 9 trials")
    assert f"{complete} ran through" in text
    assert f"best val_loss {study.best_value:.5g}" in text
    assert f"(trial {study.best_trial.number})" in text
    assert "of trials left" in text


def test_status_of_a_sweep_counts_its_points(tiny):
    """Four rates are four trials, whatever `trials` says; after them nothing is left to do."""
    from pipeline.report.status import status_of

    tiny.write_text(
        tiny.read_text()
        .replace('optimizers = ["sgd", "adam"]', 'optimizers = ["adam"]')
        .replace(
            'decays     = ["constant", "cosine"]',
            'decays = ["constant"]\nlearning_rate = { values = [0.1, 0.01, 0.001] }',
        )
        .replace("trials     = 8", "trials = 60")
    )
    study = tune(tiny)
    found = status_of(read_study(tiny))
    assert (found.finished, found.total, found.seconds_left) == (len(study.trials), 3, None)
    assert found.confirmed and not found.stopped


def test_a_key_that_came_later_means_its_default_in_an_older_study(tiny, monkeypatch):
    """Older studies resume; one whose file sets the new key to something else does not."""
    from pipeline import study_file

    study = tune(tiny)
    definition = dict(study.user_attrs["definition"])
    for key in ("pruning.pruner", "validation.stratify"):  # as if these had come with this version
        definition.pop(key)
    study.set_user_attr("definition", definition)
    assert len(tune(tiny, trials=9).trials) == 9
    with pytest.raises(KnownError, match=r"pruning\.pruner: was median, is now none"):
        tune(tiny, trials=10, **{"pruning.pruner": "none"})
    monkeypatch.setattr(study_file, "CAME_WITH", {"pruning.pruner": "none"})  # its default has changed since
    assert len(tune(tiny, trials=10, **{"pruning.pruner": "none"}).trials) == 10
    with pytest.raises(KnownError, match=r"pruning\.pruner: was none, is now median"):
        tune(tiny, trials=11)


def test_what_was_proven_is_remembered_with_the_study(tiny, monkeypatch):
    """A study that resumes does not prove itself again; one of a version that did not, does so once."""
    from pipeline.search import study as module

    proven, prove = [], module.prove
    monkeypatch.setattr(module, "prove", lambda prepared: proven.append(1) or prove(prepared))
    study = tune(tiny)
    tune(tiny, trials=9)
    assert len(proven) == 1
    assert set(study.user_attrs["proof"]["way"]) == {"xla", "plain", "form", "any_batch"}
    with sqlite3.connect(tiny.parent / "studies.db") as database:
        database.execute("DELETE FROM study_user_attributes WHERE key = 'proof'")
    tune(tiny, trials=10)
    tune(tiny, trials=11)
    assert len(proven) == 2
