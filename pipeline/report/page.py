"""The report: one HTML file with everything in it, built from the storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.report.doubts import doubts_of
from pipeline.report.export import keras_code
from pipeline.report.figures.curves import curves_info, draw_curves
from pipeline.report.figures.mattered import draw_landscape, landscape_info
from pipeline.report.figures.overfitting import draw_gaps, draw_overfitting, overfitting_info
from pipeline.report.figures.range_tests import (
    MARKS_SAID,
    compared_finding,
    draw_range_test,
    draw_range_tests,
    range_test_info,
)
from pipeline.report.overfitting import disagreement, overfitting_of
from pipeline.report.records import Recommendation, StudyRecord, TrialRecord, describe_divergence, recommend
from pipeline.report.sweep import draw_sweep, draw_sweep_run, draw_sweep_together, sweep_ranges, sweeps_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

CURVES_SHOWN = 3
"""Best trials whose learning curves are drawn, besides the Keras default."""


def render(record: StudyRecord) -> str:
    """Return the report as an HTML page that needs nothing but itself."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    answer = recommend(record)
    return environment.get_template("report.html").render(
        record=record,
        about=record.about,
        answer=answer,
        code=keras_code(record, answer) if answer is not None else "",
        warnings=doubts_of(record, answer),
        range_tests_together=_together(record),
        marks_said=MARKS_SAID,
        range_tests=[(info, _html(draw_range_test(info), info.title)) for info in range_test_info(record)],
        sweeps=_sweeps(record),
        overfitting=_overfitting(record),
        disagreement=disagreement(record, answer.trial) if answer is not None else None,
        curves=[(info.title, _html(draw_curves(info), info.title)) for info in _chosen_curves(record, answer)],
        landscape=_html(draw_landscape(landscape_info(record), record.monitor.name), "value over learning rate"),
        rows=[_row(trial) for trial in record.trials],
        plotlyjs=get_plotlyjs(),
        saved=saved_share(record),
    )


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for people; a dash for none.

    >>> number(0.123456), number(None)
    ('0.1235', '–')
    """
    return "–" if value is None else f"{value:.{digits}g}"


def _html(figure: go.Figure, label: str) -> str:
    """Return a figure as a fragment; the library itself stands once in the page."""
    import html

    fragment = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    return f'<div class="figure" role="img" aria-label="{html.escape(label, quote=True)}">{fragment}</div>'


def _together(record: StudyRecord) -> tuple[str, str] | None:
    """Return the finding and the picture of all range tests on the same axes."""
    infos = range_test_info(record)
    finding = compared_finding(infos)
    return (finding, _html(draw_range_tests(infos), finding)) if infos else None


def _sweeps(record: StudyRecord) -> list[dict[str, Any]]:
    """Return every sweep with its pictures."""
    found = []
    for sweep in sweeps_of(record):
        ranges = sweep_ranges(sweep)
        runs = []
        for row in sweep.rows:
            gap = ", ".join(f"gap {row.gap[name]:.3g} in the {name}" for name in sweep.metrics if name in row.gap)
            title = f"rate {row.learning_rate:g}: {gap or row.trial.outcome}"
            figure = _html(draw_sweep_run(row, sweep.metrics, ranges), title) if row.trial.curves else ""
            runs.append((title, figure, row is sweep.best))
        pictures = []
        for name in sweep.metrics:
            together = draw_sweep_together(sweep, name, ranges[name])
            pictures.append(_html(together, f"validation {name} of all rates over the epochs"))
            pictures.append(_html(draw_sweep(sweep, name), f"{name} over the learning rate"))
        found.append({"title": sweep.title, "finding": sweep.finding(), "runs": runs, "pictures": pictures})
    return found


def _overfitting(record: StudyRecord) -> list[dict[str, Any]]:
    """Return what the study shows of overfitting in each metric, with its pictures."""
    found = []
    for each in overfitting_of(record):
        points = overfitting_info(each)
        if not points:
            continue
        found.append(
            {
                "metric": each.metric,
                "finding": each.finding(),
                "counts": {verdict: count for verdict, count in each.counts().items() if verdict != "diverged"},
                "decays": each.by_decay(),
                "epochs": _html(draw_overfitting(points, record.about["epochs"]), f"{each.metric}: overfitting epoch"),
                "gaps": _html(draw_gaps(points, each.metric), f"{each.metric}: gap between validation and training"),
            }
        )
    return found


def _chosen_curves(record: StudyRecord, answer: Recommendation | None) -> list[Any]:
    chosen: list[TrialRecord] = [answer.trial] if answer is not None else []
    chosen += [trial for trial in record.ranked() if trial not in chosen and not trial.baseline]
    chosen = chosen[:CURVES_SHOWN]
    baseline = record.baseline
    if baseline is not None and baseline not in chosen:
        chosen.insert(1, baseline)
    return [curves_info(record, trial) for trial in chosen if trial.curves.get("val_loss")]


def saved_share(record: StudyRecord) -> float:
    """Return the share of epochs that pruning saved, of all that whole trials would have run."""
    ended = [t for t in record.trials if t.state in ("complete", "pruned")]
    whole = len(ended) * record.about["epochs"] * len(record.about["fold_sizes"])
    return 1.0 - sum(t.epochs_run for t in ended) / whole if whole else 0.0


def _row(trial: TrialRecord) -> dict[str, Any]:
    c = trial.configuration
    return {
        "number": trial.number,
        "outcome": "Keras default" if trial.baseline and trial.outcome == "complete" else trial.outcome,
        "optimizer": c.optimizer if c else "",
        "learning_rate": c.learning_rate if c else None,
        "decay": c.decay if c else "",
        "final_fraction": c.final_fraction if c and c.decay != "constant" else None,
        "value": trial.value,
        "best_epoch": trial.best_epoch,
        "verdict": trial.verdict or "",
        "note": describe_divergence(trial.diverged_at) or trial.error or "",
        "seconds": trial.seconds,
    }
