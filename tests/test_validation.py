"""Validation schemes, quick runs on fewer samples, and objectives with parameters."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ObjectiveError
from pipeline.objective import load_objective
from pipeline.training.splits import make_splits

PARAMETERS = """
import keras
import numpy as np


def load_data(samples=100, form="two"):
    x = np.arange(samples, dtype="float32")[:, None] * np.ones((1, 4), "float32")
    y = (np.arange(samples) % 3).astype("int64")
    if form == "one":
        return x, y
    if form == "three":
        return (x[: samples - 40], y[: samples - 40]), (x[-40:-15], y[-40:-15]), (x[-15:], y[-15:])
    return (x[: samples - 20], y[: samples - 20]), (x[-20:], y[-20:])


def groups(samples=100, form="two"):
    return [f"patient {i // 10}" for i in range(samples - {"one": 0, "two": 20, "three": 40}[form])]


def build_model(units=8):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
"""


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(12, 60), st.integers(0, 3), st.integers(0, 99))
def test_every_scheme_keeps_its_promise(folds, samples, gap, seed):
    """K-fold validates every sample once per repeat; groups stay together; time runs forward over the gap."""
    labels = np.random.default_rng(seed).integers(0, 2, samples)
    group = np.random.default_rng(seed).integers(0, 12, samples)
    common = {"folds": folds, "fraction": 0.2, "seed": seed}
    repeated = make_splits(samples, None, repeats=2, **common)
    assert len(repeated) == 2 * folds
    assert (np.bincount(np.concatenate([held for _, held in repeated])) == 2).all()
    if len(np.unique(group)) >= folds:
        for stratify in (None, labels):
            pairs = make_splits(samples, stratify, groups=group, **common)
            assert sorted(np.concatenate([held for _, held in pairs])) == list(range(samples))
            for train, held in pairs:
                assert len(held)
                assert not set(group[train]) & set(group[held])
    if len(np.unique(group)) > 1:
        ((train, held),) = make_splits(samples, labels, groups=group, folds=1, fraction=0.2, seed=seed)
        assert sorted([*train, *held]) == list(range(samples))
        assert not set(group[train]) & set(group[held])
        assert len(set(group[held])) == max(1, round(0.2 * len(np.unique(group))))
    if samples // (folds + 1) > gap:
        for train, held in make_splits(samples, None, ordered=True, gap=gap, **common):
            assert train.max() + gap < held.min()
            assert len(train)
    else:
        with pytest.raises(ObjectiveError, match="leaves no training"):
            make_splits(samples, None, ordered=True, gap=gap, **common)


@pytest.fixture
def parametric(tmp_path):
    """An objective with parameters; loads it."""
    (tmp_path / "mine.py").write_text(PARAMETERS)
    return lambda **options: load_objective("mine.py", tmp_path, **options)


def test_parameters_reach_the_functions_that_name_them(parametric):
    """Data, groups and model get theirs; one that nobody names is refused with the nearest."""
    objective = parametric(kwargs={"samples": 60, "units": 5}, grouped=True)
    assert objective.train.samples == 40
    assert len(objective.groups) == 40
    assert objective.build_model().layers[0].units == 5
    with pytest.raises(ObjectiveError, match=r"objective\.kwargs\.unit: no function .* did you mean 'units'"):
        parametric(kwargs={"unit": 5})


def test_a_function_named_groups_is_left_alone_where_the_study_does_not_ask(tmp_path):
    """A script may use the name for something else."""
    text = PARAMETERS.replace('def groups(samples=100, form="two"):', "def groups(needed):")
    assert text != PARAMETERS
    (tmp_path / "other.py").write_text(text)
    assert load_objective("other.py", tmp_path).groups is None


def test_a_limit_takes_fewer_training_samples_and_leaves_test_and_validation_alone(parametric):
    """As a number or a share; the same ones for a seed; in the order of time the last ones."""
    limited = parametric(limit=30, grouped=True)
    assert (limited.train.samples, limited.test.samples, len(limited.groups)) == (30, 20, 30)
    np.testing.assert_array_equal(limited.groups, limited.train.x[:, 0] // 10)
    assert parametric(limit=0.5).train.samples == 40
    np.testing.assert_array_equal(limited.train.x, parametric(limit=30).train.x)
    assert (parametric(limit=30, seed=1).train.x != limited.train.x).any()
    np.testing.assert_array_equal(parametric(limit=30, ordered=True).train.x[:, 0], np.arange(50, 80))
    own = parametric(limit=30, kwargs={"form": "three", "samples": 120})
    assert (own.train.samples, own.given, own.test.samples) == (30 + 25, 30, 15)
    np.testing.assert_array_equal(own.train.x[30:, 0], np.arange(80, 105))


def test_the_test_set_is_held_out_as_the_scheme_wants_it(parametric):
    """From (x, y) alone: whole groups, or what comes last in time."""
    by_group = parametric(kwargs={"form": "one"}, grouped=True)
    assert not set(by_group.train.x[:, 0] // 10) & set(by_group.test.x[:, 0] // 10)
    assert 20 <= by_group.test.samples <= 30
    in_time = parametric(kwargs={"form": "one"}, ordered=True)
    np.testing.assert_array_equal(in_time.test.x[:, 0], np.arange(80, 100))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "kwargs", "runs"),
    [
        ('"repeated-k-fold"\nrepeats = 2', "", 4),
        ('"group-k-fold"', "", 2),
        ('"time-series"\ngap = 2', "", 2),
        ('"given"', 'form = "three"', 1),
    ],
)
def test_a_study_runs_under_every_scheme(tmp_path, lrtune_here, scheme, kwargs, runs):
    """From check to fit; every trial that ran through has as many runs as the scheme says."""
    learnable = PARAMETERS.replace("    if form ==", '    x = np.eye(4, dtype="float32")[y]\n    if form ==', 1)
    (tmp_path / "mine.py").write_text(learnable)
    study = tmp_path / "mine.toml"
    study.write_text(
        f'epochs = 8\ntrials = 3\nbatch_size = 8\nlimit = 60\n[objective]\npath = "mine.py"\nkwargs = {{ {kwargs} }}\n'
        '[search]\noptimizers = ["sgd"]\nlearning_rate = { low = 0.3, high = 1.0 }\n'
        f"[validation]\nscheme = {scheme}\n"
        + ("folds = 2\n" if runs > 1 else "")
        + "[confirm]\nfinalists = 1\nrepeats = 2\n"
    )
    for command in ("check", "tune", "fit"):
        ended = lrtune_here(command, study)
        assert ended.returncode == 0, ended.stderr
    trials = pd.read_csv(tmp_path / "mine" / "trials.csv")
    assert set(trials.loc[trials["state"] == "complete", "folds_run"]) == {runs}
    assert json.loads((tmp_path / "mine" / "best.json").read_text())["objective"] == "mine.py"
    study.write_text(study.read_text().replace("limit = 60", "limit = 59"))
    ended = lrtune_here("tune", study)
    assert ended.returncode == 1
    assert "limit: was 60, is now 59" in ended.stderr


def test_parameters_can_be_given_as_options(tmp_path, lrtune_here):
    """One by one, beside a bare path; an unknown one is refused as in the file."""
    (tmp_path / "mine.py").write_text(PARAMETERS)
    study = tmp_path / "mine.toml"
    study.write_text('objective = "mine.py"\nbatch_size = 8\n')
    ended = lrtune_here("check", study, "--objective.kwargs.samples", "70")
    assert ended.returncode == 0, ended.stderr
    assert "50 samples" in ended.stdout
    assert "did you mean 'samples'" in lrtune_here("check", study, "--objective.kwargs.sample", "70").stderr


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ('[validation]\nscheme = "given"', "'given' needs load_data() to return (x_train, y_train)"),
        (
            '[objective]\npath = "mine.py"\nkwargs = { form = "three" }\n[validation]\nscheme = "k-fold"',
            "must be 'given'",
        ),
        ("limit = 10\nfraction = 0.5", "fraction: limit says already how many"),
        ('[validation]\nscheme = "kfold"', "did you mean 'k-fold'"),
        ('[validation]\nscheme = "time-series"\nfolds = 40\ngap = 30', "leaves no training samples"),
    ],
)
def test_schemes_that_do_not_fit_are_refused(tmp_path, lrtune_here, keys, rule):
    """With the rule and the remedy, before anything is written."""
    (tmp_path / "mine.py").write_text(PARAMETERS)
    head = "" if "[objective]" in keys else 'objective = "mine.py"\n'
    (tmp_path / "mine.toml").write_text(head + keys + "\n")
    ended = lrtune_here("tune", tmp_path / "mine.toml")
    assert ended.returncode == 1
    assert rule in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "studies.db").exists()
