"""The range test: curve analysis on shapes with known answers, and the whole test on the quadratic."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from objectives import quadratic
from pipeline.report.records import load_record, recommend
from pipeline.search.range_test import MEANINGS, OK, analyse_ramp, landmarks, loss_change, ramp, run_range_test
from pipeline.training.data import make_data
from pipeline.training.engine import Engine
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.splits import Split

RATES = ramp(1e-6, 10.0, 60)


def test_bounds_do_not_reach_far_beyond_the_ramp():
    """Where the loss falls nearly to the ramp's end, nothing was seen of ten times that rate."""
    rates = np.geomspace(1e-6, 10, 60)
    losses = np.where(rates < 8, 1 / (1 + rates), 1.4)
    found = analyse_ramp("rmsprop", rates, losses)
    assert found.status == "ok"
    assert found.low < found.suggested <= found.high <= 15


def valley(minimum: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A loss of 2.3 that falls to about 1 around a rate and explodes beyond ten times it."""
    x = np.log10(RATES / minimum)
    loss = 2.3 - 1.3 * np.exp(-((x / 0.8) ** 2)) + np.maximum(0, x - 0.7) * 4
    return loss + noise * np.random.default_rng(seed).standard_normal(len(RATES))


@pytest.mark.parametrize("minimum", [1e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_valley_gives_bounds_around_its_minimum(minimum, noise):
    """Clean or noisy, the bounds hold the minimum, span 1.5 to 2.5 decades, and suggest a rate below it."""
    result = analyse_ramp("adam", RATES, valley(minimum, noise))
    assert result.status == "ok"
    assert result.low < minimum < result.high * 1.3
    assert 1.5 <= np.log10(result.high / result.low) <= 2.5
    assert minimum / 10 < result.suggested < minimum * 1.2


@pytest.mark.parametrize("seed", range(10))
def test_flat_noise_is_no_signal(seed):
    """Noise without a fall gives the fallback bounds around the default rate."""
    result = analyse_ramp("sgd", RATES, 2.3 + 0.1 * np.random.default_rng(seed).standard_normal(60))
    assert result.status == "no_signal"
    assert (result.low, result.suggested, result.high) == pytest.approx((0.01 / 30, 0.01, 0.1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stops", [False, True])
def test_a_curve_that_only_rises_is_searched_below_its_rise(seed, stops):
    """Noise and then an explosion from 0.1 on: the bounds end not far above it, whatever the default is."""
    loss = 2.3 + 0.1 * np.random.default_rng(seed).standard_normal(60) + 3 * np.maximum(0, np.log10(RATES / 0.1))
    if stops:
        loss[np.flatnonzero(RATES > 1.0)[0] :] = np.inf
        loss = loss[: np.flatnonzero(RATES > 1.0)[0] + 1]
    result = analyse_ramp("adam", RATES[: len(loss)], loss)
    assert result.status == "no_signal"
    assert 0.02 < result.suggested < 0.1
    assert 0.2 < result.high < 1.0
    assert "below the rate at which it rose" in result.note


def test_longer_runs_of_adaptive_optimizers_are_searched_lower():
    """Many more steps lower Adam's bounds, by no more than three eighths of a decade, and not gradient descent's."""
    for optimizer, moved in (("adam", 0.375), ("sgd", 0.0)):
        short, long = (analyse_ramp(optimizer, RATES, valley(0.01), total_steps=n) for n in (60, 6000))
        assert np.log10(short.suggested / long.suggested) == pytest.approx(moved)
        assert short.low / long.low == pytest.approx(short.suggested / long.suggested)


@pytest.mark.parametrize("optimizer", ["ftrl", "adafactor"])
def test_optimizers_whose_ramp_says_nothing_are_searched_around_their_usual_rate(optimizer):
    """Whatever the curve looks like."""
    results = [analyse_ramp(optimizer, RATES, valley(rate)) for rate in (1e-4, 0.1)]
    assert results[0].suggested == results[1].suggested == OPTIMIZERS[optimizer].default_learning_rate
    assert results[0].low < results[0].suggested < results[0].high


def test_a_flat_line_is_no_signal():
    """A loss that does not move at all has no noise either, and still no signal."""
    assert analyse_ramp("sgd", RATES, np.full(60, 2.3)).status == "no_signal"


def test_a_loss_that_falls_for_ever_never_rose():
    """A monotone fall says that the ramp ended too early."""
    assert analyse_ramp("sgd", RATES, 2.3 / (1 + RATES)).status == "never_rose"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_run_that_ends_in_nan_or_infinity_is_judged_on_what_came_before(bad):
    """The step that was not finite marks the upper end, not the whole result."""
    losses = valley(0.01)[:48]
    losses[-1] = bad
    result = analyse_ramp("adam", RATES[:48], losses)
    assert result.status == "ok"
    assert result.low < 0.01 < result.high
    assert result.high <= 1.5 * RATES[47]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_from_the_first_step_diverged_at_start(bad):
    """Nothing but NaN or infinity is named as such."""
    assert analyse_ramp("adam", RATES, np.full(60, bad)).status == "diverged_at_start"
    assert analyse_ramp("adam", RATES[:2], [2.3, bad]).status == "diverged_at_start"


@pytest.mark.parametrize("steps", range(0, 8))
def test_a_short_curve_is_too_short(steps):
    """Fewer than eight points are never judged, and never an index error."""
    assert analyse_ramp("adam", RATES[:steps], valley(0.01)[:steps]).status == "too_short"


@given(arrays(float, st.integers(0, 70), elements=st.floats(-1e30, 1e30) | st.just(np.nan) | st.just(np.inf)))
def test_every_curve_has_a_named_status_and_ordered_bounds(losses):
    """Whatever the losses are, there is an answer with 0 < low <= suggested <= high."""
    result = analyse_ramp("momentum", ramp(1e-6, 10, 70), losses)
    assert result.status in MEANINGS
    assert 0 < result.low <= result.suggested <= result.high < np.inf


@pytest.fixture(scope="module")
def quadratic_engine() -> Engine:
    """An engine on the noisy quadratic."""
    (x, y), _ = quadratic.load_data()
    return Engine(quadratic.build_model, make_data("quadratic", x, y), batch_size=32)


SPLIT = Split(np.arange(400, dtype=np.int32), np.arange(400, 512, dtype=np.int32), 7)


def test_on_the_quadratic_the_bounds_hold_the_stability_limit_of_gradient_descent(quadratic_engine):
    """2 / lambda_max lies inside the bounds, less than a decade below their upper end."""
    result = run_range_test(quadratic_engine, "sgd", SPLIT)
    assert result.status == "ok"
    assert result.low < quadratic.STABILITY_LIMIT < 10 * result.high
    assert result.suggested < 1.5 * quadratic.STABILITY_LIMIT


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_range_test_leaves_no_trace_in_later_runs(quadratic_engine, optimizer):
    """A run after a range test equals the same run before it, to the last bit."""

    def losses() -> np.ndarray:
        return quadratic_engine.start(optimizer, SPLIT).steps(np.full(20, 0.01)).losses

    before = losses()
    run_range_test(quadratic_engine, optimizer, SPLIT)
    np.testing.assert_array_equal(losses(), before)


def test_a_ramp_that_ends_too_low_is_extended_once(quadratic_engine):
    """With its upper end below every useful rate the test extends itself and says so."""
    result = run_range_test(quadratic_engine, "sgd", SPLIT, low=1e-6, high=0.02, steps=30)
    assert result.extended
    assert result.status == "ok"
    assert result.rates[-1] > 0.02


@pytest.mark.parametrize("minimum", [1e-3, 0.05])
def test_landmarks_lie_where_people_read_them(minimum):
    """On a clean valley: the steepest point left of the rate just left of the minimum, left of the minimum."""
    result = analyse_ramp("adam", RATES, valley(minimum))
    marks = landmarks(result.rates, result.smoothed)
    assert marks.minimum == pytest.approx(minimum, rel=0.6)
    assert marks.steepest < marks.left_of_minimum < marks.minimum
    assert marks.lowest_loss == pytest.approx(np.min(result.smoothed))
    assert landmarks([0.1], [2.0]) is None
    assert landmarks([0.1, 0.2], [np.nan, np.nan]) is None


def test_the_loss_change_is_the_slope_of_a_line_and_shifts_nothing():
    """A line changes by its slope everywhere; a symmetric valley changes its sign at its minimum."""
    np.testing.assert_allclose(loss_change(3 - 0.5 * np.arange(30), 20), -0.5)
    change = loss_change((np.arange(41) - 20.0) ** 2, 6)
    assert change[20] == pytest.approx(0)
    assert (change[:19] < 0).all()
    assert (change[22:] > 0).all()


def test_a_wider_window_smooths_more():
    """The study file's window is the moving average's."""
    noisy = valley(0.01, noise=0.2)
    narrow, wide = (analyse_ramp("adam", RATES, noisy, window=w).smoothed for w in (1, 21))
    np.testing.assert_allclose(narrow, np.minimum(noisy, narrow.max()))
    assert np.abs(np.diff(wide[:35])).mean() < 0.3 * np.abs(np.diff(narrow[:35])).mean()


def curve(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return rates and losses of a smooth ramp through (log10 of the rate, loss)."""
    rates = np.geomspace(1e-6, 10, 60)
    return rates, np.interp(np.log10(rates), *zip(*points, strict=True))


def test_the_first_valley_counts_unless_a_later_one_is_deeper():
    """Far to the right units die, and the loss may fall a second time."""
    first = [(-6, 2.3), (-4, 2.3), (-3, 1.2), (-2, 2.2), (-1, 2.2)]
    again = analyse_ramp("adam", *curve(*first, (0, 1.2), (1, 4.0)))
    alone = analyse_ramp("adam", *curve(*first, (0, 2.3), (1, 4.0)))
    deeper = analyse_ramp("adam", *curve(*first, (0, 0.3), (1, 4.0)))
    assert again.suggested == pytest.approx(alone.suggested, rel=0.3)
    assert deeper.suggested > 30 * alone.suggested


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_flat_floor_is_one_valley(noise):
    """Noise on the floor makes no ridge: the lowest point stays what it was."""
    rng = np.random.default_rng(3)
    rates, losses = curve((-6, 2.3), (-4, 2.3), (-3, 0.5), (-1.5, 0.4), (-1, 3.0), (1, 9.0))
    found = analyse_ramp("sgd", rates, losses + rng.normal(0, noise, 60))
    assert found.status == OK
    assert 1e-4 < found.suggested < 0.1


def test_siblings_far_apart_are_tested_again(tmp_path, monkeypatch):
    """With a ramp twice as fine; where they still disagree, the doubt names both."""
    from pipeline.progress import Reporter
    from pipeline.report.doubts import doubts_of
    from pipeline.search import prepare
    from tests.made_study import make_study

    asked = []

    def made(engine, optimizer, split, *, steps, **_):
        asked.append((optimizer, steps))
        far = optimizer == "adamw" and (steps == 60 or made.stubborn)
        return analyse_ramp(optimizer, *curve(*[(p + 2 * far, v) for p, v in VALLEY], (1, 9.0)))

    monkeypatch.setattr(prepare, "run_range_test", made)
    study = make_study(tmp_path)
    config = study.config.model_copy(
        update={"search": study.config.search.model_copy(update={"optimizers": ("sgd", "adam", "adamw")})}
    )
    engine = SimpleNamespace(batch_size=32)
    prepared = SimpleNamespace(
        study=SimpleNamespace(config=config), engine=engine, splits=[SimpleNamespace(steps_per_epoch=lambda _: 20)]
    )
    made.stubborn = False
    tests = prepare.range_tests(prepared, Reporter(quiet=True))
    assert asked == [("sgd", 60), ("adam", 60), ("adamw", 60), ("adam", 120), ("adamw", 120)]
    assert tests["adamw"].suggested == pytest.approx(tests["adam"].suggested)
    made.stubborn = True
    tests = prepare.range_tests(prepared, Reporter(quiet=True))
    record = replace(load_record(study), tests={name: test.as_record() for name, test in tests.items()})
    doubts = doubts_of(record, recommend(record))
    assert any("range tests of adam and adamw" in doubt and "more than a decade apart" in doubt for doubt in doubts)
    high = {**record.tests, "sgd": {**record.tests["sgd"], "high": 40.0}}
    doubts = doubts_of(replace(record, tests=high), recommend(record))
    assert any("bounds of sgd reach beyond range_test.high = 10" in doubt for doubt in doubts)


VALLEY = [(-6, 2.3), (-4, 2.3), (-3, 1.0), (-2, 3.0)]


def test_the_command_writes_the_tables_of_the_report(tiny, lrtune_here):
    """The same rows and digits, whichever of the two wrote them."""
    folder = tiny.parent / "tiny_study"
    assert lrtune_here("range-test", tiny, "-q").returncode == 0
    names = ("range_test.csv", "bounds.csv")
    alone = [(folder / name).read_text() for name in names]
    assert lrtune_here("tune", tiny, "-q", "--confirm.finalists", "0").returncode == 0
    assert [(folder / name).read_text() for name in names] == alone
