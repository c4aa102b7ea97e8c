"""The examples on the real public data, where the environment variable LRTUNE_DATA names a folder that has them.

The folder holds mnist.npz, fashion-mnist/*.gz as Keras's loader wants them, and clothing/ with the photos.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("LRTUNE_DATA" not in os.environ, reason="LRTUNE_DATA names no folder of public data"),
]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Copies a study with its objective, and points Keras's loaders to the data."""
    import keras.src.datasets.mnist as mnist
    import keras.src.utils.file_utils as files

    data = Path(os.environ.get("LRTUNE_DATA", ""))
    monkeypatch.setattr(mnist, "get_file", lambda *_, **__: str(data / "mnist.npz"))
    monkeypatch.setattr(files.config, "keras_home", lambda: str(tmp_path / "keras"))
    monkeypatch.setenv("CLOTHING_PHOTOS", str(data / "clothing"))
    (tmp_path / "keras" / "datasets").mkdir(parents=True)
    if (data / "fashion-mnist").is_dir():
        shutil.copytree(data / "fashion-mnist", tmp_path / "keras" / "datasets" / "fashion-mnist")
    shutil.copytree(ROOT / "objectives", tmp_path / "objectives")
    return lambda name: Path(shutil.copy(ROOT / "studies" / f"{name}.toml", tmp_path))


def test_adam_gets_further_than_sgd_in_the_mnist_range_test(study, lrtune_here):
    """And its useful rates lie several times lower."""
    path = study("mnist_convnet")
    ended = lrtune_here("range-test", path)
    assert ended.returncode == 0, ended.stderr
    steps = pd.read_csv(path.parent / "mnist_convnet" / "range_test.csv").groupby("optimizer")["smoothed"].min()
    assert steps["adam"] < 0.5 < steps["sgd"]
    bounds = pd.read_csv(path.parent / "mnist_convnet" / "bounds.csv").set_index("optimizer")
    assert 3 < bounds.loc["sgd", "suggested"] / bounds.loc["adam", "suggested"] < 30
    assert set(bounds["status"]) == {"ok"}


def test_the_fashion_mnist_sweep_prefers_the_middle_rate_and_not_the_smallest_gap(study, lrtune_here):
    """0.01 is best, 0.1 overshoots, and the smallest gap is that of 0.001."""
    ended = lrtune_here("tune", study("fashion_mnist_sweep"), "--confirm.finalists", "0")
    assert ended.returncode == 0, ended.stderr
    assert "The best rate is 0.01 " in ended.stdout
    assert "is that of 0.001" in ended.stdout


def test_the_clothing_photos_train_on_the_outputs_of_a_body_that_ran_once(study, lrtune_here):
    """On random weights, so that nothing is downloaded; no rate is called best, for nothing is learned on them."""
    options = ("--objective.kwargs.weights", "random", "--limit", "200", "--confirm.finalists", "0")
    ended = lrtune_here("tune", study("clothing_xception"), *options)
    assert ended.returncode == 0, ended.stderr
    assert "its fixed part (xception) ran once" in ended.stderr
    assert "have the same val_accuracy, 0.2375, which does not tell them apart" in ended.stdout
    assert "No trial learned to use the inputs" in ended.stdout
