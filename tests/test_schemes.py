"""Every optimizer under every decay scheme: the exported code, and whole studies of the less usual ones."""

from __future__ import annotations

import json
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest

from pipeline.report.export import keras_code
from pipeline.search.space import Configuration
from pipeline.search.trial import Monitor, run_trial
from pipeline.training.decays import DECAYS, Plateau
from pipeline.training.engine import Engine
from pipeline.training.optimizers import OPTIMIZERS, build_optimizer
from pipeline.training.splits import Split
from tests.test_engine import LABELS, X, dense, make_data

EPOCHS, STEPS = 4, 7
RECORD = SimpleNamespace(
    about={"fold_sizes": [[110, 40]], "batch_size": 16, "epochs": EPOCHS},
    monitor=Monitor("val_accuracy", "max"),
    batch_size=lambda configuration: 16,
)


def exported(configuration: Configuration) -> dict[str, object]:
    """Run best.py's code."""
    scope: dict[str, object] = {}
    exec(keras_code(RECORD, SimpleNamespace(configuration=configuration, epochs=3)), scope)
    return scope


@pytest.mark.parametrize("warm_up", [None, 0.25])
@pytest.mark.parametrize("decay", DECAYS)
def test_exported_code_runs_and_gives_the_rate_at_every_step(decay, warm_up):
    """For every optimizer; its settings are the study's, and the optimizer can train with the schedule."""
    if decay == "plateau":
        warm_up = None  # never drawn together
    for name in OPTIMIZERS:
        configuration = Configuration(name, 0.02, decay, 0.01, warm_up, clipnorm=1.0)
        scope = exported(configuration)
        schedule, optimizer = scope["learning_rate"], scope["optimizer"]
        rates = [float(schedule(i)) if callable(schedule) else schedule for i in range(EPOCHS * STEPS)]
        np.testing.assert_allclose(rates, configuration.rates(EPOCHS * STEPS), rtol=5e-5)
        expected = build_optimizer(configuration.spec, 0.02).get_config()
        config = optimizer.get_config()
        for changing in ("learning_rate", "name"):
            del config[changing], expected[changing]
        assert config == expected
        assert ("callbacks" in scope) == (decay == "plateau")
    variable = keras.Variable([1.0, 2.0])
    optimizer.apply([keras.ops.array([0.1, 0.1])], [variable])
    assert np.isfinite(variable.numpy()).all()


def test_settings_that_were_searched_are_exported():
    """Momentum and weight decay replace the usual ones."""
    assert exported(Configuration("momentum", 0.1, "constant", momentum=0.5))["optimizer"].momentum == 0.5
    assert exported(Configuration("adamw", 0.1, "constant", weight_decay=0.3))["optimizer"].weight_decay == 0.3


def test_plateau_in_the_engine_lowers_the_rate_as_its_rule_says():
    """The recorded rates follow from the recorded validation values; a rate too high for the task drops."""
    engine = Engine(dense, make_data("test", X, LABELS), batch_size=16)
    splits = [Split(np.arange(110, dtype=np.int32), np.arange(110, 150, dtype=np.int32), seed) for seed in (1, 2)]
    outcome = run_trial(
        engine, Configuration("sgd", 1.5, "plateau", 0.001), splits, epochs=12, monitor=Monitor("val_loss", "min")
    )
    assert outcome.diverged_at is None
    for rates, values in zip(outcome.curves["learning_rate"], outcome.curves["val_loss"], strict=True):
        rule = Plateau(0.001, 12)
        for rate, value in zip(rates, values, strict=True):
            assert rate == pytest.approx(1.5 * rule.share)
            rule.after_epoch(value)
        assert rates[-1] < rates[0]


@pytest.mark.slow
def test_a_study_of_unusual_schemes_ends_with_code_and_a_model(tiny, lrtune_here):
    """From range test to fit, with a warm-up, searched momenta and a scheme that reacts to validation."""
    text = tiny.read_text().replace('["sgd", "adam"]', '["momentum", "schedule-free-adamw", "lion"]')
    text = text.replace('["constant", "cosine"]', '["1cycle", "plateau", "cosine_restarts", "polynomial"]')
    text = text.replace(
        "[validation]",
        "momentum = { low = 0.8, high = 0.99 }\nwarmup_fraction = { values = [0.0, 0.2] }\n\n[validation]",
    )
    tiny.write_text(text)
    ended = lrtune_here("tune", tiny, "--trials", "14")
    assert ended.returncode == 0, ended.stderr
    folder = tiny.parent / tiny.stem
    trials = pd.read_csv(folder / "trials.csv")
    assert set(trials["decay"]) > {"1cycle", "plateau"}
    assert set(trials.loc[trials["optimizer"] == "momentum", "momentum"]) <= {0.8, 0.9054, 0.9553, 0.9789, 0.99}
    assert set(trials["warmup_fraction"].dropna()) == {0.0, 0.2}
    best = json.loads((folder / "best.json").read_text())
    scope: dict[str, object] = {}
    exec((folder / "best.py").read_text(), scope)
    assert scope["EPOCHS"] == best["epochs"]
    ended = lrtune_here("fit", tiny)
    assert ended.returncode == 0, ended.stderr
    assert lrtune_here("status", tiny, "--trials", "14").returncode == 0


@pytest.mark.slow
def test_batch_size_is_searched_and_exported(tiny, lrtune_here):
    """Every size is tried; tables, curves and code carry the size of their trial."""
    tiny.write_text(tiny.read_text().replace("[validation]", "batch_size = { low = 8, high = 64 }\n\n[validation]"))
    ended = lrtune_here("tune", tiny, "--trials", "14")
    assert ended.returncode == 0, ended.stderr
    folder = tiny.parent / tiny.stem
    trials = pd.read_csv(folder / "trials.csv")
    assert set(trials["batch_size"]) > {8, 64}
    best = json.loads((folder / "best.json").read_text())
    assert best["batch_size"] == trials.loc[best["trial"], "batch_size"]
    scope: dict[str, object] = {}
    exec((folder / "best.py").read_text(), scope)
    assert scope["BATCH_SIZE"] == best["batch_size"]
    assert lrtune_here("fit", tiny).returncode == 0


@pytest.mark.parametrize(
    ("added", "rule"),
    [
        ("batch_size = { low = 64, high = 8 }", "low must be below high"),
        ("momentum = { values = [0.9, 1.0] }", "must be below 1, got 1"),
        ("momentum = { values = [0.9] }", "momentum is searched, but no optimizer here has it; add one of momentum"),
        ("clipnorm = { low = 0.0, high = 1.0 }", "must be above 0"),
        ("weight_decay = { low = 0.1 }", "takes { low = ..., high = ... } or { values = [...] }"),
    ],
)
def test_nonsense_in_further_dimensions_is_refused(tiny, lrtune_here, added, rule):
    """With rule and remedy."""
    tiny.write_text(tiny.read_text().replace("[validation]", f"{added}\n\n[validation]"))
    ended = lrtune_here("check", tiny)
    assert ended.returncode == 1
    assert rule in ended.stderr


def test_doubts_come_with_the_answer(tiny, lrtune_here):
    """A tiny study says that its validation is too small, in the terminal and in the report."""
    ended = lrtune_here("tune", tiny)
    assert "Note: Each validation value rests on 33 samples" in ended.stdout
    assert "rests on 33 samples" in (tiny.parent / tiny.stem / "report.html").read_text()
