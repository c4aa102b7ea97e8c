"""Where no trial learned anything the answer says so first and recommends nothing, whatever form the data have."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from pipeline.errors import KnownError
from pipeline.report.dashboard import note
from pipeline.report.doubts import doubts_of, learned_nothing
from pipeline.report.records import load_record, recommend
from pipeline.study_file import read_study
from pipeline.training.constant import constant_loss
from pipeline.training.no_skill import no_skill

RNG = np.random.default_rng(0)

PROGRAM = """
import keras, numpy as np, tensorflow as tf
from keras import ops
random = np.random.default_rng(1)
x = random.normal(size=(300, 4)).astype("float32")
noise, used = random.integers(0, 2, 300), (x[:, 0] > 0).astype("int64")
y = {y}
weights = np.where(y > 0, 3.0, 1.0).astype("float32")
def parts(*arrays):
    return tuple(tuple(a[i] for a in arrays) for i in (slice(0, 150), slice(150, 250), slice(250, 300)))
def load_data():
    return {data}
def build_model():
    inputs = keras.Input((4,))
    dense = keras.layers.Dense
    model = keras.Model(inputs, {outputs})
    model.compile(loss={loss})
    return model
"""

SIGMOID, CROSS = 'dense(1, "sigmoid")(inputs)', '"binary_crossentropy"'
STREAMS = "tuple(tf.data.Dataset.from_tensor_slices(p).batch(25) for p in parts(x, y))"
FORMS = {
    "arrays": ("x, y", SIGMOID, CROSS),
    "tf.data": (STREAMS, SIGMOID, CROSS),
    "training weighted": ("parts(x, y, weights)[0], *parts(x, y)[1:]", SIGMOID, CROSS),
    "both weighted": ("parts(x, y, weights)", SIGMOID, CROSS),
    "smoothed": ("x, y", SIGMOID, "keras.losses.BinaryCrossentropy(label_smoothing=0.2)"),
    "a loss of one's own": ("x, y", SIGMOID, "lambda a, b: ops.mean(ops.square(ops.cast(a, 'float32') - b), axis=-1)"),
    "two outputs": (
        "x, {'a': y, 'b': y}",
        '{"a": dense(1, "sigmoid", name="a")(inputs), "b": dense(1, name="b")(inputs)}',
        '{"a": "binary_crossentropy", "b": "mse"}',
    ),
}


def study(folder, y: str, form: str):
    """Write a program and a study of it."""
    data, outputs, loss = FORMS[form]
    (folder / "train.py").write_text(PROGRAM.format(y=y, data=data, outputs=outputs, loss=loss))
    keys = 'objective = "train.py"\ntrials = 3\nepochs = 12\nbatch_size = 25\n'
    keys += "" if form in ("tf.data", "training weighted", "both weighted") else '[validation]\nscheme = "hold-out"\n'
    keys += '[search]\noptimizers = ["adam"]\nlearning_rate = { low = 0.01, high = 0.05 }\n[confirm]\nfinalists = 0\n'
    (folder / "train.toml").write_text(keys)
    return folder / "train.toml"


@pytest.mark.parametrize("form", FORMS)
def test_noise_gets_no_recommendation_and_signal_does(tmp_path, lrtune_here, form):
    """Terminal, report, JSON, dashboard and `fit` alike."""
    for y in ("noise", "used"):
        (tmp_path / y).mkdir()
        path = study(tmp_path / y, y, form)
        ended = lrtune_here("tune", path)
        assert ended.returncode == 0, ended.stderr
        record, folder = load_record(read_study(path)), tmp_path / y / "train"
        best, report = json.loads((folder / "best.json").read_text()), (folder / "report.html").read_text()
        if y == "used":
            assert learned_nothing(record) is None
            assert best["recommended"] and best["optimizer"] == "adam"
            assert "Nothing is recommended" not in ended.stdout
            continue
        assert ended.stdout.strip().startswith("No trial learned to use the inputs")
        assert "Nothing is recommended" in ended.stdout and "Train with" not in ended.stdout
        assert "Nothing is recommended" in report and "Train with" not in report
        assert not best["recommended"]
        assert best["optimizer"] is best["learning_rate"] is best["epochs"] is best["trial"] is None
        assert not (folder / "best.py").exists()
        assert note(record).startswith("**No trial learned")
        fitted = lrtune_here("fit", path)
        assert fitted.returncode == 1
        assert "nothing is recommended. No trial learned" in fitted.stderr
        first = doubts_of(record, recommend(record))[0]
        weighted = form == "training weighted"
        assert first.startswith("The training samples have weights" if weighted else "No trial learned")


def test_the_api_recommends_nothing_either(tmp_path):
    """Its answer is an error with the reason; the JSON has no values."""
    from pipeline import tune

    x, y = RNG.normal(size=(200, 3)), RNG.integers(0, 2, 200)

    def build_model() -> keras.Model:
        model = keras.Sequential([keras.Input((3,)), layers.Dense(1, "sigmoid")])
        model.compile(loss="binary_crossentropy")
        return model

    tuned = tune(
        build_model, (x, y), folder=tmp_path, progress=False, trials=2, epochs=4,
        search={"optimizers": ["adam"], "learning_rate": {"low": 0.01, "high": 0.02}},
        validation={"scheme": "hold-out"}, confirm={"finalists": 0},
    )  # fmt: skip
    with pytest.raises(KnownError, match=r"nothing is recommended\. No trial learned"):
        _ = tuned.answer
    assert tuned.best["optimizer"] is None
    assert repr(tuned).startswith("No trial learned")


@pytest.mark.parametrize(
    ("loss", "units", "end", "y"),
    [
        ("mse", 2, None, RNG.normal(4, 2, (60, 2))),
        ("mae", 1, "linear", RNG.normal(4, 2, (60, 1))),
        ("binary_crossentropy", 1, "sigmoid", RNG.integers(0, 2, (60, 1))),
        ("categorical_crossentropy", 3, "softmax", np.eye(3)[RNG.choice(3, 60, p=[0.6, 0.3, 0.1])]),
        ("sparse_categorical_crossentropy", 3, "softmax", RNG.choice(3, 60, p=[0.6, 0.3, 0.1])),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_minimum_over_constants_is_the_formula_where_there_is_one(loss, units, end, y, weighted):
    """Two ways to the same bar."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(units, end or "linear")])
    model.compile(loss=loss)
    weights = RNG.uniform(0.2, 3, 60).astype("float32") if weighted else None
    expected = no_skill(np.asarray(y), loss.replace("_", ""), weights)["loss"]
    targets = tf.constant(y.astype("float32" if y.dtype.kind == "f" else "int64"))
    weight = None if weights is None else tf.constant(weights)
    found = constant_loss(tf, model, model(tf.zeros([2, 2])), [end], targets, weight, 60)
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_loss_over_a_whole_batch_has_no_bar():
    """Its value on all samples together is not that of batches."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(4, "sigmoid")])
    model.compile(loss=keras.losses.Dice())
    masks = tf.constant(np.where(np.arange(64)[:, None] % 16, 0, RNG.integers(0, 2, (64, 4))).astype("float32"))
    assert np.isnan(constant_loss(tf, model, model(tf.zeros([2, 2])), ["sigmoid"], masks, None, 8))


def test_missing_targets_have_a_bar_by_their_own_loss():
    """The mean of the targets that are there."""

    def masked(y, prediction):
        there = ops.logical_not(ops.isnan(y))
        error = ops.where(there, y, prediction) - prediction
        return ops.sum(ops.square(error), axis=-1) / ops.maximum(ops.sum(ops.cast(there, "float32"), axis=-1), 1)

    y = RNG.normal(2, 1, (50, 1)).astype("float32")
    y[::5] = np.nan
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(loss=masked)
    found = constant_loss(tf, model, model(tf.zeros([2, 2])), ["linear"], tf.constant(y), None, 50)
    assert found == pytest.approx(0.8 * np.nanvar(y), rel=1e-3)
