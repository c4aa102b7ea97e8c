"""The overfitting analysis on curves whose truth is known, with and without noise."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.training.overfitting import analyse_fit, noise_level, smooth

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


def test_divergence_is_a_verdict():
    """A run that was stopped, or has a loss that is not finite, is diverged."""
    assert analyse_fit([1.0, 0.5], [1.0, 0.6], diverged=True).verdict == "diverged"
    assert analyse_fit([1.0, np.nan], [1.0, 0.6]).verdict == "diverged"


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
