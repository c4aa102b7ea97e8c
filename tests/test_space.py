"""The search space: one coordinate for all optimizers, the baseline at its true rate."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.search.samplers import make_sampler
from pipeline.search.space import BASELINE, Space, widened, widening_note

BOUNDS = {"sgd": (1e-3, 1.0), "adam": (1e-2, 1.0)}
SPACE = Space(("sgd", "adam"), ("constant", "cosine"), BOUNDS, (0.001, 1.0))


@given(st.sampled_from(sorted(BOUNDS)), st.floats(0, 1))
def test_positions_map_to_the_optimizers_own_bounds_and_back(optimizer, position):
    """The coordinate stays inside the bounds and is recovered from the rate."""
    rate = SPACE.rate_at(optimizer, position)
    low, high = BOUNDS[optimizer]
    assert low * (1 - 1e-3) <= rate <= high * (1 + 1e-3)
    assert SPACE.position_of(optimizer, rate) == pytest.approx(position, abs=1e-3)


def test_the_baseline_runs_at_its_true_rate_outside_the_bounds():
    """Adam at 0.001 lies below its bounds here; the trial trains at 0.001 all the same."""
    study = optuna.create_study()
    study.enqueue_trial(SPACE.baseline_parameters(), user_attrs={"baseline": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = study.ask()
        assert SPACE.suggest(trial) == BASELINE
    assert trial.params["lr_position"] < 0


def run_study(sampler_name: str, space: Space, trials: int = 40) -> optuna.Study:
    """Minimize a cost whose optimum is sgd in the middle of its bounds."""
    study = optuna.create_study()
    study.enqueue_trial(space.baseline_parameters(), user_attrs={"baseline": True})
    for number in range(trials):
        study.sampler = make_sampler(sampler_name, 100, number, space)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = study.ask()
            configuration = space.suggest(trial)
        position = space.position_of("sgd", configuration.learning_rate) if configuration.optimizer == "sgd" else 2.0
        study.tell(trial, (position - 0.5) ** 2)
    return study


def test_a_baseline_outside_the_space_does_not_mislead_the_sampler():
    """With a bad baseline beyond the edge, TPE still gathers around the optimum, not at an edge."""
    later = [t for t in run_study("tpe", SPACE).trials[20:] if t.params["optimizer"] == "sgd"]
    near = sum(abs(t.params["lr_position"] - 0.5) < 0.25 for t in later)
    assert len(later) >= 12
    assert near >= 0.6 * len(later)


def test_a_space_without_adam_still_carries_the_baseline_and_searches_jointly():
    """Trial 0 has no parameters of the space; the sampler learns from the others."""
    space = Space(("sgd",), ("cosine",), {"sgd": (1e-3, 1.0)}, (0.001, 1.0))
    study = run_study("tpe", space, trials=30)
    assert study.trials[0].params == {}
    later = [t.params["lr_position"] for t in study.trials[18:]]
    assert sum(abs(p - 0.5) < 0.25 for p in later) >= 0.6 * len(later)


@pytest.mark.parametrize("name", ["tpe", "random", "grid", "qmc"])
def test_samplers_stay_inside_the_space(name):
    """Every sampler draws configurations of the space; the grid does not end the study."""
    for trial in run_study(name, SPACE, trials=25).trials[1:]:
        assert trial.params["optimizer"] in SPACE.optimizers
        assert 0.0 <= trial.params["lr_position"] <= 1.0
        assert ("final_fraction" in trial.params) == (trial.params["decay"] == "cosine")


def test_a_sweep_draws_only_the_given_rates():
    """With `values` the rates are those and no others."""
    space = Space(("sgd",), ("constant",), {}, None, (1.0,), (0.1, 0.01))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rates = {space.suggest(study.ask()).learning_rate for _ in range(20)}
    assert rates == {0.1, 0.01}


def test_quasi_random_trials_differ_in_every_parameter():
    """Positions and final fractions of a qmc study are spread, not one point repeated."""
    study = run_study("qmc", SPACE, trials=25)
    positions = {round(t.params["lr_position"], 9) for t in study.trials[1:]}
    fractions = {round(t.params["final_fraction"], 9) for t in study.trials[1:] if "final_fraction" in t.params}
    assert len(positions) == len(study.trials) - 1
    assert len(fractions) == sum("final_fraction" in t.params for t in study.trials[1:])


def course(*points: tuple[float, float], count: int = 12) -> list[tuple[float, float]]:
    """Trials in the middle of the range, and at these (number, position) a better one each."""
    history = [(0.5, 9.0)] * count
    for rank, (number, position) in enumerate(points):
        history[int(number)] = (position, 8.0 - rank)
    return history


def test_a_best_trial_at_an_edge_widens_that_side():
    """By a quarter, not before a dozen trials, again only after a dozen more, and at most to double."""
    assert widened(course((3, 0.95), count=11)) == (0.0, 1.0)
    assert widened(course((3, 0.95))) == (0.0, 1.25)
    assert widened(course((3, 0.02))) == (-0.25, 1.0)
    assert widened(course((3, 0.5), count=40)) == (0.0, 1.0)
    assert widened(course((3, 0.95), (14, 1.2), count=24)) == (0.0, 1.5)
    assert widened(course((3, 0.95), (14, 0.7), count=24)) == (0.0, 1.25)
    everywhere = [(step / 40, -float(step)) for step in range(400)]
    assert widened(everywhere) == (0.0, 2.0)


def test_a_trial_without_a_value_widens_nothing():
    """Diverged and pruned trials cost infinity; the baseline may have no position."""
    assert widened([(1.0, math.inf)] * 30) == (0.0, 1.0)
    assert widened([(None, 0.0), *[(1.0, math.inf)] * 30]) == (0.0, 1.0)
    assert widening_note((0.0, 1.0)) is None
    assert "upper" in str(widening_note((0.0, 1.25)))


def test_further_dimensions_apply_where_the_optimizer_has_them():
    """Momentum for momentum, weight decay for AdamW, clipping for all; the specification carries them."""
    space = Space(
        ("momentum", "adamw", "adam"),
        ("constant",),
        dict.fromkeys(("momentum", "adamw", "adam"), (1e-3, 1.0)),
        (0.1, 1.0),
        settings={"momentum": (0.8, 0.95), "weight_decay": (0.1,), "clipnorm": (1.0,), "warmup_fraction": (0.1,)},
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        configuration = space.suggest(study.ask())
        settings = dict(configuration.spec.settings)
        assert settings.pop("clipnorm") == 1.0
        assert configuration.warmup_fraction == 0.1
        seen.add((configuration.optimizer, *sorted(settings.items())))
    assert seen == {
        ("momentum", ("momentum", 0.8)),
        ("momentum", ("momentum", 0.95)),
        ("adamw", ("weight_decay", 0.1)),
        ("adam",),
    }


def test_measured_bounds_move_with_the_batch_size():
    """By its square root; bounds that were given stay, and the name of the position means the same."""
    space = Space(("sgd",), ("constant",), {"sgd": (0.01, 1.0)}, (0.1, 1.0), settings={"batch_size": (32, 128)})
    assert space.rate_at("sgd", 0.5, 128) == 0.1
    measured = replace(space, bounds_batch_size=32)
    assert measured.rate_at("sgd", 0.5, 128) == 0.2
    assert measured.rate_at("sgd", 0.5) == measured.rate_at("sgd", 0.5, 32) == 0.1
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [measured.suggest(study.ask()) for _ in range(20)]
    assert {c.batch_size for c in drawn} == {32, 128}
    assert all(
        c.learning_rate == pytest.approx(measured.rate_at("sgd", t.params["lr_position"], c.batch_size))
        for c, t in zip(drawn, study.trials, strict=True)
    )
    assert measured.suggestion_parameters("sgd", 0.1)["batch_size"] == 32


def test_a_sweep_over_a_setting_runs_every_pair():
    """Two rates times three momenta, and the baseline."""
    space = Space(
        ("momentum",),
        ("constant",),
        {},
        (0.1, 1.0),
        learning_rates=(0.1, 0.01),
        settings={"momentum": (0.5, 0.9, 0.99)},
    )
    points = space.sweep()
    assert len(points) == 6
    assert {(p["learning_rate"], p["momentum"]) for p in points} == {
        (rate, momentum) for rate in (0.1, 0.01) for momentum in (0.5, 0.9, 0.99)
    }
    assert space.size == 7


def test_plateau_is_never_drawn_with_a_warm_up():
    """Keras could not train what would be exported."""
    space = Space(
        ("sgd",), ("plateau", "linear"), {"sgd": (1e-3, 1.0)}, (0.1, 1.0), settings={"warmup_fraction": (0.2,)}
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert {(c.decay, c.warmup_fraction) for c in drawn} == {("plateau", None), ("linear", 0.2)}
