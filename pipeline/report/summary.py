"""The answer as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.report.doubts import NOTHING_REMEDY, doubts_of, learned_nothing
from pipeline.report.export import keras_code
from pipeline.report.records import Recommendation, StudyRecord, recommend
from pipeline.report.sweep import sweeps_of
from pipeline.words import counted


def _evidence(answer: Recommendation) -> str:
    """Return the default's value, the gain and its interval, in brackets, as far as they are known."""
    if answer.improvement is None or answer.baseline_value is None or answer.trial.baseline:
        return ""
    gain = f" ({answer.baseline_value:.4g}; gain {answer.improvement.mean:.3g}"
    if not answer.tells:
        return f"{gain})"
    where = " on this validation data" if answer.one_split else ""
    return f"{gain}, 95% interval {answer.improvement.low:.3g} to {answer.improvement.high:.3g}{where})"


def own_finding(record: StudyRecord, answer: Recommendation) -> str | None:
    """Say how the optimizer did that the model was compiled with; None where it was a default.

    Args:
        record: the study.
        answer: its recommendation.
    """
    said, own = record.about.get("own_optimizer"), record.about.get("own")
    if said is None:
        return None
    trial = next((t for t in record.trials[:2] if t.source == "own"), None) if own else None
    if trial is not None and trial.state in ("running", "waiting", "failed"):
        how = "failed" if trial.state == "failed" else "has not run to its end yet"
        return f"The optimizer that the model was compiled with, {said}, {how} (trial {trial.number})."
    if trial is None:
        return f"The optimizer that the model was compiled with, {said}, was left aside."
    if trial.number == answer.trial.number:
        return "This is the optimizer that the model was compiled with."
    if trial.state != "complete" or trial.value is None:
        how = "diverged" if trial.diverged_at else "was pruned as hopeless"
        return f"The optimizer that the model was compiled with, {said}, {how} (trial {trial.number})."
    return (
        f"The optimizer that the model was compiled with, {said}, has {record.monitor.label} {trial.value:.4g} in "
        f"trial {trial.number}, the recommended one {answer.trial.value:.4g} in trial {answer.trial.number}."
    )


def summary(record: StudyRecord, paths: Sequence[Path]) -> str:
    """Return the recommendation, its evidence, and where the files are."""
    answer = recommend(record)
    where = next((path for path in paths if path.name == "report.html"), None)
    report = f"Report: {where}" if where is not None else ""
    if answer is None:
        return f"No trial ran through, so there is no answer.\n{report}"
    nothing = learned_nothing(record)
    if nothing is not None:
        others = [text for text in doubts_of(record, answer) if not text.startswith(nothing)]
        said = [f"{nothing} Nothing is recommended.", NOTHING_REMEDY, *(f"Note: {text}" for text in others)]
        return "\n".join(["", *said, "", report])
    spread = f" ± {answer.value_std:.2g}" if answer.value_std is not None else ""
    lines = [
        "",
        f"Train with {answer.configuration.describe()} for {counted(answer.epochs, 'epoch')}.",
        f"{record.monitor.label} {answer.value:.4g}{spread}: {answer.headline}{_evidence(answer)}.",
    ]
    ties = [
        "the Keras default" if trial.baseline else trial.configuration.describe()
        for trial in answer.tied_with
        if trial.configuration is not None
    ]
    if ties and answer.tells:
        lines.append(f"Not distinguishable from it: {'; '.join(ties)}.")
    lines += [f"{answer.sameness}."] if answer.sameness is not None else []
    own = own_finding(record, answer)
    lines += [own] if own is not None else []
    lines += [sweep.finding() for sweep in sweeps_of(record)]
    lines += [f"Note: {doubt}" for doubt in doubts_of(record, answer)]
    code = "".join(f"    {line}\n" if line else "\n" for line in keras_code(record, answer).splitlines())
    return "\n".join([*lines, "", code.rstrip(), "", report])
