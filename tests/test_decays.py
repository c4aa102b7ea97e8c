"""Decay schemes: ends, monotony, equality with Keras's own schedules, and the code that is exported."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SettingError
from pipeline.training.decays import (
    DECAYS,
    ONE_CYCLE_START,
    WARM_UP_CODE,
    Plateau,
    keras_schedule_code,
    plateau_callback_code,
    rate_table,
    warm_up_steps,
)

CASES = st.tuples(
    st.sampled_from(sorted(DECAYS)),
    st.floats(1e-6, 10.0),
    st.floats(0.001, 1.0),
    st.integers(1, 400),
    st.sampled_from([0.0, 0.0, 0.05, 0.3, 0.99]),
)


@given(CASES)
def test_every_table_starts_at_the_rate_and_ends_at_its_final_fraction(case):
    """First rate, last rate, the warm-up before it, and nothing outside."""
    decay, rate, fraction, steps, warm_up = case
    table = rate_table(decay, rate, fraction, steps, warm_up)
    assert table.shape == (steps,)
    warm = warm_up_steps(warm_up, steps)
    rise, scheme = table[:warm], table[warm:]
    start = rate * ONE_CYCLE_START if decay == "1cycle" else rate
    assert scheme[0] == pytest.approx(start)
    np.testing.assert_allclose(rise, scheme[0] * np.arange(1, warm + 1) / (warm + 1))
    end = start if decay in ("constant", "plateau") or len(scheme) == 1 else rate * fraction
    assert scheme[-1] == pytest.approx(end)
    assert np.isfinite(table).all()
    assert table.max() <= rate * (1 + 1e-9)
    assert scheme.min() >= min(rate * fraction, start) * (1 - 1e-9)
    if decay not in ("1cycle", "cosine-restarts"):
        assert (np.diff(scheme) <= 1e-12 * rate).all()


def schedule_of(code: str):
    """Run exported code as best.py does."""
    names = {"keras": keras}
    if "WarmUp(" in code:
        exec(WARM_UP_CODE, names)
    return eval(code, names)


@settings(max_examples=120, deadline=None)
@given(CASES)
def test_exported_code_gives_the_same_rate_at_every_step(case):
    """The Keras schedule in best.py equals the table that the study trained with, step by step."""
    decay, rate, fraction, steps, warm_up = case
    schedule = schedule_of(keras_schedule_code(decay, rate, fraction, steps, warm_up))
    at = sorted({*range(0, steps, max(1, steps // 25)), steps - 1})
    ours = rate_table(decay, rate, fraction, steps, warm_up)
    theirs = [float(schedule(int(i))) if callable(schedule) else schedule for i in at]
    np.testing.assert_allclose(theirs, ours[at], rtol=5e-5)


def test_the_warm_up_that_is_exported_trains_and_reaches_the_end():
    """The class in best.py works as a schedule of an optimizer and of `model.fit`."""
    rates = []
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    schedule = schedule_of(keras_schedule_code("linear", 0.1, 0.1, 10, 0.4))
    model.compile(keras.optimizers.Adam(schedule), "mse")
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda *_, **__: rates.append(float(model.optimizer.learning_rate))
    )
    model.fit(np.ones((10, 2)), np.ones(10), batch_size=1, epochs=1, verbose=0, callbacks=[watch])
    np.testing.assert_allclose(rates, rate_table("linear", 0.1, 0.1, 10, 0.4), rtol=1e-5)


def test_restarts_begin_anew_twice_each_time_for_twice_as_long():
    """Steps 100 and 300 of 701 are back at the first rate, those before them at the last."""
    table = rate_table("cosine-restarts", 1.0, 0.01, 701)
    jumps = np.flatnonzero(np.diff(table) > 0.5)
    np.testing.assert_array_equal(jumps, [100, 300])
    np.testing.assert_allclose(table[[101, 301]], 1.0, atol=1e-3)
    np.testing.assert_allclose(table[[100, 300, 700]], 0.01, atol=1e-3)


def test_one_cycle_is_highest_after_three_tenths():
    """Up in a straight line, down as a cosine."""
    table = rate_table("1cycle", 2.0, 0.001, 101)
    assert table.argmax() == 30
    assert table[30] == pytest.approx(2.0)
    np.testing.assert_allclose(np.diff(table[:31]), np.diff(table[:2])[0])


@given(
    st.lists(st.floats(0.0, 5.0, allow_nan=False).map(lambda v: round(v, 1)), min_size=1, max_size=40),
    st.floats(0.001, 0.99),
    st.sampled_from(["min", "max"]),
)
@settings(max_examples=40, deadline=None)
def test_plateau_lowers_the_rate_when_keras_would(values, fraction, mode):
    """Replayed on any course of the monitored value, the exported callback gives the same rates."""
    rule = Plateau(fraction, len(values))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    callback = eval(plateau_callback_code(fraction, 0.5, len(values), "val_loss", mode), {"keras": keras})
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(values):
        rule.after_epoch(value if mode == "min" else -value)
        callback.on_epoch_end(epoch, {"val_loss": value})
        assert 0.5 * rule.share == pytest.approx(float(model.optimizer.learning_rate), rel=1e-5)


def test_step_decay_drops_three_times_by_the_same_factor():
    """Quarters of the run have rates 1, 0.1, 0.01 and 0.001 for a final fraction of 0.001."""
    table = rate_table("step", 1.0, 0.001, 401)
    values, first = np.unique(table.round(9), return_index=True)
    np.testing.assert_allclose(values, [0.001, 0.01, 0.1, 1.0])
    np.testing.assert_array_equal(sorted(first), [0, 100, 200, 300])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("cosin", 0.1, 0.5, 10), "did you mean 'cosine'"),
        (("cosine", 0.0, 0.5, 10), "in [1e-30, 1e+30], got 0.0"),
        (("cosine", float("nan"), 0.5, 10), "in [1e-30, 1e+30], got nan"),
        (("cosine", 0.1, 0.0, 10), "in [1e-12, 1], got 0.0"),
        (("cosine", 0.1, 0.5, 0), "at least 1, got 0"),
    ],
)
def test_nonsense_is_refused_with_rule_and_value(arguments, rule):
    """Bad arguments raise an error that states the rule and the value received."""
    with pytest.raises(SettingError) as error:
        rate_table(*arguments)
    assert rule in str(error.value)
