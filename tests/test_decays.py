"""Decay schemes: ends, monotony, equality with Keras's own schedules, and the code that is exported."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SettingError
from pipeline.training.decays import DECAYS, keras_schedule_code, rate_table

CASES = st.tuples(
    st.sampled_from(sorted(DECAYS)),
    st.floats(1e-6, 10.0),
    st.floats(0.001, 1.0),
    st.integers(1, 400),
)


@given(CASES)
def test_every_table_starts_at_the_rate_and_ends_at_its_final_fraction(case):
    """The first step has the rate, the last the rate times the final fraction, and nothing lies outside."""
    decay, rate, fraction, steps = case
    table = rate_table(decay, rate, fraction, steps)
    assert table.shape == (steps,)
    assert table[0] == pytest.approx(rate)
    end = rate if decay == "constant" or steps == 1 else rate * fraction
    assert table[-1] == pytest.approx(end)
    assert (np.diff(table) <= 1e-12 * rate).all()
    assert table.min() >= rate * fraction * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_exported_code_gives_the_same_rate_at_every_step(case):
    """The Keras schedule in best.py equals the table that the study trained with, step by step."""
    decay, rate, fraction, steps = case
    schedule = eval(keras_schedule_code(decay, rate, fraction, steps), {"keras": keras})
    at = np.arange(steps)
    ours = rate_table(decay, rate, fraction, steps)
    theirs = [float(schedule(int(i))) if callable(schedule) else schedule for i in at[:: max(1, steps // 25)]]
    np.testing.assert_allclose(theirs, ours[:: max(1, steps // 25)], rtol=2e-5)


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
        (("cosine", 0.0, 0.5, 10), "above 0, got 0.0"),
        (("cosine", float("nan"), 0.5, 10), "above 0, got nan"),
        (("cosine", 0.1, 0.0, 10), "in (0, 1], got 0.0"),
        (("cosine", 0.1, 0.5, 0), "at least 1, got 0"),
    ],
)
def test_nonsense_is_refused_with_rule_and_value(arguments, rule):
    """Bad arguments raise an error that states the rule and the value received."""
    with pytest.raises(SettingError) as error:
        rate_table(*arguments)
    assert rule in str(error.value)
