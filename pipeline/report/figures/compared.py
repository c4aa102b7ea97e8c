"""Several studies on the same axes: recommended runs, the course of their searches, where good rates lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.figures.style import PALETTE, SYMBOLS, legend_above, log_y, said, style
from pipeline.report.records import StudyRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class ComparedCurve:
    """The recommended run of one study.

    Attributes:
        study: its name.
        validation, train: monitored value per epoch, mean over folds.
        best_epoch: counted from 1.
        said: study and configuration, for hovering.
    """

    study: str
    validation: Sequence[float]
    train: Sequence[float]
    best_epoch: int
    said: str


def draw_compared_curves(curves: Sequence[ComparedCurve], metric: str) -> go.Figure:
    """Draw every study's recommended run over the epochs."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, curve in enumerate(curves):
        ink = PALETTE[number % len(PALETTE)]
        for values, dash, width in ((curve.train, "dot", 1.5), (curve.validation, "solid", 2.5)):
            figure.add_scatter(
                x=list(range(1, len(values) + 1)), y=list(values), mode="lines", name=curve.study,
                legendgroup=curve.study, showlegend=dash == "solid", line={"color": ink, "dash": dash, "width": width},
                hovertemplate=f"epoch %{{x}}: %{{y:.4g}}<br>{curve.said}<extra></extra>",
            )  # fmt: skip
        if curve.best_epoch <= len(curve.validation):
            figure.add_scatter(
                x=[curve.best_epoch], y=[curve.validation[curve.best_epoch - 1]], mode="markers", showlegend=False,
                legendgroup=curve.study, hoverinfo="skip",
                marker={
                    "size": 11, "color": ink, "symbol": SYMBOLS[number % len(SYMBOLS)] + "-open", "line": {"width": 2},
                },
            )  # fmt: skip
    style(figure, "epoch", metric, height=380)
    values = [v for curve in curves for v in (*curve.validation, *curve.train) if np.isfinite(v)]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        log_y(figure, min(values), max(values))
    legend_above(figure)
    return figure


def search_course(record: StudyRecord) -> tuple[list[float], list[float]]:
    """Return epochs trained so far and the best value then, at each improvement by a trial that ran through."""
    spent = 0.0
    epochs: list[float] = []
    best: list[float] = []
    for trial in record.trials:
        spent += trial.epochs_run
        if trial.state != "complete" or trial.value is None:
            continue
        if not best or record.monitor.cost(trial.value) < record.monitor.cost(best[-1]):
            epochs.append(spent)
            best.append(trial.value)
    if best:
        epochs.append(spent)
        best.append(best[-1])
    return epochs, best


def draw_compared_search(records: Sequence[StudyRecord], metric: str) -> go.Figure:
    """Draw the best value so far over the epochs trained, a staircase per study."""
    import plotly.graph_objects as go

    figure, values = go.Figure(), []
    for number, record in enumerate(records):
        epochs, best = search_course(record)
        values += best
        figure.add_scatter(
            x=epochs, y=best, mode="lines+markers", name=record.name,
            line={"shape": "hv", "width": 2.5, "color": PALETTE[number % len(PALETTE)]},
            marker={"size": 7, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            hovertemplate=f"{record.name}<br>after %{{x}} epochs: %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    style(figure, "epochs trained, all folds together", metric, height=340)
    if values and min(values) > 0 and max(values) > 10 * min(values):
        log_y(figure, min(values), max(values))
    legend_above(figure)
    return figure


def draw_compared_rates(records: Sequence[StudyRecord]) -> go.Figure:
    """Draw the learning rates of each study's best quarter, a row per study and optimizer."""
    import plotly.graph_objects as go

    figure, rows = go.Figure(), 0
    for number, record in enumerate(records):
        ranked = record.ranked()
        good = ranked[: max(1, len(ranked) // 4)] if ranked else []
        by_optimizer: dict[str, tuple[list[float], list[str]]] = {}
        for trial in good:
            if trial.configuration is not None:
                place = by_optimizer.setdefault(trial.configuration.optimizer, ([], []))
                place[0].append(trial.configuration.learning_rate)
                place[1].append(f"{record.name}, {said(trial)}")
        for optimizer, (rates, texts) in by_optimizer.items():
            rows += 1
            figure.add_scatter(
                x=rates, y=[f"{record.name}, {optimizer}"] * len(rates), text=texts, mode="markers", showlegend=False,
                marker={"size": 10, "color": PALETTE[number % len(PALETTE)], "symbol": SYMBOLS[number % len(SYMBOLS)]},
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    style(figure, "learning rate", None, height=110 + 30 * max(rows, 2))
    figure.update_xaxes(type="log", exponentformat="power")
    figure.update_layout(margin={"t": 8})
    return figure
