"""The result files of a study: the recommendation as JSON and as Keras code, and the tables as CSV.

Every file is written aside and moved into place, so that none is ever half-written.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import KnownError
from pipeline.report.doubts import doubts_of, learned_nothing
from pipeline.report.overfitting import overfitting_frame
from pipeline.report.records import (
    Recommendation,
    StudyRecord,
    bounds_frame,
    curves_frame,
    range_test_frame,
    recommend,
    trials_frame,
)
from pipeline.training.decays import WARM_UP_CODE, keras_schedule_code, plateau_callback_code

if TYPE_CHECKING:
    import pandas as pd


def best_json(record: StudyRecord, answer: Recommendation) -> dict[str, Any]:
    """Return the recommendation, machine-readable; keys that the study did not use are None.

    Where no trial learned anything, nothing is recommended: all keys of the recommendation are None.
    """
    nothing = learned_nothing(record) is not None
    c, improvement = answer.configuration, answer.improvement
    settings = c.spec.settings
    baseline = record.baseline
    found = {
        "study": record.name,
        "objective": record.about["objective"],
        "recommended": not nothing,
        "optimizer": c.optimizer,
        "learning_rate": c.learning_rate,
        "decay": c.decay,
        "final_fraction": None if c.decay == "constant" else c.final_fraction,
        "epochs": answer.epochs,
        "batch_size": record.batch_size(c),
        "momentum": settings.get("momentum"),
        "weight_decay": settings.get("weight_decay"),
        "warmup_fraction": c.warmup_fraction,
        "monitor": record.monitor.name,
        "mode": record.monitor.mode,
        "value": answer.value,
        "value_std": answer.value_std,
        "trial": answer.trial.number,
        "baseline": None
        if baseline is None or baseline.configuration is None
        else {
            "optimizer": baseline.configuration.optimizer,
            "learning_rate": baseline.configuration.learning_rate,
            "value": answer.baseline_value,
        },
        "improvement": None
        if improvement is None
        else {"mean": improvement.mean, "ci_low": _finite(improvement.low), "ci_high": _finite(improvement.high)},
        "tied_with": [
            {"trial": trial.number, "baseline": trial.baseline, **trial.configuration.as_dict()}
            for trial in answer.tied_with
            if trial.configuration is not None
        ],
        "doubts": doubts_of(record, answer),
    }
    return {**found, **dict.fromkeys(RECOMMENDED), "tied_with": []} if nothing else found


RECOMMENDED = (
    "optimizer", "learning_rate", "decay", "final_fraction", "epochs", "batch_size", "momentum", "weight_decay",
    "warmup_fraction", "value", "value_std", "trial", "improvement",
)  # fmt: skip
"""Keys of best.json that say what to train with and how good that is."""


def _finite(value: float) -> float | None:
    """Return a bound, or None where one paired run gives none."""
    return value if math.isfinite(value) else None


SEEDED_CODE = """\
# Under keras.utils.set_random_seed or tf.random.set_seed, model.fit repeats one order of samples in every epoch; the
# study shuffled anew. So does tf.data.Dataset.from_tensor_slices(...).shuffle(...).batch(...), under a seed too.
"""
"""What is said in the code for a program that seeds TensorFlow."""


def keras_code(record: StudyRecord, answer: Recommendation) -> str:
    """Return the recommendation as Keras code to paste.

    The schedule counts steps as the study's folds did, so it gives the study's rate at every step.
    Folds of a time series grow; there it counts those of all training samples.
    """
    c, about = answer.configuration, record.about
    sizes = [trained for trained, _ in about["fold_sizes"]]
    grow = max(sizes) > 1.5 * min(sizes)
    batch_size, epochs = record.batch_size(c), about["epochs"]
    steps = -(-(about["samples"] if grow else sizes[0]) // batch_size)
    schedule = keras_schedule_code(c.decay, c.learning_rate, c.final_fraction, epochs * steps, c.warmup_fraction or 0.0)
    optimizer = c.spec.code("learning_rate")
    own = WARM_UP_CODE if "WarmUp(" in schedule else ""
    # Keras builds an optimizer inside the graph of `fit`, where copies of weights come out as zeros.
    copies = c.optimizer == "schedule-free-adamw"
    built = (
        "# optimizer.build(model.trainable_variables)  # so that its averages start at the weights\n" if copies else ""
    )
    callbacks = fitted = ""
    if c.decay == "plateau" and c.final_fraction < 1:
        rule = plateau_callback_code(
            c.final_fraction, c.learning_rate, epochs, record.monitor.name, record.monitor.mode
        )
        callbacks, fitted = f"callbacks = [{rule}]\n", ", validation_data=..., callbacks=callbacks"
    seeded = SEEDED_CODE if about.get("seeded") else ""
    laid_out = "of all samples" if grow else "as in the study"
    decays = "" if c.decay == "constant" else f"\n# {c.decay} decay over {epochs} epochs of {steps} steps, {laid_out}"
    weights = ", sample_weight=..." if about.get("weighted") else ""
    data, size = "x_train, y_train", f", batch_size=BATCH_SIZE{weights}"
    if about.get("dataset"):
        every = record.definition.get("steps_per_epoch")
        data, size = "train", f", steps_per_epoch={every}" if every else ""
        fitted = fitted.replace("validation_data=...", "validation_data=validation")
    return f"""import keras

EPOCHS = {answer.epochs}
{"" if about.get("dataset") else f"BATCH_SIZE = {batch_size}{chr(10)}"}{own}{decays}
learning_rate = {schedule}
optimizer = {optimizer}
{callbacks}
# model.compile(optimizer=optimizer, loss=..., metrics=[...])
{built}{seeded}# model.fit({data}{size}, epochs=EPOCHS{fitted})
"""


def write_results(record: StudyRecord, folder: Path, page: str | None) -> list[Path]:
    """Write every result file of the study.

    Args:
        record: the study.
        folder: where to; it is made if it does not exist.
        page: the report as HTML, or None to leave the report out.

    Returns:
        The files written.

    Raises:
        KnownError: when the folder cannot be written.
    """
    files: dict[str, str] = {}
    answer = recommend(record)
    if answer is not None:
        files["best.json"] = json.dumps(best_json(record, answer), indent=2, allow_nan=False) + "\n"
    recommended = answer if answer is not None and learned_nothing(record) is None else None
    if recommended is not None:
        evidence = f"{record.monitor.label} {recommended.value:.4g}, {recommended.headline}."
        where = json.dumps(record.about["objective"])[1:-1].replace('"', "'")
        files["best.py"] = f'"""What lrtune recommends for {where}: {evidence}"""\n\n{keras_code(record, recommended)}'
    for name, frame in (
        ("trials", trials_frame(record)),
        ("curves", curves_frame(record)),
        ("overfitting", overfitting_frame(record)),
    ):
        files[f"{name}.csv"] = csv_text(frame)
    files |= range_test_tables(record.tests)
    if page is not None:
        files["report.html"] = page
    written = write_files(folder, files)
    for name in ("best.json", "best.py"):  # of an earlier study under this name, or of fewer trials
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    return written


def range_test_tables(tests: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return range_test.csv and bounds.csv by file name, of range tests as they are stored."""
    return {"range_test.csv": csv_text(range_test_frame(tests)), "bounds.csv": csv_text(bounds_frame(tests))}


def csv_text(frame: pd.DataFrame) -> str:
    """Return a frame as pandas writes it as CSV without its index, numbers in a third of the time."""
    numbers = [kind in ("float64", "int64") for kind in map(str, frame.dtypes)]
    if not all(numbers):
        return frame.to_csv(index=False, lineterminator="\n")
    columns = []
    for name in frame.columns:
        values = frame[name].to_numpy()
        missing = np.isnan(values)
        columns.append(np.where(missing, "", values.astype(object)).tolist() if missing.any() else values.tolist())
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write text files into a folder, each aside and then moved into place.

    Raises:
        KnownError: when the folder cannot be made or written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            handle, aside = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                    file.write(text)
                os.chmod(aside, 0o644)
                os.replace(aside, folder / name)
            except BaseException:
                Path(aside).unlink(missing_ok=True)
                raise
            written.append(folder / name)
    except OSError as error:
        raise KnownError(
            f"{folder}: the results cannot be written ({error.strerror or error}). Make the folder writable, free some "
            "space, or choose another with --output; the trials are safe in the storage."
        ) from error
    return written


def check_writable(folder: Path) -> None:
    """Refuse a results folder that cannot be written, before any work is done; leaves nothing behind.

    Raises:
        KnownError: naming the folder and the remedy.
    """
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise KnownError(
            f"{folder}: the results need a folder, but {nearest} is a file. Move it, or choose another with --output."
        )
    try:
        handle, probe = tempfile.mkstemp(dir=nearest, prefix=".lrtune-")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise KnownError(
            f"{folder}: the results cannot be written there ({error.strerror or error}). Make {nearest} writable, or "
            "choose another folder with --output."
        ) from error
