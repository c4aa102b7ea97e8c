"""The stop rule: known sequences, one answer for any number of workers, and a study that ends by it."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.search.stopping import StopRule

COSTS = st.lists(st.floats(0.01, 10) | st.just(math.inf), max_size=60)


@given(COSTS, st.integers(1, 12), st.integers(0, 8), st.integers(1, 5))
def test_it_stops_so_many_trials_after_the_last_gain_and_never_before_the_queued_ones(
    costs, patience, queued, distance
):
    """The decision needs only the trials before it: what runs beside or later changes nothing."""
    rule = StopRule(patience, 0.01, queued, distance)
    stop = rule.trials(costs, 1000)
    if stop == 1000:
        return
    decided = stop - distance
    assert decided >= queued - 1 + patience
    best = min(costs[: decided + 1])
    assert min(costs[: decided + 1 - patience]) <= best / 0.99 + 1e-12
    assert rule.trials(costs[: decided + 1], 1000) == stop
    assert rule.trials([*costs[: decided + 1], *[0.0] * 20], 1000) == stop
    assert rule.trials(costs[:decided], 1000) == 1000
    assert rule.trials(costs, 3) == min(3, stop)


def test_a_trial_that_still_runs_holds_the_decision_back():
    """What has not ended may still be a gain."""
    rule = StopRule(3, 0.0, 0, 1)
    assert rule.trials([1.0, 2.0, None, 2.0, 2.0, 2.0], 100) == 100
    assert rule.trials([1.0, 2.0, 2.0, 2.0, None], 100) == 4


@pytest.mark.slow
def test_a_study_ends_by_its_rule_and_says_so(tiny, lrtune_here):
    """With more trials asked for than are worth it; again, it adds none; without the rule, it goes on."""
    ended = lrtune_here("tune", tiny, "--trials", "60", "--stop.patience", "4", "--stop.gain", "0.3")
    assert ended.returncode == 0, ended.stderr
    assert "stop" in ended.stderr
    folder = tiny.parent / tiny.stem
    trials = pd.read_csv(folder / "trials.csv")
    assert 7 < len(trials) < 40
    assert "The search stopped after" in (folder / "report.html").read_text()
    assert lrtune_here("tune", tiny, "--trials", "60", "--stop.patience", "4", "--stop.gain", "0.3").returncode == 0
    assert len(pd.read_csv(folder / "trials.csv")) == len(trials)
    rule = ("--trials", "60", "--stop.patience", "4", "--stop.gain", "0.3")
    assert f"{len(trials)} of {len(trials)} trials (stopped by its rule)" in lrtune_here("status", tiny, *rule).stdout
    assert f"{len(trials)} of 60 trials" in lrtune_here("status", tiny, "--trials", "60").stdout
    assert lrtune_here("tune", tiny, "--trials", str(len(trials) + 2)).returncode == 0
    assert len(pd.read_csv(folder / "trials.csv")) == len(trials) + 2
    assert "The search stopped after" not in (folder / "report.html").read_text()
