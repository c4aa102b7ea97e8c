"""Hostile data beyond study files: any curves, splits and schedules, and databases that are damaged."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.errors import ObjectiveError, SettingError
from pipeline.report.compare import compare_page, compare_text
from pipeline.report.export import csv_text, write_results
from pipeline.report.page import render
from pipeline.report.records import TrialRecord, load_record, recommend
from pipeline.search.pruning import PastTrial, make_pruner, rungs
from pipeline.search.space import Configuration, widened
from pipeline.training.decays import DECAYS, Plateau, rate_table
from pipeline.training.divergence import TRIAL_RULE, ceiling, first_divergence
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.overfitting import VERDICTS, analyse_fit, overfitting_trend
from pipeline.training.splits import make_splits
from tests.made_study import make_study

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(SETTINGS, max_examples=25)

NUMBERS = st.floats(width=32) | st.floats(-10, 10) | st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, 1e-30])


def curves(length: int) -> st.SearchStrategy[list[float]]:
    """Return curves of so many epochs, of any numbers."""
    return st.lists(NUMBERS, min_size=length, max_size=length)


@SETTINGS
@given(st.integers(1, 30).flatmap(lambda n: st.tuples(curves(n), curves(n))))
def test_any_pair_of_curves_has_a_diagnosis(pair):
    """Epochs lie inside the run, an overfitting point needs training that goes on falling."""
    train, held = pair
    fit = analyse_fit(train, held)
    assert fit.verdict in VERDICTS
    assert 1 <= fit.best_epoch <= len(held)
    assert (fit.overfit_epoch is None) == (fit.verdict != "overfit")
    assert fit.overfit_epoch in (None, fit.best_epoch)
    if np.isfinite(train).all() and np.isfinite(held).all():
        assert fit.verdict != "diverged"
        # The unit of the loss does not matter; a power of two changes no digit.
        assert analyse_fit(np.multiply(train, 0.25), np.multiply(held, 0.25)).verdict == fit.verdict
    else:
        assert fit.verdict == "diverged"


@SETTINGS
@given(st.lists(st.tuples(st.floats(1e-12, 1e3), st.integers(1, 10**6)), max_size=40))
def test_any_overfitting_points_have_a_trend_or_none(points):
    """An interval holds its factor."""
    trend = overfitting_trend(*zip(*points, strict=True)) if points else None
    if trend is not None:
        assert trend.low <= trend.factor <= trend.high or math.isnan(trend.low)
        assert trend.direction in ("earlier", "later", "unclear")


@SETTINGS
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.integers(0, 20))
def test_any_step_losses_are_judged(losses, from_step):
    """A run ends at its first loss that is not finite at the latest, and a run that never rises does not diverge."""
    found = first_divergence(losses, ceiling(losses, TRIAL_RULE), from_step)
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        assert found is not None
        assert found[0] <= wrong[0]
    elif (np.asarray(losses) <= min(losses[:3])).all():
        assert found is None


@SETTINGS
@given(
    st.sampled_from(["median", "percentile", "successive-halving", "hyperband", "none"]),
    st.integers(1, 5),
    st.integers(1, 12),
    st.data(),
)
def test_no_pruner_ends_the_best_of_all_trials(name, folds, epochs, data):
    """Whatever the earlier trials were: one that is better in every epoch of every fold runs through."""
    pruner = make_pruner(name, 25.0, epochs=epochs, folds=folds, number=data.draw(st.integers(0, 9)))
    worst = 1.0
    for _ in range(data.draw(st.integers(0, 12))):
        past = [data.draw(curves(data.draw(st.integers(1, epochs)))) for _ in range(data.draw(st.integers(0, folds)))]
        costs = [np.where(np.isfinite(curve), curve, np.inf) for curve in past]
        worst = min([worst, *(float(np.min(curve)) for curve in costs)])
        pruner.record(PastTrial(tuple(costs)))
    best = np.full(epochs, worst - abs(worst) - 1.0)
    assert not any(pruner.inside_fold(best[:done]) for done in range(1, epochs + 1))
    assert not any(pruner.after_fold([best] * done) for done in range(1, folds + 1))
    assert all(0 < rung < max(folds, epochs) for rung in rungs(epochs, folds))


@SETTINGS
@given(st.lists(st.tuples(st.none() | st.floats(-2, 3), NUMBERS | st.just(math.inf)), max_size=120))
def test_the_range_of_rates_never_shrinks_nor_runs_away(history):
    """From the range test's bounds to twice their width on either side."""
    cleaned = [(position, cost if not math.isnan(cost) else math.inf) for position, cost in history]
    low, high = widened(cleaned)
    assert -1.0 <= low <= 0.0
    assert 1.0 <= high <= 2.0
    fewer = widened(cleaned[: len(cleaned) // 2])
    assert (low, high) == (min(low, fewer[0]), max(high, fewer[1]))


@SETTINGS
@given(st.data())
def test_any_splits_are_sound_or_refused(data):
    """No sample on both sides, no group either, time in its order; K-fold validates each sample as often as drawn."""
    samples = data.draw(st.integers(1, 120))
    kind = data.draw(st.sampled_from(["plain", "labels", "groups", "both", "ordered"]))
    folds = data.draw(st.integers(2 if kind in ("groups", "both", "ordered") else 1, 8))
    several = st.lists(st.integers(0, 6), min_size=samples, max_size=samples).map(np.array)
    labels = data.draw(several) if kind in ("labels", "both") else None
    groups = data.draw(several) if kind in ("groups", "both") else None
    repeats = data.draw(st.integers(1, 3)) if groups is None and kind != "ordered" and folds > 1 else 1
    gap, fraction = data.draw(st.integers(0, 10)), data.draw(st.floats(0.01, 0.99))
    try:
        found = make_splits(
            samples, labels, folds=folds, fraction=fraction, seed=data.draw(st.integers(0, 2**32 - 1)),
            repeats=repeats, groups=groups, ordered=kind == "ordered", gap=gap,
        )  # fmt: skip
    except ObjectiveError:
        return
    assert len(found) == folds * repeats
    for train, held in found:
        assert len(train)
        assert len(held)
        assert not set(train) & set(held)
        if groups is not None:
            assert not set(groups[train]) & set(groups[held])
        if kind == "ordered":
            assert max(train) + gap < min(held)
    if folds > 1 and kind != "ordered":
        times = np.bincount(np.concatenate([held for _, held in found]), minlength=samples)
        assert (times == repeats).all()


@SETTINGS
@given(
    st.sampled_from(sorted(DECAYS)), st.floats(), st.floats() | st.floats(0, 1), st.integers(-1, 300), st.floats(-1, 2)
)
def test_any_schedule_is_finite_and_within_its_bounds_or_refused(decay, rate, fraction, steps, warm):
    """Numbers that a schedule cannot carry are refused, not turned into rates that are not finite."""
    try:
        table = rate_table(decay, rate, fraction, steps, warm)
    except SettingError:
        return
    assert table.shape == (steps,)
    assert np.isfinite(table).all()
    assert (table >= 0).all()
    assert (table <= rate * (1 + 1e-9)).all()


@SETTINGS
@given(st.floats(1e-6, 1), st.integers(1, 100), st.lists(NUMBERS, max_size=100))
def test_a_plateau_never_leaves_its_bounds(fraction, epochs, costs):
    """Its share of the rate only falls, to the final fraction at most, and goes on from a state as if never left."""
    rule, shares = Plateau(fraction, epochs), [1.0]
    for cost in costs:
        rule.after_epoch(cost)
        again = Plateau(fraction, epochs)
        again.restore(json.loads(json.dumps(rule.state())))
        assert again == rule
        shares.append(rule.share)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] >= fraction


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of the usual kind, whose trials are then replaced."""
    return load_record(make_study(tmp_path_factory.mktemp("made"), trials=14, folds=2, epochs=6))


@st.composite
def trials(draw, number: int, epochs: int, folds: int, metrics: tuple[str, ...]) -> TrialRecord:
    """Return a trial as the search may store one: curves of any numbers, cut off where it ended early."""
    state = draw(st.sampled_from(["complete", "complete", "pruned", "failed", "running", "waiting"]))
    diverged = state == "pruned" and draw(st.booleans())
    ran = folds if state == "complete" else draw(st.integers(0, folds)) if state == "pruned" else 0
    lengths = [epochs] * ran
    if diverged or (lengths and state == "pruned" and draw(st.booleans())):
        lengths = [*lengths[:-1], draw(st.integers(1, epochs))]
    shown = {name: [draw(curves(length)) for length in lengths] for name in metrics} if lengths else {}
    value = best = None
    if state == "complete":
        mean = np.mean([np.where(np.isfinite(c), c, np.inf) for c in shown["val_loss"]], axis=0)
        if np.isfinite(mean).any():
            best = int(np.argmin(mean)) + 1
            value = float(mean[best - 1])
        else:
            state, diverged = "pruned", True
    optimizer, decay = draw(st.sampled_from(sorted(OPTIMIZERS))), draw(st.sampled_from(sorted(DECAYS)))
    fraction = 1.0 if decay == "constant" else draw(st.floats(1e-3, 1))
    at = {"fold": 1, "epoch": 1, "step": 1, "reason": "loss not finite"} if diverged else None
    return TrialRecord(
        number=number,
        state=state,
        configuration=Configuration(optimizer, draw(st.floats(1e-9, 1e3)), decay, fraction),
        value=value,
        value_std=draw(NUMBERS) if folds > 1 and value is not None else None,
        best_epoch=best,
        verdict=draw(st.sampled_from([*VERDICTS, None])),
        overfit_epoch=None,
        diverged_at=at,
        curves=shown,
        seconds=draw(st.none() | st.floats(0, 1e6)),
        baseline=number == 0,
        error=draw(st.none() | st.text(max_size=30)) if state == "failed" else None,
    )


@FEW
@given(st.data())
def test_a_study_of_any_curves_has_a_report(made, tmp_path, data):
    """Every file is written, its JSON and its page whole, whatever the trials were."""
    metrics = (
        "loss",
        "val_loss",
        *data.draw(
            st.sampled_from([(), ("accuracy", "val_accuracy"), ("<i>odd", "val_<i>odd"), ("epoch", "val_epoch")])
        ),
    )
    count = data.draw(st.integers(0, 14))
    drawn = tuple(data.draw(trials(number, 6, 2, metrics)) for number in range(count))
    record = replace(made, trials=drawn, confirm=None)
    page = render(record)
    written = write_results(record, tmp_path / "out", page)
    assert page.rstrip().endswith("</html>")
    assert "<i>odd" not in page
    assert {"trials.csv", "curves.csv", "report.html"} <= {path.name for path in written}
    answer = recommend(record)
    if answer is not None:
        best = json.loads((tmp_path / "out" / "best.json").read_text())
        assert math.isfinite(best["value"])
        compile((tmp_path / "out" / "best.py").read_text(), "best.py", "exec")
    shutil.rmtree(tmp_path / "out")


@FEW
@given(st.data())
def test_any_two_studies_compare(made, data):
    """Whatever ran through in them."""
    drawn = [tuple(data.draw(trials(n, 6, 2, ("loss", "val_loss"))) for n in range(5)) for _ in range(2)]
    assume(any(recommend(replace(made, trials=ts, confirm=None)) for ts in drawn))
    records = [replace(made, name=f"s{i}", trials=ts, confirm=None) for i, ts in enumerate(drawn)]
    assert "s0" in compare_text(records)
    assert compare_page(records).rstrip().endswith("</html>")


def test_a_damaged_database_is_one_message(tmp_path, lrtune_here):
    """Cut off anywhere, or with bytes overwritten anywhere: an answer, or one line and exit code 1."""
    study = make_study(tmp_path, trials=12)
    path = tmp_path / "studies.db"
    for left in tmp_path.glob("studies.db-*"):
        left.unlink()
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    codes = []
    for number in range(24):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: rng.integers(1, len(whole))]
        else:
            start = int(rng.integers(0, len(whole) - 4096))
            damaged[start : start + 4096] = rng.bytes(4096)
        path.write_bytes(bytes(damaged))
        for left in (tmp_path / "studies.db-wal", tmp_path / "studies.db-shm"):
            left.unlink(missing_ok=True)
        for command in ("status", "report"):
            ended = lrtune_here(command, study.path)
            codes.append(ended.returncode)
            assert ended.returncode in (0, 1), ended.stderr
            assert "Traceback" not in ended.stderr
            assert ended.returncode == 0 or str(path) in ended.stderr or str(study.path) in ended.stderr, ended.stderr
    assert 1 in codes


@SETTINGS
@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(), st.floats(-1, 1)), max_size=20))
def test_tables_are_written_as_pandas_writes_them(rows):
    """The quick writer of numbers gives the very same text."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=["n", "any, number", "b"]).astype({"n": "int64", "b": "float64"})
    assert csv_text(frame) == frame.to_csv(index=False)
    assert csv_text(frame.assign(t="x,\n")) == frame.assign(t="x,\n").to_csv(index=False)
