"""Colours, shapes and axes that all figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def style(figure: go.Figure, x: str | None, y: str | None, height: int) -> None:
    """Plain axes on a transparent ground, so that the page decides on light and dark."""
    figure.update_layout(
        template="none", height=height, margin={"l": 58, "r": 14, "t": 34, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 13}, hovermode="closest",
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=FAINT, title_text=x, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=FAINT, title_text=y, automargin=True)
