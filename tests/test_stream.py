"""Training on `tf.data` pipelines: as `model.fit` does, repeatable, and refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from pipeline.errors import ObjectiveError
from pipeline.objective import load_objective
from pipeline.training.engine import Engine
from pipeline.training.optimizers import build_optimizer
from pipeline.training.stream import Stream, StreamSplit, make_stream, repeatable_shuffles
from tests.test_engine import BatchLosses

RNG = np.random.default_rng(5)
X = RNG.standard_normal((110, 6)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)
WEIGHT = RNG.uniform(0.5, 2.0, 110).astype("float32")


def classifier() -> keras.Model:
    """A plain classifier."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def streamed(*datasets: tf.data.Dataset, shuffles: tuple = (), steps_per_epoch: int | None = None) -> Stream:
    """Make a stream of datasets."""
    return make_stream("test", datasets, list(shuffles), steps_per_epoch=steps_per_epoch)


def split_of(stream: Stream, seed: int = 7) -> StreamSplit:
    """Return a run's place on a stream."""
    return StreamSplit(seed, stream.steps, stream.sizes)


def test_validation_samples_are_counted():
    """By their batches; where their number is unknown, one by one, and what goes wrong then is told."""
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    assert streamed(data.batch(32), data.take(64).batch(32)).sizes == (128, 64)
    unknown = data.take(37).filter(lambda x, y: True).batch(16)
    assert streamed(data.batch(32), unknown).sizes == (128, 37)
    broken = unknown.map(lambda x, y: (tf.debugging.check_numerics(x / tf.cast(tf.shape(x)[0] - 5, x.dtype), "odd"), y))
    with pytest.raises(ObjectiveError, match=r"the validation dataset cannot be read: .*odd"):
        streamed(data.batch(32), broken)


def test_a_pipeline_trains_as_under_model_fit():
    """Partial last batch, sample weights, validation: losses step by step, metrics and weights."""
    train = tf.data.Dataset.from_tensor_slices((X[:80], Y[:80], WEIGHT[:80])).batch(32)
    held = tf.data.Dataset.from_tensor_slices((X[80:], Y[80:], WEIGHT[80:])).batch(8)
    stream = streamed(train, held)
    split = split_of(stream)
    engine = Engine(classifier, stream, batch_size=1)
    run = engine.start("adam", split)
    ours = [run.epoch(np.full(stream.steps, 0.01)) for _ in range(2)]
    keras.utils.set_random_seed(split.seed)
    model = classifier()
    model.optimizer = build_optimizer("adam", 0.01)
    for result in ours:
        record = BatchLosses([32, 32, 16])
        history = model.fit(train, epochs=1, verbose=0, validation_data=held, callbacks=[record]).history
        np.testing.assert_allclose(result.losses, record.losses(), rtol=1e-4)
        for name, values in history.items():
            assert result.metrics[name] == pytest.approx(values[0], rel=1e-4), name
    for mine, theirs in zip(engine.model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def shuffled(extra: str = "none") -> Stream:
    """Return a stream whose shuffles start over, with options that people use around them."""
    with repeatable_shuffles() as shuffles:
        data = tf.data.Dataset.from_tensor_slices((X[:80], Y[:80]))
        if extra == "cache":
            data = data.cache()
        data = data.shuffle(50, seed=3)
        if extra == "map":
            data = data.map(lambda x, y: (x * 2.0, y), num_parallel_calls=tf.data.AUTOTUNE)
        if extra == "repeat":
            data = data.repeat().take(80)
        train = data.batch(16)
        held = tf.data.Dataset.from_tensor_slices((X[80:], Y[80:])).shuffle(10).batch(16)
    return streamed(train, held, shuffles=tuple(shuffles))


@pytest.mark.parametrize("extra", ["none", "cache", "map", "repeat"])
def test_shuffles_start_over_with_every_run(extra):
    """The same seed gives the same batches whatever ran before, and in another process; others differ."""
    results = []
    for stream in (shuffled(extra), shuffled(extra)):
        engine = Engine(classifier, stream, batch_size=1)

        def losses(seed: int, engine: Engine = engine, stream: Stream = stream) -> list[list[float]]:
            run = engine.start("sgd", split_of(stream, seed))
            return [run.epoch(np.full(5, 0.0)).losses.tolist() for _ in range(3)]

        first = losses(1)
        engine.start("sgd", split_of(stream, 2)).steps(np.full(13, 0.1))
        assert losses(1) == first
        assert losses(2) != first
        # At rate zero only the order differs between epochs.
        assert first[0] != first[1] != first[2]
        assert np.mean(first[0]) == pytest.approx(np.mean(first[1]), rel=1e-5)
        results.append(first)
    assert results[0] == results[1]


def test_a_cached_pipeline_reads_its_source_once():
    """Runs start over at the shuffle, not at the cache before it."""
    reads = []
    with repeatable_shuffles() as shuffles:
        data = tf.data.Dataset.from_tensor_slices((X[:80], Y[:80]))
        noted = data.map(lambda x, y: (tf.py_function(lambda v: reads.append(1) or v, [x], tf.float32), y))
        train = noted.map(lambda x, y: (tf.ensure_shape(x, (6,)), y)).cache().shuffle(80).batch(16)
    stream = streamed(train, tf.data.Dataset.from_tensor_slices((X[80:], Y[80:])).batch(16), shuffles=tuple(shuffles))
    engine = Engine(classifier, stream, batch_size=1)
    engine.start("sgd", split_of(stream)).epoch(np.full(5, 0.1))
    before = len(reads)
    for optimizer in ("sgd", "adam"):
        run = engine.start(optimizer, split_of(stream))
        for _ in range(2):
            run.epoch(np.full(5, 0.1))
    assert len(reads) == before


def test_a_shuffle_that_always_gives_one_order_is_left_alone():
    """`reshuffle_each_iteration=False` keeps its meaning; so does everything after loading."""
    with repeatable_shuffles() as shuffles:
        fixed = tf.data.Dataset.range(20).shuffle(20, seed=1, reshuffle_each_iteration=False)
    assert shuffles == []
    assert list(fixed.as_numpy_iterator()) == list(fixed.as_numpy_iterator())
    fresh = tf.data.Dataset.range(20).shuffle(20)
    assert list(fresh.as_numpy_iterator()) != list(fresh.as_numpy_iterator())


def test_an_endless_dataset_goes_on_where_the_last_epoch_ended():
    """Epochs of `steps_per_epoch` steps, on one pass."""
    data = tf.data.Dataset.from_tensor_slices((X[:80], Y[:80])).batch(16)
    held = tf.data.Dataset.from_tensor_slices((X[80:], Y[80:])).batch(16)
    whole = streamed(data, held)
    expected = Engine(classifier, whole, batch_size=1).start("sgd", split_of(whole)).epoch(np.zeros(5)).losses
    stream = streamed(data.repeat(), held, steps_per_epoch=2)
    run = Engine(classifier, stream, batch_size=1).start("sgd", split_of(stream))
    losses = np.concatenate([run.epoch(np.zeros(2)).losses for _ in range(3)])
    np.testing.assert_allclose(losses, [*expected, expected[0]], rtol=1e-6)


OBJECTIVE = """
import keras
import numpy as np
import tensorflow as tf

rng = np.random.default_rng(0)
X = rng.standard_normal((120, 4)).astype("float32")
Y = (X[:, 0] + 0.5 * X[:, 1] > 0).astype("int64")


def batches(first, last):
    return tf.data.Dataset.from_tensor_slices((X[first:last], Y[first:last])).shuffle(100).batch(16)


def load_data():
    return batches(0, 80), batches(80, 100), batches(100, 120)


def build_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
"""

STUDY = """
objective = "streamed.py"
epochs    = 3
trials    = 6

[range_test]
steps = 20

[search]
optimizers = ["sgd", "adam"]
decays     = ["constant", "cosine"]

[confirm]
finalists = 1
repeats   = 2
"""


@pytest.mark.slow
def test_a_study_on_datasets_runs_and_repeats(tmp_path, lrtune_here):
    """From range test to fit; a study begun anew, and one cut in two, give the same trials."""
    (tmp_path / "streamed.py").write_text(OBJECTIVE)
    study = tmp_path / "pipeline_study.toml"
    study.write_text(STUDY)
    assert lrtune_here("check", study).returncode == 0
    ended = lrtune_here("tune", study)
    assert ended.returncode == 0, ended.stderr
    assert "5 batches of up to 16 samples per epoch from tf.data" in ended.stderr
    trials = (tmp_path / "pipeline_study" / "curves.csv").read_text()
    best = json.loads((tmp_path / "pipeline_study" / "best.json").read_text())
    assert best["batch_size"] == 16
    ended = lrtune_here("fit", study)
    assert ended.returncode == 0, ended.stderr
    assert "test accuracy" in ended.stdout
    assert (tmp_path / "pipeline_study" / "model.keras").is_file()

    assert lrtune_here("tune", study, "--trials", "3", "--fresh").returncode == 0
    assert lrtune_here("tune", study).returncode == 0
    assert (tmp_path / "pipeline_study" / "curves.csv").read_text() == trials


BAD = [
    ("return batches(0, 80).repeat(), batches(80, 100)", "the training dataset is endless", "Set steps_per_epoch"),
    ("return batches(0, 80).filter(lambda x, y: y[0] > 0), batches(80, 100)", "of unknown size", "assert_cardinality"),
    ("return batches(0, 80), batches(80, 100).repeat()", "the validation dataset must have an end", ".take(n)"),
    ("return batches(0, 80)", "got one dataset", "(train, validation)"),
    ("return batches(0, 80), (X, Y)", "got ", "(train, validation)"),
    ("return [tf.data.Dataset.from_tensor_slices((X, Y))] * 2", "must hold batches", ".batch(32)"),
    ("return batches(0, 80).take(0), batches(80, 100)", "at least one batch, got none", "training"),
    ("return batches(0, 80), batches(80, 100).map(lambda x, y: x)", "must have the same form", "float32"),
    ("return batches(0, 80).map(lambda x, y: (x, y + 5)), batches(80, 100)", "labels from 0 to 1", "got 5 to 6"),
]  # fmt: skip


@pytest.mark.parametrize(("returned", "rule", "remedy"), BAD)
def test_what_is_wrong_with_datasets_is_one_clear_line(tmp_path, returned, rule, remedy):
    """The rule, what came, and the way out."""
    text = OBJECTIVE.replace("return batches(0, 80), batches(80, 100), batches(100, 120)", returned)
    (tmp_path / "objective.py").write_text(text)
    with pytest.raises(ObjectiveError) as error:
        load_objective("objective.py", tmp_path)
    assert rule in str(error.value)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('[validation]\nscheme = "k-fold"', "the scheme must be 'hold-out', got 'k-fold'"),
        ("batch_size = 64", "makes batches of 16 samples, got 64"),
    ],
)
def test_a_study_file_that_datasets_contradict_is_refused(tmp_path, lrtune_here, added, message):
    """What the datasets decide cannot be asked for otherwise."""
    (tmp_path / "streamed.py").write_text(OBJECTIVE)
    study = tmp_path / "s.toml"
    study.write_text(added + "\n" + STUDY if "=" in added.split("\n")[0] else STUDY + added)
    ended = lrtune_here("tune", study)
    assert ended.returncode == 1
    assert message in ended.stderr


def test_steps_per_epoch_is_for_datasets(tiny: Path, lrtune_here):
    """Arrays have an end of their own."""
    ended = lrtune_here("check", tiny, "--steps-per-epoch", "5")
    assert ended.returncode == 1
    assert "steps_per_epoch is for tf.data datasets" in ended.stderr
