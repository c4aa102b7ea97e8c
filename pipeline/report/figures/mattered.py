"""What mattered: importance of each choice, value over learning rate, optimizer against decay."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report.figures.style import PALETTE, SYMBOLS, colour, evenly, legend_above, log_y, said, style
from pipeline.report.records import StudyRecord, TrialRecord
from pipeline.words import FURTHER

if TYPE_CHECKING:
    import plotly.graph_objects as go


def landscape_info(record: StudyRecord) -> dict[str, dict[str, list[Any]]]:
    """Return per optimizer: rate, value and description of each trial that has a value.

    Pruned trials enter with their best epoch over the folds they finished, marked as such.
    """
    points: dict[str, dict[str, list[Any]]] = {}
    for trial in record.trials:
        c, value = trial.configuration, record.shown_value(trial)
        if c is None or value is None or trial.outcome not in ("complete", "pruned"):
            continue
        entry = points.setdefault(c.optimizer, {"rate": [], "value": [], "text": [], "decay": [], "pruned": []})
        entry["rate"].append(c.learning_rate)
        entry["value"].append(value)
        entry["decay"].append(c.decay)
        entry["pruned"].append(trial.state == "pruned")
        entry["text"].append(said(trial))
    return points


def landscape_title(record: StudyRecord) -> str:
    """Say at which rates the good trials of each optimizer lie."""
    ranked = record.ranked()
    good = ranked[: max(3, len(ranked) // 4)]
    rates: dict[str, list[float]] = {}
    for trial in good:
        if trial.configuration is not None:
            rates.setdefault(trial.configuration.optimizer, []).append(trial.configuration.learning_rate)
    if not rates:
        return "No trial ran through"
    parts = [
        f"{name} {min(found):.2g} to {max(found):.2g}" if len(found) > 1 else f"{name} {found[0]:.2g}"
        for name, found in rates.items()
    ]
    return f"The {len(good)} best trials: {', '.join(parts)}"


def draw_landscape(points: dict[str, dict[str, list[Any]]], monitor: str) -> go.Figure:
    """Draw the value of every trial over its learning rate, a colour and shape per optimizer."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (optimizer, p) in enumerate(points.items()):
        symbols = [SYMBOLS[i % len(SYMBOLS)] + ("-open" if pruned else "") for pruned in p["pruned"]]
        figure.add_scatter(
            x=p["rate"], y=p["value"], text=p["text"], mode="markers", name=optimizer,
            marker={"size": 9, "color": colour(optimizer), "symbol": symbols, "line": {"width": 1.5}},
            hovertemplate="%{text}<br>" + monitor + " %{y:.4g}<extra></extra>",
        )  # fmt: skip
    values = [v for p in points.values() for v in p["value"] if v > 0]
    style(figure, "learning rate", monitor, height=400)
    figure.update_xaxes(type="log", exponentformat="power")
    if values and max(values) > 20 * min(values) and len(values) == sum(len(p["value"]) for p in points.values()):
        log_y(figure, min(values), max(values))
    legend_above(figure)
    return figure


@dataclass(frozen=True)
class ImportanceInfo:
    """How much each choice decides whether a trial is among the best.

    Attributes:
        shares: share of each choice, the largest first; together 1.
        trials: trials it rests on.
        title: the finding.
    """

    shares: dict[str, float]
    trials: int
    title: str


MINIMUM_TRIALS = 12
"""With fewer trials an importance is noise."""

BEST_SHARE = 0.25
"""What sets this best share of the trials apart is what mattered."""


def importance_info(record: StudyRecord) -> ImportanceInfo | None:
    """Return what sets the best quarter of the trials apart: PED-ANOVA (Watanabe, Bansal and Hutter, 2023).

    Diverged trials count as the worst, pruned ones by the folds that they finished, the learning rate by its
    place inside its optimizer's bounds.

    Returns:
        None with fewer than twelve trials, or where only one choice was open.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    rows: list[tuple[dict[str, Any], float]] = []
    for trial in record.trials:
        factors = _factors(record, trial)
        if factors is None or trial.baseline:
            continue
        value = record.shown_value(trial)
        if trial.outcome == "diverged":
            rows.append((factors, np.inf))
        elif value is not None and trial.outcome in ("complete", "pruned"):
            rows.append((factors, float(record.monitor.cost(value))))
    names = [name for name in (rows[0][0] if rows else {}) if len({row[name] for row, _ in rows}) > 1]
    if len(rows) < MINIMUM_TRIALS or len(names) < 2:
        return None
    rows = evenly(rows)
    worst = max((cost for _, cost in rows if np.isfinite(cost)), default=0.0)
    distributions: dict[str, Any] = {}
    for name in names:
        seen = [row[name] for row, _ in rows]
        distributions[name] = (
            optuna.distributions.CategoricalDistribution(sorted(set(seen)))
            if isinstance(seen[0], str)
            else optuna.distributions.FloatDistribution(min(seen), max(seen))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params={name: row[name] for name in names},
                    distributions=distributions,
                    value=cost if np.isfinite(cost) else worst + abs(worst) + 1.0,
                )
                for row, cost in rows
            ]
        )
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE))
    shares = {name: float(share) for name, share in sorted(found.items(), key=lambda item: -item[1])}
    if not sum(shares.values()) > 0:
        return None
    first, second = list(shares.items())[:2]
    parts = f"{first[0]} ({100 * first[1]:.0f}%), then {second[0]} ({100 * second[1]:.0f}%)"
    title = f"What set the best quarter of the trials apart: {parts}"
    return ImportanceInfo(shares, len(rows), title)


def _factors(record: StudyRecord, trial: TrialRecord) -> dict[str, Any] | None:
    """Return the choices that made a trial's configuration, by their names for people."""
    c = trial.configuration
    if c is None:
        return None
    test: Mapping[str, Any] | None = record.tests.get(c.optimizer)
    place = float(np.log10(c.learning_rate))
    if test is not None:
        place = (place - np.log10(test["low"])) / np.log10(test["high"] / test["low"])
    further = {name.replace("_", " "): c.as_dict().get(name) for name in FURTHER}
    return {
        "learning rate": place,
        "optimizer": c.optimizer,
        "decay": c.decay,
        "final fraction": float(np.log10(1.0 if c.decay == "constant" else c.final_fraction)),
        **{name: float(value or 0.0) for name, value in further.items()},
    }


def draw_importance(info: ImportanceInfo) -> go.Figure:
    """Draw a bar per choice, the most important on top."""
    import plotly.graph_objects as go

    names = list(info.shares)[::-1]
    shares = [100 * info.shares[name] for name in names]
    figure = go.Figure()
    figure.add_bar(
        y=names, x=shares, orientation="h", marker={"color": PALETTE[0]}, text=[f"{share:.0f}%" for share in shares],
        textposition="outside", cliponaxis=False, hovertemplate="%{y}: %{x:.1f}%<extra></extra>",
    )  # fmt: skip
    style(figure, "share, %", None, height=90 + 36 * max(len(names), 2))
    figure.update_xaxes(range=[0, max(shares) * 1.15])
    figure.update_layout(showlegend=False, margin={"t": 8})
    return figure


@dataclass(frozen=True)
class CrossTable:
    """Optimizer against decay: how many trials ran, and the best value of those that ran through.

    Attributes:
        optimizers, decays: rows and columns.
        counts: trials that ended, by (optimizer, decay).
        best: best value, by (optimizer, decay); absent where none ran through.
        strength: 1 for the best cell, 0 for the worst, by (optimizer, decay).
    """

    optimizers: tuple[str, ...]
    decays: tuple[str, ...]
    counts: dict[tuple[str, str], int]
    best: dict[tuple[str, str], float]
    strength: dict[tuple[str, str], float]


def cross_table(record: StudyRecord) -> CrossTable:
    """Return counts and best values by optimizer and decay; the Keras default counts too."""
    counts: dict[tuple[str, str], int] = {}
    best: dict[tuple[str, str], float] = {}
    for trial in record.trials:
        c = trial.configuration
        if c is None or trial.outcome not in ("complete", "pruned", "diverged"):
            continue
        key = (c.optimizer, c.decay)
        counts[key] = counts.get(key, 0) + 1
        if trial.state == "complete" and trial.value is not None:
            known = best.get(key)
            if known is None or record.monitor.cost(trial.value) < record.monitor.cost(known):
                best[key] = trial.value
    order = sorted(best, key=lambda key: float(record.monitor.cost(best[key])))
    strength = {key: 1.0 - place / max(len(order) - 1, 1) for place, key in enumerate(order)}
    return CrossTable(
        tuple(dict.fromkeys(optimizer for optimizer, _ in counts)),
        tuple(dict.fromkeys(decay for _, decay in counts)),
        counts,
        best,
        strength,
    )
