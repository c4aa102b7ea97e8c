"""Layers made once, at the top of a program: whole studies on pure noise, alone and with workers."""

from __future__ import annotations

import pytest

from pipeline.report.doubts import learned_nothing
from pipeline.report.records import load_record
from pipeline.study_file import read_study

PROGRAM = """
import keras
import numpy as np
from keras import layers

r = np.random.default_rng(0)
x = r.normal(size=(300, 20)).astype("float32")
y = r.integers(0, 2, 300)  # noise: nothing better than ln 2 on samples that were not trained on

def make_body():
    return keras.Sequential([keras.Input((20,)), layers.Dense(64, "relu"), layers.Dense(16, "relu")])

{top}

def load_data():
    return (x[:240], y[:240]), (x[240:], y[240:])

def build_model():
    model = keras.Sequential([keras.Input((20,)), {body}, layers.Dense(1, activation="sigmoid")])
    model.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])
    return model
"""

KEYS = """
objective = "model.py"
epochs = 8
trials = 5
[validation]
folds = 3
[search]
optimizers = ["sgd", "adam"]
[confirm]
finalists = 1
repeats = 2
"""


def write(folder, *, shared: bool):
    """Write a program whose body is made once, or anew for every model."""
    folder.mkdir()
    body, top = ("body", "body = make_body()") if shared else ("make_body()", "")
    (folder / "model.py").write_text(PROGRAM.format(top=top, body=body))
    (folder / "study.toml").write_text(KEYS)
    return folder / "study.toml"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_shared_body_learns_no_noise(tmp_path, lrtune, workers):
    """No fold profits from what the others have taught it, whoever runs the trials; the same numbers either way."""
    records = []
    for name, shared in (("shared", True), ("control", False)):
        path = write(tmp_path / name, shared=shared)
        done = lrtune("tune", path, "--workers.count", workers)
        assert done.returncode == 0, done.stderr
        assert "Nothing is recommended" in done.stdout
        record = load_record(read_study(path))
        assert learned_nothing(record) is not None
        assert min(trial.value for trial in record.ranked()) > 0.68
        records.append(record)
    if workers == 2:
        path = write(tmp_path / "alone", shared=True)
        assert lrtune("tune", path, "--workers.count", 1).returncode == 0
        alone = load_record(read_study(path))
        assert [t.curves for t in alone.trials] == [t.curves for t in records[0].trials]
