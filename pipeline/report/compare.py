"""Several studies side by side: their answers, what they cost, and whether their values compare at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.doubts import learned_nothing
from pipeline.report.figures.compared import (
    ComparedCurve,
    draw_compared_curves,
    draw_compared_rates,
    draw_compared_search,
)
from pipeline.report.figures.course import busy_seconds
from pipeline.report.html import Figures, page
from pipeline.report.records import Recommendation, StudyRecord, recommend
from pipeline.words import counted, duration


@dataclass(frozen=True)
class Compared:
    """One study among those compared.

    Attributes:
        study: its name.
        answer: recommended configuration in words, or None.
        epochs: recommended epochs, or None.
        monitor: what its values are.
        value, value_std: of the recommendation, or None.
        baseline_value: of the Keras default, or None.
        gain: how much better than the default, with the ends of its 95% interval, or None.
        headline: how it compares with the default, in words.
        trials, pruned, diverged: counts.
        epochs_trained: epochs of all trials and folds together.
        seconds: in which at least one trial ran.
    """

    study: str
    answer: str | None
    epochs: int | None
    monitor: str
    value: float | None
    value_std: float | None
    baseline_value: float | None
    gain: tuple[float, float, float] | None
    headline: str
    trials: int
    pruned: int
    diverged: int
    epochs_trained: int
    seconds: float


def compared(record: StudyRecord) -> Compared:
    """Return what a study is compared by."""
    answer, nothing = recommend(record), learned_nothing(record)
    headline = answer.headline if answer is not None else "no trial ran through"
    spans = [
        (t.started.timestamp(), t.started.timestamp() + t.seconds)
        for t in record.trials
        if t.started is not None and t.seconds is not None
    ]
    gain = answer.improvement if answer is not None else None
    return Compared(
        study=record.name,
        answer=answer.configuration.describe() if answer is not None and nothing is None else None,
        epochs=answer.epochs if answer is not None and nothing is None else None,
        monitor=record.monitor.name,
        value=answer.value if answer is not None else None,
        value_std=answer.value_std if answer is not None else None,
        baseline_value=answer.baseline_value if answer is not None else None,
        gain=(gain.mean, gain.low, gain.high)
        if gain is not None and np.isfinite([gain.low, gain.high]).all()
        else None,
        headline=headline if nothing is None else "nothing is recommended: no trial learned to use the inputs",
        trials=sum(t.state in ("complete", "pruned", "failed") for t in record.trials),
        pruned=record.count("pruned"),
        diverged=record.count("diverged"),
        epochs_trained=sum(t.epochs_run for t in record.trials),
        seconds=busy_seconds(spans),
    )


def differences(records: Sequence[StudyRecord]) -> list[str]:
    """Return what keeps the values of the studies from being compared, or makes them compare with care."""
    found = []
    for key, what in (("monitor", "different values are optimized"), ("mode", "their directions differ")):
        seen = {record.name: record.about[key] for record in records}
        if len(set(seen.values())) > 1:
            found.append(f"The values do not compare: {what} ({_listed(seen)}).")
    if len({record.definition["data"] for record in records}) > 1:
        found.append("The data differ: compare the values with care.")
    if len({record.definition["model"] for record in records}) > 1:
        found.append("The models differ: that is part of what is compared.")
    folds = {record.name: len(record.about["fold_sizes"]) for record in records}
    held = {record.name: record.about["fold_sizes"][0][1] for record in records}
    if len(set(folds.values())) > 1 or len(set(held.values())) > 1:
        found.append(f"Validation differs: folds {_listed(folds)}; validation samples {_listed(held)}.")
    epochs = {record.name: record.about["epochs"] for record in records}
    if len(set(epochs.values())) > 1:
        found.append(f"The runs differ in length: epochs {_listed(epochs)}.")
    return found


def _listed(seen: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in seen.items())


def finding(records: Sequence[StudyRecord], rows: Sequence[Compared]) -> str:
    """Say which study has the best value, if they compare."""
    if len({(record.monitor.name, record.monitor.mode) for record in records}) > 1:
        return "The studies optimize different values, so none is best."
    known = [
        (float(r.monitor.cost(row.value)), row) for r, row in zip(records, rows, strict=True) if row.value is not None
    ]
    if not known:
        return "No study has an answer yet."
    ordered = sorted(known, key=lambda pair: pair[0])
    best = ordered[0][1]
    said = f"{best.study} has the best {best.monitor}, {best.value:.4g}"
    if len(ordered) > 1:
        second = ordered[1][1]
        said += f", before {second.study} with {second.value:.4g}"
        noise = max(best.value_std or 0.0, second.value_std or 0.0)
        if noise and ordered[1][0] - ordered[0][0] < noise:
            said += "; the difference is smaller than the spread between their runs"
    return f"{said}."


def compare_text(records: Sequence[StudyRecord]) -> str:
    """Return the comparison for the terminal."""
    rows = [compared(record) for record in records]
    lines = [finding(records, rows)]
    for row in rows:
        spread = f" ± {row.value_std:.2g}" if row.value_std is not None else ""
        gain = f", gain over the default {row.gain[0]:.3g} ({row.gain[1]:.3g} to {row.gain[2]:.3g})" if row.gain else ""
        answer = f"{row.answer}, {counted(row.epochs, 'epoch')}" if row.answer and row.epochs else "no answer"
        value = f"{row.monitor} {row.value:.4g}{spread}{gain}" if row.value is not None else row.headline
        lines += [
            "",
            row.study,
            f"  {answer}",
            f"  {value}",
            f"  {row.trials} trials ({row.pruned} pruned, {row.diverged} diverged), {row.epochs_trained} epochs, "
            f"{duration(row.seconds)}",
        ]
    notes = differences(records)
    return "\n".join([*lines, *([""] if notes else []), *(f"Note: {note}" for note in notes)])


def compare_rows(records: Sequence[StudyRecord]) -> list[dict[str, Any]]:
    """Return the comparison as plain data, a row per study."""
    return [asdict(compared(record)) for record in records]


def compare_page(records: Sequence[StudyRecord]) -> str:
    """Return the comparison as an HTML page that needs nothing but itself."""
    figures, rows = Figures(), [compared(record) for record in records]
    curves = [curve for record in records if (curve := _curve(record, recommend(record))) is not None]
    pictures = []
    if curves:
        title = "Recommended runs: validation in bold, training dotted"
        pictures.append((title, figures.show(draw_compared_curves(curves, _metric(records)), title)))
    title = "Best value over the epochs trained"
    pictures.append((title, figures.show(draw_compared_search(records, _metric(records)), title)))
    title = "Where the best quarter of each study's trials lies"
    pictures.append((title, figures.show(draw_compared_rates(records), title)))
    return page(
        "compare.html",
        figures,
        rows=rows,
        finding=finding(records, rows),
        notes=differences(records),
        pictures=pictures,
        duration=duration,
    )


def _metric(records: Sequence[StudyRecord]) -> str:
    names = dict.fromkeys(record.monitor.name for record in records)
    return " / ".join(names)


def _curve(record: StudyRecord, answer: Recommendation | None) -> ComparedCurve | None:
    if answer is None:
        return None
    name, trial = record.monitor.name, answer.trial
    return ComparedCurve(
        study=record.name,
        validation=trial.mean_curve(name).tolist(),
        train=trial.mean_curve(name.removeprefix("val_")).tolist(),
        best_epoch=answer.epochs,
        said=f"{record.name}: {answer.configuration.describe()}",
    )


def write_comparison(records: Sequence[StudyRecord], path: Path) -> Path:
    """Write the page of a comparison.

    Raises:
        KnownError: when it cannot be written.
    """
    from pipeline.report.export import write_files

    return write_files(path.parent, {path.name: compare_page(records)})[0]
