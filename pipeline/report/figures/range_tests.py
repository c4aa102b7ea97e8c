"""Range tests: loss over the learning rate, for one optimizer and for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.figures.style import FAINT, PALETTE, colour, legend_above, said, style
from pipeline.report.records import StudyRecord
from pipeline.search.range_test import describe_bounds, landmarks, loss_change

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
    legend_above(figure)
    return figure


MARKS_SAID = (
    "Marks on each curve: steepest descent (diamond), the rate just left of the minimum (triangle), the minimum "
    "(circle). Bars below: the bounds of the search, with the rate to try first."
)


@dataclass(frozen=True)
class InsideInfo:
    """Where the trials fell inside the bounds, ready to draw.

    Attributes:
        bounds: (low, suggested, high) per optimizer.
        trials: per optimizer (learning rate, whether it is among the best quarter, description) of each trial.
        best: (optimizer, learning rate) of the best trial, or None.
        title: the finding.
    """

    bounds: dict[str, tuple[float, float, float]]
    trials: dict[str, list[tuple[float, bool, str]]]
    best: tuple[str, float] | None
    title: str


GOOD_SHARE = 0.25
"""Trials in this best share of all that ran through are called good."""


def inside_info(record: StudyRecord) -> InsideInfo | None:
    """Return where good and other trials fell inside the bounds of the range tests; None without range tests."""
    ranked = record.ranked()
    if not record.tests or not ranked:
        return None
    good = {trial.number for trial in ranked[: max(1, round(GOOD_SHARE * len(ranked)))]}
    bounds = {name: (test["low"], test["suggested"], test["high"]) for name, test in record.tests.items()}
    trials: dict[str, list[tuple[float, bool, str]]] = {name: [] for name in bounds}
    places = []
    for trial in record.trials:
        c = trial.configuration
        if c is None or c.optimizer not in trials or trial.state not in ("complete", "pruned"):
            continue
        trials[c.optimizer].append((c.learning_rate, trial.number in good, said(trial)))
        low, _, high = bounds[c.optimizer]
        if trial.number in good:
            places.append(float(np.log(c.learning_rate / low) / np.log(high / low)))
    top = ranked[0].configuration
    middle = sum(0.1 <= place <= 0.9 for place in places)
    outside = sum(not 0.0 <= place <= 1.0 for place in places)
    title = f"{middle} of the {len(places)} best trials lie well inside the bounds"
    if middle < len(places):
        edge = len(places) - middle - outside
        parts = [f"{edge} near an edge"] if edge else []
        title += f", {' and '.join([*parts, f'{outside} beyond'] if outside else parts)}"
    best = (top.optimizer, top.learning_rate) if top is not None and top.optimizer in bounds else None
    return InsideInfo(bounds, trials, best, title)


def draw_inside(info: InsideInfo) -> go.Figure:
    """Draw a band from low to high per optimizer, every trial faint in it, the best quarter bold."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, (low, suggested, high) in reversed(info.bounds.items()):
        ink = colour(name)
        figure.add_scatter(
            x=[low, high], y=[name, name], mode="lines", line={"width": 16, "color": ink}, opacity=0.2,
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        figure.add_scatter(
            x=[suggested], y=[name], mode="markers", showlegend=False,
            marker={"symbol": "line-ns-open", "size": 18, "color": ink, "line": {"width": 2}},
            hovertemplate=f"{name}: try %{{x:.3g}} first, search {low:.2g} to {high:.2g}<extra></extra>",
        )  # fmt: skip
        for is_good, symbol, size in ((False, "circle-open", 6), (True, "circle", 9)):
            chosen = [(rate, text) for rate, good, text in info.trials[name] if good == is_good]
            figure.add_scatter(
                x=[rate for rate, _ in chosen], y=[name] * len(chosen), text=[text for _, text in chosen],
                mode="markers", marker={"symbol": symbol, "size": size, "color": ink}, showlegend=False,
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    if info.best is not None:
        figure.add_scatter(
            x=[info.best[1]], y=[info.best[0]], mode="markers", showlegend=False, hoverinfo="skip",
            marker={"symbol": "star-open", "size": 19, "color": PALETTE[1], "line": {"width": 2}},
        )  # fmt: skip
    style(figure, "learning rate", None, height=120 + 36 * max(len(info.bounds), 2))
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_layout(margin={"t": 8})
    return figure
