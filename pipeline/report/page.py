"""The report: one HTML file with everything in it, built from the storage."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from pipeline.report.doubts import NOTHING_REMEDY, doubts_of, learned_nothing
from pipeline.report.export import keras_code
from pipeline.report.figures.course import (
    divergences,
    draw_history,
    draw_time,
    draw_timeline,
    failures,
    history_info,
    time_info,
    timeline_info,
)
from pipeline.report.figures.curves import curves_info, draw_curves
from pipeline.report.figures.mattered import (
    cross_table,
    draw_importance,
    draw_landscape,
    importance_info,
    landscape_info,
    landscape_title,
)
from pipeline.report.figures.overfitting import draw_gaps, draw_overfitting, overfitting_info
from pipeline.report.figures.range_tests import (
    MARKS_SAID,
    compared_finding,
    draw_inside,
    draw_range_test,
    draw_range_tests,
    inside_info,
    range_test_info,
)
from pipeline.report.html import Figures, page
from pipeline.report.overfitting import disagreement, overfitting_of
from pipeline.report.records import Recommendation, StudyRecord, TrialRecord, describe_divergence, recommend
from pipeline.report.summary import own_finding
from pipeline.report.sweep import draw_sweep, draw_sweep_run, draw_sweep_together, sweep_ranges, sweeps_of
from pipeline.study_template import as_toml

BEST_CURVES = 2
"""Best trials whose learning curves are drawn, besides the Keras default and a few that show what goes wrong."""

TABLE_ROWS = 2000
"""A table of more trials than this is cut; the file of all is linked."""


def render(record: StudyRecord) -> str:
    """Return the report as an HTML page that needs nothing but itself."""
    answer, figures = recommend(record), Figures()
    return page(
        "report.html",
        figures,
        record=record,
        about=record.about,
        answer=answer,
        code=keras_code(record, answer) if answer is not None else "",
        nothing=learned_nothing(record) if answer is not None else None,
        nothing_remedy=NOTHING_REMEDY,
        warnings=doubts_of(record, answer),
        ranges=_ranges(record, figures),
        sweeps=_sweeps(record, figures),
        overfitting=_overfitting(record, figures),
        disagreement=disagreement(record, answer.trial) if answer is not None else None,
        curves=[
            (label, info.title, figures.show(draw_curves(info), info.title)) for label, info in _chosen(record, answer)
        ],
        mattered=_mattered(record, figures),
        course=_course(record, figures),
        rows=[_row(trial) for trial in shown_trials(record)],
        study_file=as_toml(record.study_file) if record.study_file else None,
        own=own_finding(record, answer) if answer is not None else None,
        resume=_resume(record),
        scheme=record.definition.get("validation.scheme", "k-fold"),
        span=_span,
    )


def _resume(record: StudyRecord) -> str:
    """Return the command that resumes the study, with the options that it was run with."""
    return shlex.join(["lrtune", "tune", record.about["study_file"], *record.about.get("options", ())])


def _span(sizes: Iterable[int]) -> str:
    """Return a size, or from which to which they go where they differ by more than a hundredth."""
    listed = list(sizes)
    low, high = min(listed), max(listed)
    return f"{low} to {high}" if high > 1.01 * low + 1 else str(listed[0])


def _ranges(record: StudyRecord, figures: Figures) -> dict[str, Any] | None:
    """Return the range tests: all on the same axes, where the good trials fell, and each by itself."""
    infos = range_test_info(record)
    if not infos:
        return None
    finding, inside = compared_finding(infos), inside_info(record)
    return {
        "finding": finding,
        "together": figures.show(draw_range_tests(infos), finding),
        "marks": MARKS_SAID,
        "inside": (inside.title, figures.show(draw_inside(inside), inside.title)) if inside is not None else None,
        "single": [(info, figures.show(draw_range_test(info), info.title)) for info in infos],
    }


def _mattered(record: StudyRecord, figures: Figures) -> dict[str, Any]:
    """Return what mattered: importance, value over learning rate, optimizer against decay."""
    importance, title = importance_info(record), landscape_title(record)
    return {
        "importance": importance,
        "bars": figures.show(draw_importance(importance), importance.title) if importance is not None else "",
        "title": title,
        "landscape": figures.show(draw_landscape(landscape_info(record), record.monitor.label), title),
        "table": cross_table(record),
    }


def _course(record: StudyRecord, figures: Figures) -> dict[str, Any]:
    """Return the course of the search: history, timeline, time, what diverged and what failed."""
    partly = "Filled trials ran through; open ones were pruned, with their value over the folds that they finished."
    history, timeline, spent = history_info(record), timeline_info(record), time_info(record)
    return {
        "pictures": [
            (
                history.title,
                partly,
                figures.show(draw_history(history, record.monitor.label, len(record.trials)), history.title),
            ),
            (timeline.title, "", figures.show(draw_timeline(timeline), timeline.title)),
            (spent.title, "", figures.show(draw_time(spent), spent.title)),
        ],
        "divergences": divergences(record),
        "failures": failures(record),
        "saved": saved_share(record),
    }


def _sweeps(record: StudyRecord, figures: Figures) -> list[dict[str, Any]]:
    """Return every sweep with its pictures."""
    found = []
    for sweep in sweeps_of(record):
        ranges = sweep_ranges(sweep)
        runs = []
        for row in sweep.rows:
            gap = ", ".join(f"gap {row.gap[name]:.3g} in the {name}" for name in sweep.metrics if name in row.gap)
            title = f"rate {row.learning_rate:g}: {gap or row.trial.outcome}"
            figure = figures.show(draw_sweep_run(row, sweep.metrics, ranges), title) if row.trial.curves else ""
            runs.append((title, figure, row is sweep.best))
        pictures = []
        for name in sweep.metrics:
            title = f"Validation {name} of all rates over the epochs"
            pictures.append((title, figures.show(draw_sweep_together(sweep, name, ranges[name]), title)))
            title = f"Last {name} over the learning rate, the gap shaded"
            pictures.append((title, figures.show(draw_sweep(sweep, name), title)))
        found.append({"title": sweep.title, "finding": sweep.finding(), "runs": runs, "pictures": pictures})
    return found


def _overfitting(record: StudyRecord, figures: Figures) -> list[dict[str, Any]]:
    """Return what the study shows of overfitting in each metric, with its pictures."""
    found = []
    for each in overfitting_of(record):
        points = overfitting_info(each)
        if not points:
            continue
        drawn, all_of_them = sum(len(p["rate"]) for p in points.values()), len(each.fits)
        some = f" ({drawn} of {all_of_them} trials)" if drawn < all_of_them else ""
        epochs = f"{each.metric}: overfitting epoch{some}"
        gaps = f"{each.metric}: gap at the best and the last epoch{some}"
        pictures = [(gaps, figures.show(draw_gaps(points, each.metric), gaps))]
        if each.counts()["overfit"]:
            figure = draw_overfitting(points, record.about["epochs"])
            pictures.insert(0, (epochs, figures.show(figure, f"{epochs}. {each.finding()}")))
        found.append(
            {
                "metric": each.metric,
                "finding": each.finding(),
                "counts": {verdict: count for verdict, count in each.counts().items() if verdict != "diverged"},
                "decays": each.by_decay(),
                "pictures": pictures,
            }
        )
    return found


def _chosen(record: StudyRecord, answer: Recommendation | None) -> list[tuple[str, Any]]:
    """Return the trials worth a look: the best, the default, the runner-up, and how it goes wrong."""
    ranked = record.ranked()
    chosen: list[tuple[str, TrialRecord]] = []

    def add(label: str, trial: TrialRecord | None) -> None:
        if trial is not None and trial.curves.get("val_loss") and trial not in [known for _, known in chosen]:
            chosen.append((label, trial))

    if answer is not None:
        add("recommended", answer.trial)
    add("the Keras default", record.baseline)
    for trial in [t for t in ranked if not t.baseline][:BEST_CURVES]:
        add("among the best", trial)
    over = [t for t in ranked if t.overfit_epoch]
    add("overfits soonest", min(over, key=lambda t: t.overfit_epoch or 0, default=None))
    slow = [t for t in ranked if t.verdict == "underfit"]
    add("learns slowest", slow[-1] if slow else None)
    add("diverges", next((t for t in record.trials if t.outcome == "diverged" and t.epochs_run > 1), None))
    return [(label, curves_info(record, trial)) for label, trial in chosen]


def saved_share(record: StudyRecord) -> float:
    """Return the share of epochs that pruning saved, of all that whole trials would have run."""
    ended = [t for t in record.trials if t.state in ("complete", "pruned")]
    whole = len(ended) * record.about["epochs"] * len(record.about["fold_sizes"])
    return 1.0 - sum(t.epochs_run for t in ended) / whole if whole else 0.0


def shown_trials(record: StudyRecord) -> list[TrialRecord]:
    """Return the trials of the table: all of them, or the best and the first where they are very many."""
    if len(record.trials) <= TABLE_ROWS:
        return list(record.trials)
    best = record.ranked()[: TABLE_ROWS // 2]
    chosen = {trial.number for trial in best}
    for trial in record.trials:
        if len(chosen) == TABLE_ROWS:
            break
        chosen.add(trial.number)
    return [trial for trial in record.trials if trial.number in chosen]


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
