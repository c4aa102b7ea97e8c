"""Overfitting over a whole study: per trial, fold and metric, and how it moves with rate, optimizer and decay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report.records import StudyRecord, TrialRecord
from pipeline.search.trial import Monitor, mode_of
from pipeline.training.overfitting import VERDICTS, FitAnalysis, Trend, analyse_fits, overfitting_trend

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Fit:
    """The diagnosis of one trial in one metric.

    Attributes:
        trial: the trial.
        metric: name of the metric, without "val_".
        fold: counted from 1, or None for the mean over folds.
        analysis: verdict, overfitting epoch and gaps; a gap above zero says that validation is worse.
    """

    trial: TrialRecord
    metric: str
    fold: int | None
    analysis: FitAnalysis


def metrics_of(record: StudyRecord) -> dict[str, Monitor]:
    """Return the metrics that have training and validation curves and a known direction, the loss first."""
    known = {record.monitor.name: record.monitor.mode}
    names = record.curve_names
    found = {}
    for name in sorted(names, key=lambda name: name != "loss"):
        mode = known.get(f"val_{name}") or mode_of(name)
        if f"val_{name}" in names and mode is not None:
            found[name] = Monitor(name, mode)
    return found


def fits_of(record: StudyRecord, trials: Sequence[TrialRecord], *, folds: bool = False) -> list[Fit]:
    """Return trials' diagnoses: per metric for the mean over folds, then, if asked for, for each fold.

    Curves of one length are analysed together: there may be very many.
    """
    pairs: list[tuple[TrialRecord, str, int | None]] = []
    at: dict[tuple[str, int], list[int]] = defaultdict(list)
    curves: dict[tuple[str, int], list[tuple[Any, Any, bool]]] = defaultdict(list)
    metrics = metrics_of(record)
    for trial in trials:
        for name in metrics:
            train, validation = trial.curves.get(name, []), trial.curves.get(f"val_{name}", [])
            if not train or not validation:
                continue
            means = trial.mean_curve_of(train), trial.mean_curve_of(validation)
            each = [means, *(zip(train, validation, strict=True) if folds and len(train) > 1 else ())]
            for fold, (trained, held) in enumerate(each):
                at[name, len(held)].append(len(pairs))
                curves[name, len(held)].append((trained, held, trial.diverged_at is not None and fold == 0))
                pairs.append((trial, name, fold or None))
    analyses: dict[int, FitAnalysis] = {}
    for (name, length), together in curves.items():
        trains, helds, diverged = zip(*together, strict=True)
        found = analyse_fits(metrics[name].cost(trains), metrics[name].cost(helds), diverged)
        analyses.update(zip(at[name, length], found, strict=True))
    return [Fit(*pair, analyses[i]) for i, pair in enumerate(pairs)]


def overfitting_frame(record: StudyRecord) -> pd.DataFrame:
    """Return a row per trial, metric and fold; the fold is empty for the mean over folds."""
    import pandas as pd

    fits = fits_of(record, record.trials, folds=True)
    columns: dict[str, list[Any]] = {
        "trial": [fit.trial.number for fit in fits],
        "metric": [fit.metric for fit in fits],
        "fold": [fit.fold for fit in fits],
    }
    for name in ("verdict", "best_epoch", "overfit_epoch", "gap_at_best", "gap_at_end"):
        columns[name] = [getattr(fit.analysis, name) for fit in fits]
    frame = pd.DataFrame(columns)
    for column in ("fold", "best_epoch", "overfit_epoch"):
        frame[column] = frame[column].astype("Int64")
    return frame


@dataclass(frozen=True)
class Overfitting:
    """What a study shows of one metric.

    Attributes:
        metric: name of the metric, without "val_".
        fits: the mean over folds of every trial that ran through.
        trends: per optimizer, how the overfitting epoch moves with the learning rate; None where too few overfit.
    """

    metric: str
    fits: tuple[Fit, ...]
    trends: dict[str, Trend | None]

    def counts(self) -> dict[str, int]:
        """Return the number of trials by verdict."""
        return {verdict: sum(f.analysis.verdict == verdict for f in self.fits) for verdict in VERDICTS}

    def by_decay(self) -> list[tuple[str, int, int, float | None]]:
        """Return per decay: its name, trials, trials that overfit, and their median overfitting epoch."""
        rows = []
        for decay in dict.fromkeys(f.trial.configuration.decay for f in self.fits if f.trial.configuration):
            own = [f for f in self.fits if f.trial.configuration and f.trial.configuration.decay == decay]
            epochs = [f.analysis.overfit_epoch for f in own if f.analysis.overfit_epoch]
            rows.append((decay, len(own), len(epochs), float(np.median(epochs)) if epochs else None))
        return rows

    def finding(self) -> str:
        """Say what it shows in a sentence."""
        counts, ran = self.counts(), len(self.fits)
        if not ran:
            return "No trial ran through."
        if not counts["overfit"]:
            return f"None of the {ran} trials that ran through overfits within its epochs."
        said = f"{counts['overfit']} of {ran} trials that ran through overfit"
        clear = [
            f"{optimizer} overfits {trend.direction} at higher rates ({_times(trend)})"
            for optimizer, trend in self.trends.items()
            if trend is not None and trend.direction != "unclear"
        ]
        if clear:
            return f"{said}; {'; '.join(clear)}."
        return f"{said}; no trend with the learning rate can be told from the noise."


def _times(trend: Trend) -> str:
    """Say a trend as a multiple of the epoch."""
    factor, low, high = (
        (trend.factor, trend.low, trend.high)
        if trend.factor >= 1
        else (1 / trend.factor, 1 / trend.high, 1 / trend.low)
    )
    word = "later" if trend.factor >= 1 else "sooner"
    return f"{factor:.2g} times {word} per tenfold rate, 95% interval {low:.2g} to {high:.2g}"


def overfitting_of(record: StudyRecord) -> list[Overfitting]:
    """Return what a study shows of each metric, the loss first."""
    found = []
    complete = [trial for trial in record.trials if trial.state == "complete" and trial.configuration is not None]
    by_metric: dict[str, list[Fit]] = {name: [] for name in metrics_of(record)}
    for fit in fits_of(record, complete):
        by_metric[fit.metric].append(fit)
    for metric, fits in by_metric.items():
        trends = {}
        for optimizer in dict.fromkeys(t.configuration.optimizer for t in complete if t.configuration):
            points = [
                (f.trial.configuration.learning_rate, f.analysis.overfit_epoch)
                for f in fits
                if f.trial.configuration and f.trial.configuration.optimizer == optimizer and f.analysis.overfit_epoch
            ]
            trends[optimizer] = overfitting_trend(*zip(*points, strict=True)) if points else None
        found.append(Overfitting(metric, tuple(fits), trends))
    return found


def disagreement(record: StudyRecord, trial: TrialRecord) -> str | None:
    """Say where a trial's loss and its other metrics are best at clearly different epochs, or None."""
    fits = {fit.metric: fit.analysis for fit in fits_of(record, [trial])}
    loss = fits.pop("loss", None)
    if loss is None:
        return None
    apart = max(2, round(0.15 * record.about["epochs"]))
    said = [
        f"{name} at epoch {analysis.best_epoch}"
        for name, analysis in fits.items()
        if abs(analysis.best_epoch - loss.best_epoch) > apart
    ]
    return f"validation loss is best at epoch {loss.best_epoch}, {' and '.join(said)}" if said else None
