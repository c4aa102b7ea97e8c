"""Overfitting epoch and generalization gap over the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report.figures.style import SYMBOLS, colour, evenly, legend_above, said, style
from pipeline.report.overfitting import Overfitting

if TYPE_CHECKING:
    import plotly.graph_objects as go


def overfitting_info(found: Overfitting) -> dict[str, dict[str, list[Any]]]:
    """Return per optimizer: rate, overfitting epoch (None where it does not overfit), gaps and text of each trial.

    Of very many trials some thousands, which look no different.
    """
    points: dict[str, dict[str, list[Any]]] = {}
    for fit in evenly(found.fits):
        c, analysis = fit.trial.configuration, fit.analysis
        if c is None:
            continue
        keys = ("rate", "epoch", "gap_at_best", "gap_at_end", "text")
        entry = points.setdefault(c.optimizer, {key: [] for key in keys})
        entry["rate"].append(c.learning_rate)
        entry["epoch"].append(analysis.overfit_epoch)
        entry["gap_at_best"].append(analysis.gap_at_best)
        entry["gap_at_end"].append(analysis.gap_at_end)
        entry["text"].append(f"{said(fit.trial)}, {analysis.verdict}")
    return points


def draw_overfitting(points: dict[str, dict[str, list[Any]]], epochs: int) -> go.Figure:
    """Draw the overfitting epoch over the learning rate; runs that do not overfit are open, on the top line."""
    import plotly.graph_objects as go

    figure, top = go.Figure(), epochs * 1.06 + 1
    for i, (optimizer, p) in enumerate(points.items()):
        symbol = SYMBOLS[i % len(SYMBOLS)]
        figure.add_scatter(
            x=p["rate"], y=[top if epoch is None else epoch for epoch in p["epoch"]], text=p["text"], mode="markers",
            name=optimizer, hovertemplate="%{text}<br>rate %{x:.3g}<extra></extra>",
            marker={
                "size": 9, "color": colour(optimizer), "line": {"width": 1.5},
                "symbol": [symbol + ("-open" if epoch is None else "") for epoch in p["epoch"]],
            },
        )  # fmt: skip
    style(figure, "learning rate", "overfits from epoch", height=340)
    step = max(1, round(epochs / 5))
    marks = list(range(step, epochs + 1, step))
    figure.update_yaxes(
        tickvals=[*marks, top], ticktext=[*map(str, marks), "does not"], range=[0, top + 0.06 * epochs + 0.5]
    )
    figure.update_xaxes(type="log", exponentformat="power")
    legend_above(figure)
    return figure


def draw_gaps(points: dict[str, dict[str, list[Any]]], metric: str) -> go.Figure:
    """Draw the gap between validation and training over the learning rate, at the best and at the last epoch."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (optimizer, p) in enumerate(points.items()):
        ink, symbol = colour(optimizer), SYMBOLS[i % len(SYMBOLS)]
        whiskers_x: list[Any] = []
        whiskers_y: list[Any] = []
        for rate, best, end in zip(p["rate"], p["gap_at_best"], p["gap_at_end"], strict=True):
            whiskers_x += [rate, rate, None]
            whiskers_y += [best, end, None]
        figure.add_scatter(
            x=whiskers_x, y=whiskers_y, mode="lines", line={"width": 1, "color": ink}, opacity=0.6, showlegend=False,
            hoverinfo="skip", legendgroup=optimizer,
        )  # fmt: skip
        for key, when, suffix in (("gap_at_best", "best", ""), ("gap_at_end", "last", "-open")):
            figure.add_scatter(
                x=p["rate"], y=p[key], text=p["text"], mode="markers", name=optimizer, legendgroup=optimizer,
                showlegend=not suffix, marker={"size": 8, "color": ink, "symbol": symbol + suffix},
                hovertemplate=f"%{{text}}<br>gap at the {when} epoch %{{y:.3g}}<extra></extra>",
            )  # fmt: skip
    style(figure, "learning rate", f"{metric}: validation worse by", height=340)
    figure.update_xaxes(type="log", exponentformat="power")
    gaps = [g for p in points.values() for g in (*p["gap_at_best"], *p["gap_at_end"]) if np.isfinite(g)]
    if gaps:  # a run or two that blew up must not flatten the rest
        low, high = min(0.0, *gaps), max(gaps)
        usual = 6 * float(np.quantile(np.abs(gaps), 0.75)) or 1.0
        figure.update_yaxes(range=[max(low, -usual) * 1.05, min(high, usual) * 1.05])
    legend_above(figure)
    return figure
