"""A sweep side by side: the same training at several learning rates, and why the smallest gap is not the best rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.overfitting import fits_of, metrics_of
from pipeline.report.records import StudyRecord, TrialRecord
from pipeline.search.trial import Monitor

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class SweepRow:
    """One learning rate of a sweep.

    Attributes:
        trial: the trial.
        learning_rate: its rate.
        train, validation: last value of each metric that has both, mean over folds.
        gap: how much worse validation is than training at the last epoch, by metric.
    """

    trial: TrialRecord
    learning_rate: float
    train: dict[str, float]
    validation: dict[str, float]
    gap: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in nothing but the learning rate, lowest rate first."""

    title: str
    rows: tuple[SweepRow, ...]
    monitor: Monitor
    metrics: tuple[str, ...]

    @property
    def best(self) -> SweepRow | None:
        """Return the row with the best monitored value."""
        ran = [row for row in self.rows if row.trial.value is not None]
        return min(ran, key=lambda row: float(self.monitor.cost(row.trial.value)), default=None)

    @property
    def closest(self) -> SweepRow | None:
        """Return the row with the smallest gap in the first metric."""
        name = self.metrics[0] if self.metrics else ""
        return min((r for r in self.rows if name in r.gap), key=lambda r: abs(r.gap[name]), default=None)

    def finding(self) -> str:
        """Say which rate is best and what the gap has to do with it."""
        best, closest = self.best, self.closest
        if best is None or closest is None:
            return "No rate of the sweep ran through."
        same = [row for row in self.rows if row.trial.value == best.trial.value]
        if len(same) > 1:
            return self._tie(same)
        name = self.metrics[0]
        value = f"{self.monitor.label} {best.trial.value:.4g}"
        said = f"The best rate is {best.learning_rate:g} ({value}, gap {best.gap[name]:.3g} in the {name})."
        if closest is best:
            return (
                f"{said} Here it also has the smallest gap, which need not be: a rate that learns nothing has no gap "
                "either. Choose by the validation value."
            )
        return (
            f"{said} The smallest gap, {closest.gap[name]:.3g}, is that of {closest.learning_rate:g}, whose "
            f"{self.monitor.label} is {closest.trial.value:.4g}: less learned, less of a gap. Choose by the "
            "validation value; a gap that grows says from where a run only memorizes."
        )

    def _tie(self, same: Sequence[SweepRow]) -> str:
        """Say that several rates have the best value, and what else tells them apart."""
        rates = [f"{row.learning_rate:g}" for row in same]
        said = (
            f"{', '.join(rates[:-1])} and {rates[-1]} have the same {self.monitor.label}, "
            f"{same[0].trial.value:.4g}, which does not tell them apart"
        )
        losses = {row.learning_rate: row.validation["loss"] for row in same if "loss" in row.validation}
        if self.monitor.name == "val_loss" or len(set(losses.values())) < 2:
            return f"{said}."
        lowest = min(losses, key=losses.__getitem__)
        return f"{said}; the lowest validation loss, {losses[lowest]:.4g}, is that of {lowest:g}."


def sweeps_of(record: StudyRecord) -> list[Sweep]:
    """Return the sweeps of a study, one for every optimizer, decay and further setting; none without a sweep."""
    if not record.definition.get("search.learning_rate.values"):
        return []
    rates = {float(rate) for rate in record.definition["search.learning_rate.values"]}
    groups: dict[str, list[SweepRow]] = {}
    metrics = tuple(metrics_of(record))
    for trial in record.trials:
        c = trial.configuration
        if c is None or c.learning_rate not in rates or trial.state not in ("complete", "pruned"):
            continue
        if trial.baseline and (
            c.optimizer not in record.definition["search.optimizers"]
            or c.decay not in record.definition["search.decays"]
        ):
            continue
        ended = trial.state == "complete"
        row = SweepRow(
            trial,
            c.learning_rate,
            {name: float(trial.mean_curve(name)[-1]) for name in metrics if len(trial.mean_curve(name))},
            {name: float(trial.mean_curve(f"val_{name}")[-1]) for name in metrics if len(trial.mean_curve(name))},
            {fit.metric: fit.analysis.gap_at_end for fit in fits_of(record, [trial]) if ended},
        )
        # The title says everything but the rate.
        said = c.describe().replace(f" at {c.learning_rate:.4g}", "", 1)
        groups.setdefault(said, []).append(row)
    return [
        Sweep(
            title,
            tuple(sorted({row.learning_rate: row for row in rows}.values(), key=lambda row: row.learning_rate)),
            record.monitor,
            metrics,
        )
        for title, rows in groups.items()
        if len({row.learning_rate for row in rows}) > 1
    ]


def sweep_ranges(sweep: Sweep) -> dict[str, tuple[float, float]]:
    """Return the axis of each metric over all rates but those that blew up, so that pictures compare."""
    ranges = {}
    for name in sweep.metrics:
        curves: list[np.ndarray] = []
        for row in sweep.rows:
            if row.trial.state == "complete":
                curves += [row.trial.mean_curve(name), row.trial.mean_curve(f"val_{name}")]
        values = np.concatenate([c[np.isfinite(c)] for c in curves]) if curves else np.array([0.0, 1.0])
        # A rate that overshoots in its first epoch must not flatten the others.
        low, high = float(values.min()), float(min(values.max(), 4 * np.median(values) + 1e-12))
        if high <= low:
            high = low + 1.0
        ranges[name] = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    return ranges


def draw_sweep_run(row: SweepRow, metrics: Sequence[str], ranges: dict[str, tuple[float, float]]) -> go.Figure:
    """Draw one rate's training and validation curves, a panel per metric, on the sweep's common axes."""
    from plotly.subplots import make_subplots

    from pipeline.report.figures.style import PALETTE, style

    figure = make_subplots(rows=max(len(metrics), 1), cols=1, shared_xaxes=True, vertical_spacing=0.07)
    style(figure, None, None, height=150 + 150 * max(len(metrics), 1))
    for panel, name in enumerate(metrics, start=1):
        for label, key, ink, dash in (
            ("training", name, PALETTE[1], "dot"),
            ("validation", f"val_{name}", PALETTE[0], "solid"),
        ):
            for fold, curve in enumerate(row.trial.curves.get(key, [])):
                figure.add_scatter(
                    x=list(range(1, len(curve) + 1)), y=list(curve), mode="lines", line={"width": 1, "color": ink},
                    opacity=0.3, showlegend=False, hoverinfo="skip", name=f"{label}, fold {fold + 1}", row=panel, col=1,
                )  # fmt: skip
            mean = row.trial.mean_curve(key)
            figure.add_scatter(
                x=list(range(1, len(mean) + 1)), y=mean.tolist(), mode="lines+markers", name=label,
                showlegend=panel == 1, line={"width": 2.5, "color": ink, "dash": dash}, marker={"size": 4},
                hovertemplate=f"{label} {name}, epoch %{{x}}: %{{y:.4g}}<extra></extra>", row=panel, col=1,
            )  # fmt: skip
        figure.update_yaxes(title_text=name, range=list(ranges[name]), row=panel, col=1)
    figure.update_xaxes(title_text="epoch", row=max(len(metrics), 1), col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure


def draw_sweep_together(sweep: Sweep, metric: str, limits: tuple[float, float]) -> go.Figure:
    """Draw every rate's validation curve on the same axes, dark to light from the lowest rate to the highest."""
    import plotly.graph_objects as go
    from plotly.colors import sample_colorscale

    from pipeline.report.figures.style import SYMBOLS, style

    figure = go.Figure()
    inks = sample_colorscale("Viridis", list(np.linspace(0.2, 0.85, len(sweep.rows))))
    for number, (row, ink) in enumerate(zip(sweep.rows, inks, strict=True)):
        mean = row.trial.mean_curve(f"val_{metric}")
        figure.add_scatter(
            x=list(range(1, len(mean) + 1)), y=mean.tolist(), mode="lines+markers", name=f"{row.learning_rate:g}",
            line={"color": ink, "width": 2.5}, marker={"size": 6, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            hovertemplate=f"rate {row.learning_rate:g}, epoch %{{x}}: %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    style(figure, "epoch", f"validation {metric}", height=320)
    figure.update_yaxes(range=list(limits))
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "title": "rate"})
    return figure


def draw_sweep(sweep: Sweep, metric: str) -> go.Figure:
    """Draw training and validation value at the last epoch over the learning rate, the gap shaded between them."""
    import plotly.graph_objects as go

    from pipeline.report.figures.style import PALETTE, style

    rows = [row for row in sweep.rows if metric in row.validation and row.trial.state == "complete"]
    x = [row.learning_rate for row in rows]
    figure = go.Figure()
    figure.add_scatter(
        x=x, y=[row.train[metric] for row in rows], mode="lines+markers", name="training",
        line={"color": PALETTE[1], "dash": "dot", "width": 2.5}, marker={"symbol": "square", "size": 8},
        hovertemplate="rate %{x:g}<br>training %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=[row.validation[metric] for row in rows], mode="lines+markers", name="validation",
        line={"color": PALETTE[0], "width": 2.5}, marker={"size": 8}, fill="tonexty", fillcolor="rgba(128,128,128,0.2)",
        hovertemplate="rate %{x:g}<br>validation %{y:.4g}<extra></extra>",
    )  # fmt: skip
    style(figure, "learning rate", f"{metric} at the last epoch", height=320)
    figure.update_xaxes(type="log", tickvals=x, ticktext=[f"{rate:g}" for rate in x])
    values = [v for row in rows for v in (row.train[metric], row.validation[metric])]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure
