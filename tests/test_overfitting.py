"""The overfitting analysis on curves whose truth is known, with and without noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.report.overfitting import disagreement, overfitting_frame, overfitting_of
from pipeline.report.records import StudyRecord, TrialRecord
from pipeline.report.sweep import sweeps_of
from pipeline.search.space import Configuration
from pipeline.search.trial import Monitor
from pipeline.training.overfitting import analyse_fit, analyse_fits, noise_level, overfitting_trend, smooth

EPOCHS = np.arange(1, 41)
FALLING = 2.0 * np.exp(-EPOCHS / 6.0) + 0.1


def valley(at: int) -> np.ndarray:
    """A validation loss with its minimum at an epoch."""
    return 0.5 + 0.002 * (EPOCHS - at) ** 2


@pytest.mark.parametrize("at", [8, 15, 25])
def test_a_valley_overfits_at_its_minimum(at):
    """A clean minimum followed by a rise is found to the epoch."""
    result = analyse_fit(FALLING, valley(at))
    assert (result.verdict, result.overfit_epoch) == ("overfit", at)


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_valley_is_found_within_three_epochs(seed):
    """Noise of a tenth of the rise moves the point by at most three epochs."""
    noise = 0.05 * np.random.default_rng(seed).standard_normal(len(EPOCHS))
    result = analyse_fit(FALLING, valley(15) + noise)
    assert result.verdict == "overfit"
    assert abs(result.overfit_epoch - 15) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_plateau_is_not_called_overfitting(seed):
    """A validation loss that settles and only jitters is good."""
    noise = 0.02 * np.random.default_rng(seed).standard_normal(len(EPOCHS))
    assert analyse_fit(FALLING, FALLING + 0.1 + noise).verdict == "good"


def test_a_loss_that_still_falls_is_underfit():
    """A straight fall to the last epoch is underfit."""
    assert analyse_fit(3 - 0.05 * EPOCHS, 3.2 - 0.05 * EPOCHS).verdict == "underfit"


def test_both_losses_rising_is_not_overfitting():
    """When the training loss rises too, the rate is to blame, not the fit."""
    rising = np.concatenate([np.linspace(1, 0.5, 10), np.linspace(0.5, 2, 30)])
    assert analyse_fit(rising, rising).verdict != "overfit"


@pytest.mark.parametrize("epochs", range(4, 12))
def test_a_short_curve_that_fell_at_every_step_is_unfinished(epochs):
    """However it bends: a bend is not noise.  One that has arrived, or jumps, is none."""
    steps = np.arange(epochs)
    for curve in (418781.0 - 3.0 * steps**2, 1.0 / (1 + steps), np.exp(-0.2 * steps)):
        assert analyse_fit(curve, curve + 0.1).verdict == "underfit"
    arrived = np.exp(-4.0 * steps)
    assert analyse_fit(arrived, arrived + 0.1).verdict == "good"
    assert analyse_fit(arrived, 1.0 + 0.1 * (-1.0) ** steps).verdict == "good"


def test_divergence_is_a_verdict():
    """A run that was stopped, or has a loss that is not finite, is diverged."""
    assert analyse_fit([1.0, 0.5], [1.0, 0.6], diverged=True).verdict == "diverged"
    assert analyse_fit([1.0, np.nan], [1.0, 0.6]).verdict == "diverged"


def test_many_curves_are_analysed_as_each_alone():
    """Together or one by one: the same diagnoses, also beside runs that diverged."""
    rng = np.random.default_rng(0)
    for epochs in (1, 2, 3, 4, 9, 40):
        train, held = np.cumsum(rng.normal(-0.1, 0.3, (2, 50, epochs)), axis=-1)
        held[3, -1], train[4, 0], held[5] = np.nan, np.inf, np.nan
        diverged = rng.random(50) < 0.1
        alone = [analyse_fit(t, h, diverged=bool(d)) for t, h, d in zip(train, held, diverged, strict=True)]
        assert repr(analyse_fits(train, held, diverged)) == repr(alone)
        assert {"good", "diverged"} < {fit.verdict for fit in alone} or epochs < 4


@pytest.mark.parametrize("length", range(1, 12))
def test_curves_of_any_length_have_a_verdict(length):
    """One epoch is enough for an answer, and it is never an exception."""
    result = analyse_fit(np.linspace(1, 0.5, length), np.linspace(1, 0.6, length))
    assert result.verdict in ("good", "underfit")
    assert 1 <= result.best_epoch <= length


def test_smoothing_keeps_a_straight_line_and_shifts_nothing():
    """A centred average leaves a line unchanged away from the ends, and a symmetric valley symmetric."""
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, 5)[2:-2], line[2:-2])
    bowl = (np.arange(21) - 10.0) ** 2
    assert np.argmin(smooth(bowl, 7)) == 10


def test_noise_level_recovers_the_deviation_of_noise_on_a_trend():
    """Noise of 0.1 on a slope is measured as 0.1 within a quarter."""
    values = np.linspace(5, 0, 400) + 0.1 * np.random.default_rng(0).standard_normal(400)
    assert noise_level(values) == pytest.approx(0.1, rel=0.25)


@pytest.mark.parametrize("seed", range(10))
def test_the_trend_recovers_how_the_point_moves_with_the_rate(seed):
    """Halved per decade within noise of a fifth, and one run that is far off does not bend it."""
    rng = np.random.default_rng(seed)
    rates = 10.0 ** rng.uniform(-4, -1, 25)
    epochs = 40 * 0.5 ** (np.log10(rates) + 4) * np.exp(0.2 * rng.standard_normal(25))
    epochs[0] = 500
    trend = overfitting_trend(rates, epochs)
    assert trend.factor == pytest.approx(0.5, rel=0.2)
    assert trend.direction == "earlier"


def test_no_trend_is_claimed_where_there_is_none():
    """Over many sets of unrelated points the interval holds 1 about nineteen times in twenty."""
    rng = np.random.default_rng(0)
    trends = [overfitting_trend(10.0 ** rng.uniform(-4, -1, 15), rng.integers(3, 30, 15)) for _ in range(200)]
    assert sum(trend.direction == "unclear" for trend in trends) >= 180
    assert overfitting_trend([0.1] * 9, range(1, 10)) is None
    assert overfitting_trend([0.1, 0.01], [3, 4]) is None


def made_study(monitor: str = "val_loss", values: tuple[float, ...] = ()) -> StudyRecord:
    """Twenty trials whose loss turns at 32 epochs at a rate of 1e-4 and twice as soon per decade; accuracy never."""
    trials = []
    rates = values or np.geomspace(1e-4, 1e-1, 20)
    for number, rate in enumerate(rates):
        turn = 32 * 0.5 ** (np.log10(rate) + 4)
        train = 2 * np.exp(-EPOCHS / turn)
        held = 0.5 + 0.3 * np.abs(np.log2(EPOCHS / turn)) + 0.05
        accuracy = 1 - 0.5 * np.exp(-EPOCHS / 5)
        curves = {
            "loss": [train.tolist()] * 2,
            "val_loss": [(held - 0.02).tolist(), (held + 0.02).tolist()],
            "accuracy": [accuracy.tolist()] * 2,
            "val_accuracy": [(accuracy - 0.1).tolist()] * 2,
        }
        decay = "constant" if values else ("constant", "cosine")[number % 2]
        configuration = Configuration("adam", float(rate), decay, 1.0 if decay == "constant" else 0.1)
        trials.append(
            TrialRecord(
                number,
                "complete",
                configuration,
                float(held.min()),
                None,
                int(np.argmin(held)) + 1,
                "overfit",
                None,
                None,
                curves,
                1.0,
                False,
                None,
            )
        )
    definition = {"search.learning_rate.values": list(values), "search.optimizers": ["adam"]} if values else {}
    about = {"epochs": len(EPOCHS), "fold_sizes": [[80, 20]] * 2, "batch_size": 32}
    definition["search.decays"] = ["constant"]
    return StudyRecord(
        "made", about, definition, Monitor(monitor, "min"), "", {}, tuple(trials), None, "sqlite:///made.db"
    )


def test_a_study_tells_how_the_overfitting_point_moves():
    """For the loss the known halving; for the accuracy, which never turns, nothing; by decay and per fold too."""
    record = made_study()
    loss, accuracy = overfitting_of(record)
    assert (loss.metric, accuracy.metric) == ("loss", "accuracy")
    assert loss.counts()["overfit"] == 20
    assert loss.trends["adam"].factor == pytest.approx(0.5, rel=0.1)
    assert "overfits earlier at higher rates (1.9 times sooner" in loss.finding()
    assert accuracy.counts()["overfit"] == 0
    assert accuracy.trends["adam"] is None
    assert "None of the 20" in accuracy.finding()
    assert [(decay, ran, over) for decay, ran, over, _ in loss.by_decay()] == [("constant", 10, 10), ("cosine", 10, 10)]
    frame = overfitting_frame(record)
    assert len(frame) == 20 * 2 * 3
    folds = frame[(frame["trial"] == 4) & (frame["metric"] == "loss")]
    assert folds["overfit_epoch"].nunique() == 1
    assert list(folds["fold"].isna()) == [True, False, False]
    first = frame[(frame["metric"] == "accuracy") & frame["fold"].isna()]
    np.testing.assert_allclose(first["gap_at_end"], 0.1)
    assert "validation loss is best at epoch" in disagreement(record, record.trials[10])


def test_a_sweep_says_why_the_smallest_gap_is_not_the_best_rate():
    """Best by validation value; the rate that learned least has the smallest gap."""
    record = made_study(values=(0.1, 0.003, 1e-5))
    (sweep,) = sweeps_of(record)
    assert [row.learning_rate for row in sweep.rows] == [1e-5, 0.003, 0.1]
    assert sweep.best.learning_rate == min(record.trials, key=lambda t: t.value).configuration.learning_rate
    assert sweep.closest.learning_rate == 1e-5
    for row in sweep.rows:
        assert row.gap["loss"] == pytest.approx(row.validation["loss"] - row.train["loss"], abs=0.06)
    assert f"The best rate is {sweep.best.learning_rate:g}" in sweep.finding()
    assert "is that of 1e-05" in sweep.finding()
    assert sweeps_of(made_study()) == []


def test_a_sweep_whose_rates_tie_names_no_best_one():
    """As where every run answers the commonest class; the loss may still tell them apart."""
    record = made_study("val_accuracy", values=(0.1, 0.003, 1e-5))
    tied = replace(record, trials=tuple(replace(trial, value=0.25) for trial in record.trials))
    (sweep,) = sweeps_of(tied)
    said = sweep.finding()
    assert said.startswith("1e-05, 0.003 and 0.1 have the same val_accuracy, 0.25, which does not tell them apart; ")
    lowest = min(sweep.rows, key=lambda row: row.validation["loss"])
    assert said.endswith(f"is that of {lowest.learning_rate:g}.")
