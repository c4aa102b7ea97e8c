"""Learning curves of one trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.figures.style import PALETTE, legend_above, log_y, said, style
from pipeline.report.records import StudyRecord, TrialRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
        said: the whole configuration, for hovering.
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
    said: str = ""


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
        said=said(trial),
    )


def draw_curves(info: CurvesInfo) -> go.Figure:
    """Draw training and validation loss, folds thin and mean bold, over the learning rate."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.74, 0.26], vertical_spacing=0.06)
    more = f"<br>{info.said}<extra></extra>"
    for name, mean, folds, ink, dash in (
        ("training", info.train, info.train_folds, PALETTE[1], "dot"),
        ("validation", info.validation, info.validation_folds, PALETTE[0], "solid"),
    ):
        for fold, curve in enumerate(folds):
            figure.add_scatter(
                x=list(range(1, len(curve) + 1)), y=list(curve), mode="lines", line={"width": 1, "color": ink},
                opacity=0.3, showlegend=False, name=f"{name}, fold {fold + 1}",
                hovertemplate=f"{name}, fold {fold + 1}, epoch %{{x}}: %{{y:.4g}}{more}", row=1, col=1,
            )  # fmt: skip
        figure.add_scatter(
            x=list(info.epochs), y=list(mean), mode="lines", line={"width": 2.5, "color": ink, "dash": dash},
            name=name, hovertemplate=f"{name}, epoch %{{x}}: %{{y:.4g}}{more}", row=1, col=1,
        )  # fmt: skip
    if info.best_epoch and info.best_epoch <= len(info.validation):
        figure.add_scatter(
            x=[info.best_epoch], y=[info.validation[info.best_epoch - 1]], mode="markers", name="best epoch",
            marker={"size": 10, "symbol": "circle-open", "color": PALETTE[0], "line": {"width": 2}},
            hovertemplate=f"best epoch %{{x}}: %{{y:.4g}}{more}", row=1, col=1,
        )  # fmt: skip
    if info.overfit_epoch:
        figure.add_vline(
            x=info.overfit_epoch, line={"dash": "dash", "width": 1.5, "color": PALETTE[3]},
            annotation_text="overfits from here", annotation_position="top right", row=1, col=1,
        )  # fmt: skip
    figure.add_scatter(
        x=list(info.epochs), y=list(info.rates), mode="lines", line={"width": 2, "color": PALETTE[2]},
        name="learning rate", showlegend=False,
        hovertemplate=f"epoch %{{x}}: rate %{{y:.3g}}{more}", row=2, col=1,
    )  # fmt: skip
    style(figure, None, None, height=360)
    drawn = [v for v in (*info.train, *info.validation) if np.isfinite(v)]
    figure.update_yaxes(title_text=info.metric, row=1, col=1)
    if drawn and min(drawn) > 0:
        log_y(figure, min(drawn), max(drawn), row=1, col=1)
    figure.update_yaxes(title_text="rate", rangemode="tozero", nticks=3, row=2, col=1)
    figure.update_xaxes(title_text="epoch", row=2, col=1)
    legend_above(figure)
    return figure
