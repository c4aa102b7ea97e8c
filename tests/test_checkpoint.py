"""A trial that is cut off goes on from its checkpoint and ends with the numbers of one that was not."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from optuna.trial import TrialState

from pipeline.search.checkpoint import Checkpoint, Checkpoints
from pipeline.search.space import Configuration
from pipeline.search.trial import Monitor, run_trial
from pipeline.training.data import Data
from pipeline.training.decays import DECAYS
from pipeline.training.engine import Engine
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.splits import Split
from pipeline.training.stream import StreamSplit, make_stream, repeatable_shuffles
from tests.conftest import PAUSING_OBJECTIVE, pause
from tests.test_study import spawn, stored

EPOCHS = 4
MONITOR = Monitor("val_loss", "min")


class Cut(Exception):
    """Cuts a trial off."""


def noisy_model() -> keras.Model:
    """A classifier with everything that has a state: moving averages, random states, shuffles."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.GaussianNoise(0.1, seed=3),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def folds(data: Data) -> list[Split]:
    """Two folds."""
    samples = np.arange(data.samples, dtype=np.int32)
    return [Split(samples[50:], samples[:50], 11), Split(samples[:100], samples[100:], 12)]


def place(folder: Path, **settings: float) -> Checkpoints:
    """Checkpoints after every epoch."""
    return Checkpoints(folder, **({"minutes": 0.0, "disk": 1e9} | settings))


def run(engine, configuration, splits, checkpoint=None, cut_at=None):
    """Run a trial; with `cut_at` = (fold, epoch), counted from 0, cut it off when that epoch has been trained."""

    def on_epoch(fold: int, epoch: int, value: float) -> None:
        if (fold, epoch) == cut_at:
            raise Cut

    return run_trial(
        engine, configuration, splits, epochs=EPOCHS, monitor=MONITOR, on_epoch=on_epoch, checkpoint=checkpoint
    )


def check_resumed(make_engine, configuration, splits, folder: Path, cuts) -> None:
    """Cut a trial off, several times, each time in a new engine; the outcome is the uninterrupted one's."""
    whole = run(make_engine(), configuration, splits)
    checkpoints = place(folder)
    for cut in cuts:
        with pytest.raises(Cut):
            run(make_engine(), configuration, splits, Checkpoint(checkpoints, 0, "facts"), cut)
        assert checkpoints.path(0).exists() == (cut != (0, 0))
    again = Checkpoint(checkpoints, 0, "facts")
    resumed = run(make_engine(), configuration, splits, again)
    assert resumed == whole
    checkpoints.remove(0)
    assert not folder.exists()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_to_the_last_digit(optimizer, classification, tmp_path):
    """Cut off inside both folds and between them."""
    decay = dict(zip(OPTIMIZERS, itertools.cycle(DECAYS), strict=False))[optimizer]
    configuration = Configuration(optimizer, 0.01, decay, 0.1)
    splits = folds(classification)
    cuts = [(0, 1), (1, 0), (1, 3)]
    engines = itertools.cycle([Engine(noisy_model, classification, batch_size=16) for _ in range(2)])
    check_resumed(lambda: next(engines), configuration, splits, tmp_path / "c", cuts)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["plateau", "cosine"])
def test_under_xla_and_with_a_scheme_that_reacts(decay, classification, tmp_path):
    """What a plateau has waited for is part of the state; XLA changes nothing."""

    def engine() -> Engine:
        made = Engine(noisy_model, classification, batch_size=16)
        made.xla = True
        return made

    check_resumed(engine, Configuration("adam", 0.3, decay, 0.01), folds(classification), tmp_path / "c", [(0, 2)])


def test_types_that_numpy_has_not(classification, tmp_path):
    """bfloat16 weights come back bit by bit."""

    def model() -> keras.Model:
        layer = layers.Dense(8, activation="relu", dtype="bfloat16")
        model = keras.Sequential([keras.Input((6,)), layer, layers.Dense(3)])
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    def engine() -> Engine:
        return Engine(model, classification, batch_size=16)

    check_resumed(
        engine, Configuration("momentum", 0.1, "linear", 0.1), folds(classification), tmp_path / "c", [(0, 2)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("endless", [False, True])
def test_a_pipeline_goes_on_with_the_shuffle_that_is_next(endless, tmp_path):
    """The same batches follow, whether epochs are passes over the data or steps on an endless one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 6)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)

    def parts():
        with repeatable_shuffles() as states:
            train = tf.data.Dataset.from_tensor_slices((x[:90], y[:90])).shuffle(90).batch(10)
            held = tf.data.Dataset.from_tensor_slices((x[90:], y[90:])).batch(30)
            train = train.repeat() if endless else train
            return make_stream("test", (train, held), states, steps_per_epoch=7 if endless else None)

    def engine() -> Engine:
        return Engine(noisy_model, parts(), batch_size=1)

    stream = parts()
    split = StreamSplit(7, stream.steps, stream.sizes)
    check_resumed(engine, Configuration("adam", 0.01, "step", 0.1), [split], tmp_path / "c", [(0, 0), (0, 2)])


def test_a_checkpoint_of_something_else_or_a_damaged_one_is_not_used(classification, tmp_path):
    """Other facts, a cut file, a file of pickled objects: the trial begins anew."""
    engine, splits = Engine(noisy_model, classification, batch_size=16), folds(classification)
    configuration, checkpoints = Configuration("adam", 0.01, "constant"), place(tmp_path)
    with pytest.raises(Cut):
        run(engine, configuration, splits, Checkpoint(checkpoints, 0, "facts"), (1, 1))
    assert Checkpoint(checkpoints, 0, "facts").load().fold == 1
    assert Checkpoint(checkpoints, 0, "other").load().fold == 0
    whole = checkpoints.path(0).read_bytes()
    for content in (whole[:-200], whole[: len(whole) // 2], b"", b"PK\x03\x04 nonsense"):
        checkpoints.path(0).write_bytes(content)
        assert Checkpoint(checkpoints, 0, "facts").load().fold == 0
    with open(checkpoints.path(0), "wb") as file:
        np.savez(file, position=np.array([{"fold": 1}], dtype=object))
    assert Checkpoint(checkpoints, 0, "facts").load().fold == 0


def test_the_disk_bound_holds_and_whole_folds_are_kept_all_the_same(classification, tmp_path):
    """Said once; two trials share the bound."""
    engine, splits, said = Engine(noisy_model, classification, batch_size=16), folds(classification), []
    configuration = Configuration("adam", 0.01, "constant")
    roomy = place(tmp_path, disk=8000)
    roomy.on_full = said.append
    with pytest.raises(Cut):
        run(engine, configuration, splits, Checkpoint(roomy, 0, "facts"), (0, 2))
    assert Checkpoint(roomy, 0, "facts").load().epoch == 2
    assert said == []
    with pytest.raises(Cut):
        run(engine, configuration, splits, Checkpoint(roomy, 1, "facts"), (1, 2))
    assert (Checkpoint(roomy, 1, "facts").load().fold, Checkpoint(roomy, 1, "facts").load().epoch) == (1, 0)
    assert len(said) == 1 and "checkpoint.disk" in said[0]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12_000
    roomy.tidy([1])
    assert [path.name for path in tmp_path.iterdir()] == ["trial-1.npz"]


def test_another_machine_goes_on_from_the_folds_in_the_storage(classification, tmp_path, monkeypatch):
    """Without the file, the curves of whole folds are enough."""
    monkeypatch.setattr("pipeline.search.checkpoint.STORAGE_SECONDS", 0.0)
    engine, splits, kept = Engine(noisy_model, classification, batch_size=16), folds(classification), []
    configuration = Configuration("adam", 0.01, "constant")
    whole = run(engine, configuration, splits)

    def share(value):
        kept.append(json.loads(json.dumps(value)))

    one = Checkpoint(place(tmp_path / "one"), 0, "facts", share=share)
    with pytest.raises(Cut):
        run(engine, configuration, splits, one, (1, 2))
    there = Checkpoint(place(tmp_path / "two"), 0, "facts", shared=kept[-1], share=share)
    epochs = []
    resumed = run_trial(
        engine,
        configuration,
        splits,
        epochs=EPOCHS,
        monitor=MONITOR,
        on_epoch=lambda fold, epoch, value: epochs.append((fold, epoch)),
        checkpoint=there,
    )
    assert epochs == [(1, epoch) for epoch in range(EPOCHS)]
    assert resumed == whole
    assert there.is_shared  # so the trial's end takes it away


@pytest.mark.slow
def test_a_killed_study_goes_on_inside_its_trial(tiny, tmp_path):
    """kill -9 in the midst of a long trial: what was trained is not trained again, and no number differs."""
    (tiny.parent / "tiny.py").write_text(PAUSING_OBJECTIVE)
    pause(tiny.parent, "0.003")
    options = ("--trials", "2", "--epochs", "60", "--confirm.finalists", "0", "--validation.folds", "2")
    options += ("--engine.xla", "false", "--workers.count", "1", "--checkpoint.minutes", "0")
    checkpoint = tmp_path / "out" / "checkpoints" / "trial-0.npz"
    child = spawn(tiny, *options, "--output", str(tmp_path / "out"))
    until = time.monotonic() + 300
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert checkpoint.exists(), child.communicate()[1].decode()
    time.sleep(0.5)
    child.kill()
    child.communicate()
    assert checkpoint.exists()
    assert stored(tiny).trials[0].state == TrialState.RUNNING
    results = []
    for extra in (("--output", str(tmp_path / "out")), ("--fresh", "--output", str(tmp_path / "other"))):
        child = spawn(tiny, *options, *extra)
        _, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors.decode()
        results.append([(t.user_attrs["curves"], t.value, t.params) for t in stored(tiny).trials])
    assert results[0] == results[1]
    assert not checkpoint.parent.exists()
