"""What mattered: the value of every trial over its learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.report.figures.style import SYMBOLS, colour, style
from pipeline.report.records import StudyRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
