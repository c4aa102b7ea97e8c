"""Fixtures: small data and models, study files in a temporary folder, and the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.training.data import Data, make_data

ROOT = Path(__file__).resolve().parent.parent

TINY_OBJECTIVE = """
import keras
import numpy as np


def load_data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 4)).astype("float32")
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).astype("int64")
    return (x[:100], y[:100]), (x[100:], y[100:])


def build_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
"""

PAUSING_OBJECTIVE = (
    TINY_OBJECTIVE
    + """

import time
from pathlib import Path

import tensorflow as tf


def pause(x):
    # Every step takes the seconds that the file "pause" beside this one holds; "once" after them: only the next.
    said = Path(__file__).with_name("pause")
    if said.exists():
        seconds, *once = said.read_text().split()
        if once:
            said.unlink()
        said.with_name("paused").touch()
        time.sleep(float(seconds))
    return x


class Pause(keras.layers.Layer):
    def call(self, x):
        return tf.ensure_shape(tf.numpy_function(pause, [x], x.dtype), x.shape)


def build_model():
    model = keras.Sequential([keras.Input((4,)), Pause(), keras.layers.Dropout(0.1), keras.layers.Dense(2)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
"""
)


def pause(folder: Path, said: str) -> None:
    """Tell the objective in a folder how long its steps take, in one step."""
    aside = folder / "pause.aside"
    aside.write_text(said)
    aside.replace(folder / "pause")


TINY_STUDY = """
objective  = "tiny.py"
epochs     = 3
batch_size = 16
trials     = 8

[range_test]
steps = 20

[search]
optimizers = ["sgd", "adam"]
decays     = ["constant", "cosine"]

[validation]
folds = 3

[confirm]
finalists = 1
repeats   = 2
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A study of a tiny classifier in a folder of its own; returns the study file."""
    (tmp_path / "tiny.py").write_text(TINY_OBJECTIVE)
    study = tmp_path / "tiny_study.toml"
    study.write_text(TINY_STUDY)
    return study


@pytest.fixture
def lrtune() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own, as a person runs it."""

    def run(*arguments: object, cwd: Path | None = None, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@dataclass
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def lrtune_here(monkeypatch, capfd) -> Callable[..., Ended]:
    """The command line in this process, which spares the import of TensorFlow each time."""

    def run(*arguments: object) -> Ended:
        from pipeline.cli import main

        monkeypatch.setattr(sys, "argv", ["lrtune", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capfd.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def classification() -> Data:
    """150 samples of 6 features in 3 classes; 150 is no multiple of the batch size that tests use."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((150, 6)).astype("float32")
    return make_data("test", x, np.argmax(x[:, :3], axis=1))
