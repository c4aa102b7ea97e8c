"""Colours, shapes and axes that all figures share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pipeline.report.records import TrialRecord
from pipeline.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import plotly.graph_objects as go

T = TypeVar("T")

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


def style(figure: go.Figure, x: str | None, y: str | None, height: int) -> None:
    """Plain axes on a transparent ground, so that the page decides on light and dark."""
    figure.update_layout(
        template="none", height=height, margin={"l": 58, "r": 14, "t": 34, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 13}, hovermode="closest",
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=FAINT, title_text=x, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=FAINT, title_text=y, automargin=True)


def legend_above(figure: go.Figure) -> None:
    """Put the legend in a row above the axes."""
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})


def log_y(figure: go.Figure, low: float, high: float, **place: int) -> None:
    """Make an axis of values logarithmic, with as few ticks as can be read.

    Args:
        figure: the figure.
        low, high: smallest and largest value shown, above 0.
        place: row and column, in a figure of several axes.
    """
    decades = math.log10(high / low) if 0 < low < high else 1.0
    ticks = 1 if decades > 2.5 else "D2" if decades > 1.2 else "D1"
    figure.update_yaxes(type="log", dtick=ticks, minor={"showgrid": False}, **place)


@dataclass(frozen=True)
class Look:
    """How an outcome is shown: its words, colour, marker and, for bars, pattern."""

    name: str
    ink: str
    symbol: str
    pattern: str


OUTCOMES = {
    "complete": Look("ran through", PALETTE[0], "circle", ""),
    "pruned": Look("were pruned", PALETTE[5], "circle-open", "/"),
    "diverged": Look("diverged", PALETTE[1], "x", "x"),
    "failed": Look("failed", PALETTE[3], "cross", "."),
    "running": Look("are running", PALETTE[7], "triangle-up-open", "-"),
    "waiting": Look("are waiting", PALETTE[7], "triangle-down-open", "|"),
}


ENOUGH_TRIALS = 2000
"""Of more trials than this, so many are looked at: they say what all say."""


def evenly(trials: Sequence[T]) -> list[T]:
    """Return very many trials thinned evenly over the study, others as they are.

    >>> len(evenly(range(5))), len(evenly(range(10_000)))
    (5, 2000)
    """
    if len(trials) <= ENOUGH_TRIALS:
        return list(trials)
    return [trials[i * len(trials) // ENOUGH_TRIALS] for i in range(ENOUGH_TRIALS)]


def said(trial: TrialRecord) -> str:
    """Return a trial's number, whole configuration and outcome, for hovering."""
    what = trial.configuration.describe() if trial.configuration else "not drawn yet"
    ended = {"complete": "ran through"}.get(trial.outcome, trial.outcome)
    default = "Keras default, " if trial.baseline else ""
    return f"trial {trial.number}: {default}{what}, {ended}"
