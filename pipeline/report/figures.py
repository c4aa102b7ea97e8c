"""The report's figures, each as an info function that returns plain data and a draw function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report.overfitting import Overfitting
from pipeline.report.records import StudyRecord, TrialRecord
from pipeline.search.range_test import describe_bounds, landmarks, loss_change
from pipeline.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import plotly.graph_objects as go

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8c6d31", "#7f7f7f")
"""Okabe and Ito's colours, told apart without colour vision."""

OPTIMIZER_INKS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8c6d31", "#7f7f7f")
"""The same, ordered so that optimizers that are often compared differ most."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
GRID = "rgba(128,128,128,0.25)"
FAINT = "rgba(128,128,128,0.55)"


def colour(optimizer: str) -> str:
    """Return an optimizer's colour, the same in every figure."""
    return OPTIMIZER_INKS[list(OPTIMIZERS).index(optimizer) % len(OPTIMIZER_INKS)]


@dataclass(frozen=True)
class RangeTestInfo:
    """One optimizer's range test, ready to draw."""

    optimizer: str
    rates: Sequence[float]
    losses: Sequence[float | None]
    smoothed: Sequence[float | None]
    low: float
    suggested: float
    high: float
    status: str

    @property
    def title(self) -> str:
        """State the finding."""
        return f"{self.optimizer}: search {self.low:.2g} to {self.high:.2g}"

    @property
    def note(self) -> str:
        """Say what the bounds rest on."""
        return describe_bounds(self.optimizer, self.status, self.suggested)


def range_test_info(record: StudyRecord) -> list[RangeTestInfo]:
    """Return every optimizer's range test."""
    keys = ("rates", "losses", "smoothed", "low", "suggested", "high", "status")
    return [RangeTestInfo(name, *(test[key] for key in keys)) for name, test in record.tests.items()]


def draw_range_test(info: RangeTestInfo) -> go.Figure:
    """Draw loss over the log learning rate, bounds shaded, suggestion marked."""
    import plotly.graph_objects as go

    figure = go.Figure()
    first = [v for v in info.losses[:5] if v is not None]
    top = max([v for v in info.smoothed if v is not None] + first, default=1.0)
    bottom = min((v for v in info.smoothed if v is not None), default=0.0)
    room = 0.08 * (top - bottom or 1.0)
    figure.add_vrect(x0=info.low, x1=info.high, fillcolor=colour(info.optimizer), opacity=0.13, line_width=0)
    figure.add_scatter(
        x=list(info.rates), y=list(info.losses), mode="markers", name="batch loss",
        marker={"size": 4, "color": FAINT}, hovertemplate="rate %{x:.3g}<br>batch loss %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=list(info.rates), y=list(info.smoothed), mode="lines", name="smoothed",
        line={"width": 2.5, "color": colour(info.optimizer)},
        hovertemplate="rate %{x:.3g}<br>smoothed loss %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.add_vline(x=info.suggested, line={"dash": "dash", "width": 1.5, "color": FAINT})
    figure.add_annotation(
        x=np.log10(info.suggested), y=1.0, yref="paper", text=f"try {info.suggested:.2g}", showarrow=False,
        yanchor="bottom", font={"size": 12},
    )  # fmt: skip
    style(figure, "learning rate", "batch loss", height=260)
    decades = np.log10(info.rates[-1] / info.rates[0]) if len(info.rates) > 1 else 1.0
    figure.update_xaxes(type="log", dtick=2 if decades > 4 else 1, exponentformat="power", tickangle=0)
    figure.update_yaxes(range=[bottom - room, top + room])
    figure.update_layout(showlegend=False)
    return figure


def compared_finding(infos: Sequence[RangeTestInfo]) -> str:
    """Say which optimizer's range test reaches the lowest loss, and at which rate, for all of them."""
    found = []
    for info in infos:
        marks = landmarks(info.rates, [np.nan if v is None else v for v in info.smoothed])
        if marks is not None:
            found.append((marks.lowest_loss, f"{info.optimizer} {marks.lowest_loss:.3g} at {marks.minimum:.2g}"))
    if not found:
        return "No range test has a curve."
    found.sort()
    rest = f"; {', '.join(text for _, text in found[1:])}" if len(found) > 1 else ""
    return f"Lowest smoothed loss of the ramps: {found[0][1]}{rest}."


def draw_range_tests(infos: Sequence[RangeTestInfo]) -> go.Figure:
    """Draw all optimizers' smoothed losses, and below it how fast they change, over one log learning rate.

    On each curve: the steepest point, the rate just left of the minimum, and the minimum; under it a bar over
    the bounds.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.64, 0.36], vertical_spacing=0.06)
    style(figure, None, None, height=560)
    curves = {i.optimizer: np.array([np.nan if v is None else v for v in i.smoothed], dtype=float) for i in infos}
    finite = np.concatenate([c[np.isfinite(c)] for c in curves.values()] or [np.zeros(1)])
    starts = [c[np.isfinite(c)][0] for c in curves.values() if np.isfinite(c).any()]
    low, high = (float(finite.min()) if len(finite) else 0.0), 1.25 * float(max(starts, default=1.0))
    room = (high - low) or 1.0
    changes = []
    for row, info in enumerate(infos):
        smoothed, ink = curves[info.optimizer], colour(info.optimizer)
        figure.add_scatter(
            x=list(info.rates), y=list(info.smoothed), mode="lines", name=info.optimizer, legendgroup=info.optimizer,
            line={"color": ink, "width": 2.5}, row=1, col=1,
            hovertemplate=f"{info.optimizer}<br>rate %{{x:.3g}}<br>smoothed loss %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
        marks = landmarks(info.rates, smoothed)
        if marks is not None:
            named = (
                ("steepest", marks.steepest, "diamond"),
                ("just left of the minimum", marks.left_of_minimum, "triangle-down"),
                ("minimum", marks.minimum, "circle"),
            )
            for what, rate, symbol in named:
                figure.add_scatter(
                    x=[rate], y=[float(np.interp(np.log(rate), np.log(info.rates), smoothed))], mode="markers",
                    marker={"symbol": symbol, "size": 10, "color": ink, "line": {"width": 1, "color": "white"}},
                    legendgroup=info.optimizer, showlegend=False, row=1, col=1,
                    hovertemplate=f"{info.optimizer}, {what}: %{{x:.3g}}<extra></extra>",
                )  # fmt: skip
        level = low - room * (0.08 + 0.05 * row)
        figure.add_scatter(
            x=[info.low, info.suggested, info.high], y=[level] * 3, mode="lines+markers", row=1, col=1,
            line={"color": ink, "width": 6}, marker={"symbol": "line-ns-open", "size": [0, 14, 0], "color": ink},
            legendgroup=info.optimizer, showlegend=False, opacity=0.75,
            hovertemplate=f"{info.optimizer}: bounds {info.low:.2g} to {info.high:.2g}, try {info.suggested:.2g}"
            "<extra></extra>",
        )  # fmt: skip
        change = loss_change(smoothed, max(1, len(smoothed) // 20))
        changes.append(change)
        figure.add_scatter(
            x=list(info.rates), y=change.tolist(), mode="lines", legendgroup=info.optimizer, showlegend=False,
            line={"color": ink, "width": 2}, row=2, col=1, name=info.optimizer,
            hovertemplate=f"{info.optimizer}<br>rate %{{x:.3g}}<br>change %{{y:.3g}} per batch<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(title_text="smoothed loss", range=[low - room * (0.12 + 0.05 * len(infos)), high], row=1, col=1)
    falls = [float(np.nanmin(c)) for c in changes if len(c) and np.isfinite(c).any()]
    deepest = min(falls, default=-1.0) or -1.0
    figure.update_yaxes(title_text="change per batch", range=[1.2 * deepest, -1.2 * deepest], row=2, col=1)
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title_text="learning rate", row=2, col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure


MARKS_SAID = (
    "Marks on each curve: steepest descent (diamond), the rate just left of the minimum (triangle), the minimum "
    "(circle). Bars below: the bounds of the search, with the rate to try first."
)


@dataclass(frozen=True)
class CurvesInfo:
    """One trial's learning curves, ready to draw.

    Attributes:
        title: configuration and finding.
        epochs: 1, 2, ...
        train, validation: mean over folds per epoch.
        train_folds, validation_folds: the same per fold.
        rates: learning rate at the start of each epoch.
        best_epoch, overfit_epoch: counted from 1, or None.
        metric: what is drawn.
    """

    title: str
    epochs: Sequence[int]
    train: Sequence[float]
    validation: Sequence[float]
    train_folds: Sequence[Sequence[float]]
    validation_folds: Sequence[Sequence[float]]
    rates: Sequence[float]
    best_epoch: int | None
    overfit_epoch: int | None
    metric: str


def curves_info(record: StudyRecord, trial: TrialRecord) -> CurvesInfo:
    """Return the loss curves of a trial."""
    c = trial.configuration
    assert c is not None
    validation, train = trial.mean_curve("val_loss"), trial.mean_curve("loss")
    epochs = record.about["epochs"]
    label = "Keras default" if trial.baseline else f"trial {trial.number}"
    finding = trial.outcome if trial.outcome != "complete" else (trial.verdict or "")
    if trial.overfit_epoch:
        finding = f"overfits after epoch {trial.overfit_epoch}"
    rates = np.asarray(trial.mean_rates(len(train)) or c.rates(epochs))
    return CurvesInfo(
        title=f"{label}: {c.describe()}" + (f", {finding}" if finding else ""),
        epochs=list(range(1, len(train) + 1)),
        train=train.tolist(),
        validation=validation.tolist(),
        train_folds=trial.curves.get("loss", []),
        validation_folds=trial.curves.get("val_loss", []),
        rates=rates[: len(train)].tolist(),
        best_epoch=trial.best_epoch,
        overfit_epoch=trial.overfit_epoch,
        metric="loss",
    )


def draw_curves(info: CurvesInfo) -> go.Figure:
    """Draw training and validation loss, folds thin and mean bold, over the learning rate."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.74, 0.26], vertical_spacing=0.06)
    for name, mean, folds, ink, dash in (
        ("training", info.train, info.train_folds, PALETTE[1], "dot"),
        ("validation", info.validation, info.validation_folds, PALETTE[0], "solid"),
    ):
        for fold, curve in enumerate(folds):
            figure.add_scatter(
                x=list(range(1, len(curve) + 1)), y=list(curve), mode="lines", line={"width": 1, "color": ink},
                opacity=0.3, showlegend=False, name=f"{name}, fold {fold + 1}",
                hovertemplate=f"{name}, fold {fold + 1}, epoch %{{x}}: %{{y:.4g}}<extra></extra>", row=1, col=1,
            )  # fmt: skip
        figure.add_scatter(
            x=list(info.epochs), y=list(mean), mode="lines", line={"width": 2.5, "color": ink, "dash": dash},
            name=name, hovertemplate=f"{name}, epoch %{{x}}: %{{y:.4g}}<extra></extra>", row=1, col=1,
        )  # fmt: skip
    if info.best_epoch and info.best_epoch <= len(info.validation):
        figure.add_scatter(
            x=[info.best_epoch], y=[info.validation[info.best_epoch - 1]], mode="markers", name="best epoch",
            marker={"size": 10, "symbol": "circle-open", "color": PALETTE[0], "line": {"width": 2}},
            hovertemplate="best epoch %{x}: %{y:.4g}<extra></extra>", row=1, col=1,
        )  # fmt: skip
    if info.overfit_epoch:
        figure.add_vline(
            x=info.overfit_epoch, line={"dash": "dash", "width": 1.5, "color": PALETTE[3]},
            annotation_text="overfits from here", annotation_position="top right", row=1, col=1,
        )  # fmt: skip
    figure.add_scatter(
        x=list(info.epochs), y=list(info.rates), mode="lines", line={"width": 2, "color": PALETTE[2]},
        name="learning rate", showlegend=False, hovertemplate="epoch %{x}: rate %{y:.3g}<extra></extra>", row=2, col=1,
    )  # fmt: skip
    style(figure, None, None, height=360)
    smallest = min([v for v in (*info.train, *info.validation) if np.isfinite(v)], default=1.0)
    figure.update_yaxes(title_text=info.metric, type="log" if smallest > 0 else "linear", row=1, col=1)
    figure.update_yaxes(title_text="rate", rangemode="tozero", nticks=3, row=2, col=1)
    figure.update_xaxes(title_text="epoch", row=2, col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure


def landscape_info(record: StudyRecord) -> dict[str, dict[str, list[Any]]]:
    """Return per optimizer: rate, value and description of each trial that has a value.

    Pruned trials enter with their best epoch over the folds they finished, marked as such.
    """
    points: dict[str, dict[str, list[Any]]] = {}
    for trial in record.trials:
        c = trial.configuration
        curve = trial.mean_curve(record.monitor.name)
        if c is None or trial.diverged_at or not len(curve) or trial.state not in ("complete", "pruned"):
            continue
        best = int(np.argmin(record.monitor.cost(curve)))
        entry = points.setdefault(c.optimizer, {"rate": [], "value": [], "text": [], "decay": [], "pruned": []})
        entry["rate"].append(c.learning_rate)
        entry["value"].append(float(curve[best]))
        entry["decay"].append(c.decay)
        entry["pruned"].append(trial.state == "pruned")
        entry["text"].append(f"trial {trial.number}: {c.describe()}, {trial.state}")
    return points


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
        figure.update_yaxes(type="log")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure


def overfitting_info(found: Overfitting) -> dict[str, dict[str, list[Any]]]:
    """Return per optimizer: rate, overfitting epoch (None where it does not overfit), gaps and text of each trial."""
    points: dict[str, dict[str, list[Any]]] = {}
    for fit in found.fits:
        c, analysis = fit.trial.configuration, fit.analysis
        if c is None:
            continue
        keys = ("rate", "epoch", "gap_at_best", "gap_at_end", "text")
        entry = points.setdefault(c.optimizer, {key: [] for key in keys})
        entry["rate"].append(c.learning_rate)
        entry["epoch"].append(analysis.overfit_epoch)
        entry["gap_at_best"].append(analysis.gap_at_best)
        entry["gap_at_end"].append(analysis.gap_at_end)
        entry["text"].append(f"trial {fit.trial.number}: {c.describe()}, {analysis.verdict}")
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
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
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
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure


def style(figure: go.Figure, x: str | None, y: str | None, height: int) -> None:
    """Plain axes on a transparent ground, so that the page decides on light and dark."""
    figure.update_layout(
        template="none", height=height, margin={"l": 58, "r": 14, "t": 34, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 13}, hovermode="closest",
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=FAINT, title_text=x, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=FAINT, title_text=y, automargin=True)
