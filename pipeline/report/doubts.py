"""What keeps the answer from being sure, said first, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.report.records import TWO_REPEATS, Recommendation, StudyRecord, TrialRecord
from pipeline.search.range_test import odd_pairs
from pipeline.search.space import widening_note
from pipeline.words import counted

NOTHING = 0.01
"""A loss within this share of the best constant answer's shows that nothing was learned."""

NOTHING_REMEDY = (
    "Look at the scale of the inputs, the labels, the loss and the model; or raise epochs, or search other learning "
    "rates."
)
"""What to do where no trial has learned anything."""

ACCURACIES = ("accuracy", "acc", "binary_accuracy", "categorical_accuracy", "sparse_categorical_accuracy")
"""Metrics that are the share of right answers."""

MANY_DIVERGED = 3
"""With more trials than this, of which more than half diverged, the bounds were too high."""

FEW_SAMPLES = 50
"""Fewer validation samples than this in a fold make its value coarse: one of them is 2% of an accuracy."""


def doubts_of(record: StudyRecord, answer: Recommendation | None) -> list[str]:
    """Return the doubts about a study's answer, the gravest first.

    Args:
        record: the study.
        answer: its recommendation, or None.
    """
    # What the study showed of itself before it trained: it says what any value here is worth.
    found = [str(doubt) for doubt in (record.proof or {}).get("doubts", ())]
    if answer is None:
        return [*found, "No trial ran through: every one diverged, failed, or is still to run."]
    epochs = record.about["epochs"]
    length = counted(epochs, "epoch")
    complete = [trial for trial in record.trials if trial.state == "complete"]
    unfinished = record.count("waiting") + record.count("running")
    if unfinished:
        found.append(f"{unfinished} trials have not run yet; run 'lrtune tune' again to finish the study.")
    nothing = learned_nothing(record)
    if nothing is not None:
        found.append(f"{nothing} {NOTHING_REMEDY}")
    held = min(sizes[1] for sizes in record.about["fold_sizes"])
    if held < FEW_SAMPLES:
        found.append(
            f"Each validation value rests on {held} samples, too few to tell good configurations apart; "
            f"{_remedy(record)}."
        )
    if len(complete) > 1 and all(trial.verdict == "underfit" for trial in complete):
        found.append(
            f"Every trial was still improving after {length}: the study ranks who learns fastest, not who "
            "ends best; raise epochs."
        )
    elif answer.epochs == epochs:
        found.append(
            f"The recommended run is still at its best in the last of {length}; "
            "raise epochs to see whether more training helps."
        )
    elif answer.trial.verdict == "underfit":
        found.append(
            f"The loss of the recommended run was still falling after {length}, though {record.monitor.label} "
            "was best before; raise epochs to see whether more training helps."
        )
    if answer.trial.state != "complete":
        found.append(
            "The time was up before a trial had run through: this is the best of the epochs that were trained, "
            "and says little of what whole runs end at. Run 'lrtune tune' again to go on, or give it more time."
        )
    if answer.confirmed and record.confirm and record.confirmed_repeats < record.confirm["repeats"]:
        found.append(
            f"The confirmation was cut off after {record.confirmed_repeats} of {record.confirm['repeats']} repeats; "
            "run 'lrtune tune' again to finish it."
        )
    if not answer.confirmed:
        found.append(
            "The answer was not confirmed on fresh seeds: the best of many noisy trials looks better than it is."
        )
    elif not answer.tells:
        found.append(
            f"The finalists and the Keras default ran {counted(answer.fold_runs, 'time')} each on fresh seeds: "
            f"{TWO_REPEATS}; raise confirm.repeats, or use folds."
        )
    elif answer.tied_with and len(answer.tied_with) + 1 >= len(_candidates(record)):
        found.append(
            "The confirmation cannot tell the finalists and the Keras default apart: every interval of their "
            "differences reaches zero; more data or more confirm.repeats may."
        )
    diverged, ended = record.count("diverged"), sum(t.state in ("complete", "pruned") for t in record.trials)
    if ended > MANY_DIVERGED and diverged > ended / 2:
        found.append(
            f"{diverged} of {ended} trials diverged: the search reached far above the rates that train this model; "
            "lower search.learning_rate, or raise trials so that it finds the way down."
        )
    if record.widened is not None:
        note = widening_note(record.widened)
        if note:
            found.append(f"{note[0].upper()}{note[1:]}. Look at where the good trials lie.")
    highest = record.definition.get("range_test.high")
    beyond = [name for name, test in record.tests.items() if highest is not None and test["high"] > 1.5 * highest]
    if beyond:
        found.append(
            f"The bounds of {', '.join(beyond)} reach beyond range_test.high = {highest:g}, where the loss had not "
            "risen yet: look at their range tests before you trust a rate there."
        )
    for one, other in odd_pairs({name: float(test["suggested"]) for name, test in record.tests.items()}):
        rates = " and ".join(f"{record.tests[name]['suggested']:.3g} ({name})" for name in (one, other))
        found.append(
            f"The range tests of {one} and {other}, which learn at much the same rates, lie more than a decade apart: "
            f"{rates}; one of the two has read another valley."
        )
    not_ok = [name for name, test in record.tests.items() if test["status"] != "ok"]
    if not_ok:
        found.append(f"The range test of {', '.join(not_ok)} found no valley; its bounds there are a guess.")
    failed = record.count("failed")
    if failed:
        found.append(f"{failed} trials failed; the table says why.")
    return found


def learned_nothing(record: StudyRecord) -> str | None:
    """Say that no trial is better than a model that ignores its inputs, where it is so: nothing is recommended then."""
    complete = [trial for trial in record.trials if trial.state == "complete"]
    if not record.monitor.on_validation:
        return None  # the bar is that of validation samples
    name = record.monitor.name.removeprefix("val_")
    bar = dict(record.about.get("no_skill") or {}).get("accuracy" if name in ACCURACIES else name)
    values = [trial.value for trial in complete if trial.value is not None]
    if bar is None or not values or _classifies_better(record, complete) or _fits_better(record, complete):
        return None
    if name in ACCURACIES:
        best = max(values)
        answer = f"always answering the commonest class gives {bar:.4g}"
    else:
        best = min(values)
        answer = f"one constant answer gives {bar:.4g}"
    return f"No trial learned to use the inputs: the best {record.monitor.name} is {best:.4g}, and {answer}."


def _classifies_better(record: StudyRecord, complete: Sequence[TrialRecord]) -> bool:
    """Return whether some trial's accuracy, where one was measured, is beyond the commonest class's share."""
    bar = dict(record.about.get("no_skill") or {}).get("accuracy")
    found = [c for trial in complete for name in ACCURACIES if len(c := trial.mean_curve(f"val_{name}"))]
    if bar is None or not found:
        return False
    held = sum(sizes[1] for sizes in record.about["fold_sizes"])
    threshold = min(bar + np.sqrt(bar * (1 - bar) / held), (1 + bar) / 2)
    return bool(max(float(np.nanmax(curve)) for curve in found) > threshold)


def _fits_better(record: StudyRecord, complete: Sequence[TrialRecord]) -> bool:
    """Return whether some trial's validation loss is below that of the best constant answer."""
    bar = dict(record.about.get("no_skill") or {}).get("loss")
    found = [c for trial in complete if len(c := trial.mean_curve("val_loss"))]
    return bar is not None and any(float(np.nanmin(curve)) < bar * (1 - NOTHING) for curve in found)


def _remedy(record: StudyRecord) -> str:
    """Say how a fold gets more validation samples."""
    if record.one_split:
        return "add validation data"
    scheme = record.definition.get("validation.scheme")
    return "add data, or raise validation.fraction" if scheme == "hold-out" else "add data, or use fewer folds"


def _candidates(record: StudyRecord) -> list[int]:
    return list(record.confirm["candidates"]) if record.confirm else []
