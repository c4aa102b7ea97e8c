"""The studies that ship, on small data made here in the form of the public files."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from pipeline.objective import load_objective
from tests.conftest import ROOT


@pytest.fixture
def example(tmp_path):
    """Copies an example's study and objective into a folder of their own; returns the study file."""

    def copy(study: str, objective: str) -> Path:
        (tmp_path / "objectives").mkdir()
        shutil.copy(ROOT / "objectives" / f"{objective}.py", tmp_path / "objectives")
        return Path(shutil.copy(ROOT / "studies" / f"{study}.toml", tmp_path))

    return copy


def made_digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 28×28 in which the label is a bright row."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count).astype("uint8")
    images = random.integers(0, 80, (count, 28, 28)).astype("uint8")
    images[np.arange(count), 2 * labels + 3] = 250
    return images, labels


def test_the_mnist_range_test_and_study(example, lrtune_here, tmp_path, monkeypatch):
    """Both optimizers in one figure with bounds; the study goes on with decays."""
    (x_train, y_train), (x_test, y_test) = made_digits(600, 0), made_digits(50, 1)
    np.savez(tmp_path / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    import keras.src.datasets.mnist as loader

    monkeypatch.setattr(loader, "get_file", lambda *_, **__: str(tmp_path / "mnist.npz"))
    study = example("mnist_convnet", "mnist_convnet")
    small = ("--batch_size", "50", "--range_test.epochs", "4", "--range_test.window", "5")
    ended = lrtune_here("range-test", study, *small)
    assert ended.returncode == 0, ended.stderr
    assert "Lowest smoothed loss of the ramps: " in ended.stderr
    bounds = pd.read_csv(study.parent / "mnist_convnet" / "bounds.csv")
    assert list(bounds["optimizer"]) == ["sgd", "adam"]
    page = (study.parent / "mnist_convnet" / "range_test.html").read_text()
    assert "just left of the minimum" in page
    ended = lrtune_here("tune", study, *small, "--trials", "4", "--epochs", "2", "--confirm.finalists", "1")
    assert ended.returncode == 0, ended.stderr


def test_the_fashion_mnist_sweep_and_its_logs(example, lrtune_here, tmp_path, monkeypatch):
    """Keras's own loader on files in its place; three rates side by side, and curves that TensorBoard reads back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "keras" / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name, seed, count in (("train", 0, 400), ("t10k", 1, 50)):
        images, labels = made_digits(count, seed)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">II", 2049, count) + labels.tobytes())
        )
    monkeypatch.setattr(keras.config, "keras_home", lambda: str(tmp_path / "keras"), raising=False)
    import keras.src.utils.file_utils as files

    monkeypatch.setattr(files.config, "keras_home", lambda: str(tmp_path / "keras"))
    study = example("fashion_mnist_sweep", "fashion_mnist_mlp")
    ended = lrtune_here(
        "tune", study, "--epochs", "3", "--confirm.repeats", "2", "--tensorboard.logs", "true", "--monitor", "val_loss"
    )
    assert ended.returncode == 0, ended.stderr
    out = study.parent / "fashion_mnist_sweep"
    assert "Side by side: momentum, constant" in (out / "report.html").read_text()
    assert "The best rate is" in ended.stdout
    curves = pd.read_csv(out / "curves.csv")
    last = curves[curves["trial"] == curves["trial"].max()]
    logs = EventAccumulator(str(out / "tensorboard" / f"trial-{last['trial'].iloc[0]}" / "validation"))
    logs.Reload()
    assert [event.step for event in logs.Scalars("accuracy")] == [1, 2, 3]
    np.testing.assert_allclose([e.value for e in logs.Scalars("accuracy")], last["val_accuracy"], rtol=1e-5)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of made photos in two classes, named by the environment."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 18), ("validation", 2), ("test", 1)):
        for name in ("hat", "shoes"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (40, 30, 3)).astype("uint8")
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{number}.jpg")
    monkeypatch.setenv("CLOTHING_PHOTOS", str(tmp_path / "photos"))
    return tmp_path / "photos"


@pytest.mark.slow
def test_the_clothing_photos(example, photos, lrtune_here, tmp_path, monkeypatch):
    """Photos are read by class from a folder that the study file or the environment names; the body is frozen."""
    study = example("clothing_xception", "clothing_xception")
    keys = 'kwargs = { weights = "random", classes = 2'
    study.write_text(study.read_text().replace('kwargs = { weights = "imagenet"', keys))
    ended = lrtune_here("check", study)
    assert ended.returncode == 0, ended.stderr
    assert "its fixed part (xception) ran once" in ended.stderr
    assert "36 samples, 4 more for validation" in ended.stdout
    monkeypatch.setenv("CLOTHING_PHOTOS", str(tmp_path / "nowhere"))
    ended = lrtune_here("check", study)
    assert ended.returncode == 1
    assert "objective.kwargs.folder" in ended.stderr
    study.write_text(study.read_text().replace(keys, f'{keys}, folder = "photos"'))
    monkeypatch.chdir("/")  # a relative folder starts at the study file
    assert lrtune_here("check", study).returncode == 0


@pytest.mark.slow
def test_a_body_with_trained_weights_runs_once_in_a_whole_study(example, photos, lrtune_here, tmp_path, monkeypatch):
    """For all rates and all repeats of the confirmation; the page has accuracy and gap per rate."""
    import pipeline.training.engine as engine

    body = keras.applications.Xception(weights=None, include_top=False, input_shape=(150, 150, 3))
    body.save_weights(tmp_path / "trained.weights.h5")
    ran, run_body = [], engine.run_body
    monkeypatch.setattr(engine, "run_body", lambda *given: ran.append(1) or run_body(*given))
    study = example("clothing_xception", "clothing_xception")
    kwargs = ("--objective.kwargs.weights", tmp_path / "trained.weights.h5", "--objective.kwargs.classes", "2")
    small = ("--epochs", "2", "--batch_size", "8", "--confirm.repeats", "2", "--workers.count", "1")
    ended = lrtune_here("tune", study, *kwargs, *small)
    assert ended.returncode == 0, ended.stderr
    assert len(ran) == 1
    report = (tmp_path / "clothing_xception" / "report.html").read_text()
    assert "Side by side: adam, constant" in report
    assert "Last accuracy over the learning rate, the gap shaded" in report


def test_imagenet_weights_that_cannot_be_had_are_told_with_the_remedy(example, photos, lrtune_here, monkeypatch):
    """Which file, where to put it, and how to go without."""
    import urllib.error

    import keras.src.utils.file_utils as files

    def no_network(*_: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(files, "urlretrieve", no_network)
    monkeypatch.setattr(files.config, "keras_home", lambda: str(photos))
    ended = lrtune_here("check", example("clothing_xception", "clothing_xception"))
    assert ended.returncode == 1
    file = "xception_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert "build_model() could not download https://" in ended.stderr
    assert f"place it at {photos / 'models' / file}, under exactly this name" in ended.stderr
    assert 'give weights = "random"' in ended.stderr


def test_the_clinical_trial_is_as_it_says():
    """Half of the people are 65 and older; they have side effects nineteen times as often."""
    objective = load_objective("clinical_trial.py", ROOT / "objectives")
    ages, effects = objective.train.x[:, 0] * 87 + 13, objective.train.y
    assert 13 <= ages.min() < ages.max() <= 100
    old = ages > 64.5
    assert old.mean() == pytest.approx(0.5, abs=0.03)
    assert effects[old].mean() == pytest.approx(0.95, abs=0.03)
    assert effects[~old].mean() == pytest.approx(0.05, abs=0.03)


def test_the_update_rule_is_weight_minus_rate_times_gradient():
    """One step of gradient descent on the clinical trial's own network, weight by weight."""
    import tensorflow as tf

    from pipeline.training.engine import Engine
    from pipeline.training.splits import Split

    objective = load_objective("clinical_trial.py", ROOT / "objectives")
    engine = Engine(objective.build_model, objective.train, batch_size=64)
    everything = np.arange(64, dtype=np.int32)
    run = engine.start("sgd", Split(everything, everything, 0))
    before = [v.numpy() for v in engine.model.trainable_variables]
    with tf.GradientTape() as tape:
        x, y = objective.train.x[:64], objective.train.y[:64]
        outputs = engine.model(x, training=True)
        loss = engine.model.compute_loss(x, y, outputs)
    gradients = tape.gradient(loss, [v.value for v in engine.model.trainable_variables])
    run.steps([0.1])
    for weight, start, gradient in zip(engine.model.trainable_variables, before, gradients, strict=True):
        np.testing.assert_allclose(weight.numpy(), start - 0.1 * gradient.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "mnist.npz"),
        ("fashion_mnist", "fashion-mnist/train-labels-idx1-ubyte.gz"),
        ("cifar10", "cifar-10-batches-py-target_archive"),
        ("cifar100", "cifar-100-python-target_archive"),
        ("imdb", "imdb.npz"),
        ("reuters", "reuters.npz"),
        ("boston_housing", "boston_housing.npz"),
        ("california_housing", "california_housing.npz"),
    ],
)
def test_a_download_that_fails_says_what_was_tried_and_how_to_place_the_file(
    tmp_path, lrtune_here, monkeypatch, name, file
):
    """Through Keras's own `get_file`, whichever of its datasets it is."""
    import urllib.error

    import keras.src.utils.file_utils as files

    def no_network(*_: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(files, "urlretrieve", no_network)
    monkeypatch.setattr(files.config, "keras_home", lambda: str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "import keras\n\n\ndef load_data():\n    return keras.datasets.NAME.load_data()\n\n\n".replace("NAME", name)
        + "def build_model():\n    return None\n"
    )
    (tmp_path / "mine.toml").write_text('objective = "mine.py"\n')
    ended = lrtune_here("check", tmp_path / "mine.toml")
    assert ended.returncode == 1
    assert "mine.py: load_data() could not download https://" in ended.stderr
    assert f"place it at {tmp_path / 'datasets' / file}" in ended.stderr
