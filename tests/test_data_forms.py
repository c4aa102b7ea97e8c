"""Data as scripts have them: x alone, samples of different lengths, sparse rows, training steps without a loss."""

from __future__ import annotations

from types import ModuleType

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from keras import layers, ops

from pipeline.errors import KnownError, ObjectiveError
from pipeline.progress import Reporter
from pipeline.report.records import load_record
from pipeline.report.summary import summary
from pipeline.search.prepare import prepare
from pipeline.search.soundness import prove
from pipeline.search.study import StudyRunner
from pipeline.study_file import study_of
from pipeline.training.data import Ragged, make_data

RNG = np.random.default_rng(0)
X = RNG.standard_normal((120, 4)).astype("float32")
LONGER = RNG.standard_normal((40, 4)).astype("float32")
SEQUENCES = [RNG.integers(1, 20, size=RNG.integers(3, 9)) for _ in range(120)]
Y = np.array([s.mean() > 10 for s in SEQUENCES])


class Reconstructs(keras.Model):
    """An autoencoder that makes its own target, whatever form x has."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = layers.Dense(2), layers.Dense(4)
        self.tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.tracker]

    def error(self, data):
        x = data["a"] if isinstance(data, dict) else data
        return ops.mean(ops.square(x - self.decode(self.encode(x))))

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.error(data)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, data):
        self.tracker.update_state(self.error(data))
        return {"loss": self.tracker.result()}


def compiled(model: keras.Model, *arguments, **keywords) -> keras.Model:
    """Return a model, compiled."""
    model.compile(*arguments, **keywords)
    return model


def prepared_of(tmp_path, build_model, data, **keys):
    """Return a study of functions that live here."""
    module = ModuleType("notebook")
    module.build_model, module.load_data = build_model, lambda: data
    table = {
        "objective": "notebook", "epochs": 2, "trials": 3, "validation": {"scheme": "hold-out"},
        "search": {"optimizers": ("sgd", "adam")}, "confirm": {"finalists": 1, "repeats": 2}, "workers": {"count": 1},
    }  # fmt: skip
    study = study_of(tmp_path / "s.toml", {**table, **keys})
    return prepare(study, Reporter(quiet=True), module)


class Generator(keras.utils.PyDataset):
    """Batches of x alone."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int):
        return X[30 * i : 30 * (i + 1)]


ALONE = {
    "an array": (X, 96, 24),
    "a tuple of one": ((X,), 96, 24),
    "a dict": ({"a": X}, 96, 24),
    "two arrays of different lengths": ((X, LONGER), 120, 40),
    "three": ((X, LONGER[:20], LONGER), 140, 40),
    "parts of one": (((X,), (X[:120],)), 120, 120),
    "dicts of different lengths": (({"a": X}, {"a": LONGER}), 120, 40),
    "a dataset read in Python": (Generator(), 96, 24),
}


@pytest.mark.parametrize("case", ALONE)
def test_x_alone_in_every_form(tmp_path, case):
    """The step gets what model.fit would hand it: the bare array or dict."""
    data, samples, test = ALONE[case]
    keys = {"validation": {}} if case == "three" else {}
    prepared = prepared_of(tmp_path, lambda: compiled(Reconstructs()), data, **keys)
    assert (prepared.objective.train.samples, prepared.objective.test.samples) == (samples, test)
    assert prepared.objective.train.y is None
    proof = prove(prepared)
    assert proof.notes == ()
    assert prepared.objective.given == (120 if case == "three" else None)


def test_two_arrays_of_one_length_are_x_and_y(tmp_path):
    """As for model.fit, also where their samples have the same form."""
    prepared = prepared_of(tmp_path, lambda: compiled(keras.Sequential([layers.Dense(4)]), loss="mse"), (X, 2 * X))
    np.testing.assert_array_equal(prepared.objective.train.y, 2 * prepared.objective.train.x)


def test_inputs_without_targets_are_refused_where_the_loss_needs_them(tmp_path):
    """With what an autoencoder returns."""
    with pytest.raises(ObjectiveError, match=r"must return targets for the loss 'mse'.*return \(x, x\)"):
        prepared_of(tmp_path, lambda: compiled(keras.Sequential([layers.Dense(4)]), loss="mse"), X)


def test_a_model_with_a_layer_of_losses_takes_a_dict_of_inputs_alone(tmp_path):
    """Its loss is added by a layer; there is no y."""

    class Distance(layers.Layer):
        def call(self, inputs):
            self.add_loss(ops.mean(ops.square(inputs[0] - inputs[1])))
            return inputs[1]

    def build() -> keras.Model:
        inputs = {"x": keras.Input((4,), name="x"), "y": keras.Input((1,), name="y")}
        return compiled(keras.Model(inputs, Distance()([inputs["y"], layers.Dense(1)(inputs["x"])])))

    prepared = prepared_of(tmp_path, build, {"x": X, "y": X[:, :1]})
    assert prove(prepared).doubts == ()


# -- samples of different lengths, and sparse ones -----------------------------------------------


def ragged_model() -> keras.Model:
    """Embedding and a mean, of ragged input."""
    parts = [keras.Input((None,), dtype="int32", ragged=True), layers.Embedding(20, 8), layers.GlobalAveragePooling1D()]
    return compiled(keras.Sequential([*parts, layers.Dense(1, "sigmoid")]), loss="binary_crossentropy")


@pytest.mark.parametrize("scheme", ["hold-out", "k-fold"])
def test_ragged_samples_train_as_under_model_fit(tmp_path, scheme):
    """Where the model takes them, with folds too."""
    ragged = tf.ragged.constant([s.tolist() for s in SEQUENCES])
    prepared = prepared_of(tmp_path, ragged_model, (ragged, Y), validation={"scheme": scheme})
    assert "any" in prepared.objective.train.describe()
    proof = prove(prepared)
    assert proof.notes == proof.doubts == ()


def test_ragged_data_is_cut_and_joined_like_arrays():
    """Rows by index, slices, fingerprints."""
    data = make_data("test", tf.ragged.constant([s.tolist() for s in SEQUENCES]), Y)
    assert isinstance(data.x, Ragged)
    assert data.x.shape == (120, None)
    some = data.take(np.array([5, 0, 7]))
    np.testing.assert_array_equal(some.x.values, np.concatenate([SEQUENCES[i] for i in (5, 0, 7)]))
    assert some.x.lengths.tolist() == [len(SEQUENCES[i]) for i in (5, 0, 7)]
    assert len(data.x[:0]) == 0
    assert (
        data.fingerprint() != make_data("t", tf.ragged.constant([s.tolist() for s in SEQUENCES[::-1]]), Y).fingerprint()
    )


@pytest.mark.parametrize(
    "x",
    [SEQUENCES, np.array(SEQUENCES, dtype=object), [s.tolist() for s in SEQUENCES]],
    ids=["list", "objects", "lists"],
)
def test_samples_of_different_lengths_have_a_remedy(x):
    """Three examples and the function that pads, not a page of lengths."""
    with pytest.raises(
        ObjectiveError, match=r"got some of \d+, \d+ and \d+ values.*keras.utils.pad_sequences"
    ) as error:
        make_data("here", x, Y)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("kind", ["csr", "tensor"])
def test_sparse_rows_train_as_under_model_fit(tmp_path, declared, kind):
    """A SciPy matrix and a sparse tensor, for an Input that says so and one that does not."""
    matrix = scipy.sparse.random(120, 50, density=0.1, format="csr", random_state=1, dtype="float32")
    x = matrix if kind == "csr" else tf.sparse.from_dense(matrix.toarray())

    def build() -> keras.Model:
        parts = [keras.Input((50,), sparse=declared), layers.Dense(4, "relu"), layers.Dense(1, "sigmoid")]
        return compiled(keras.Sequential(parts), loss="binary_crossentropy")

    proof = prove(prepared_of(tmp_path, build, (x, Y.astype("float32"))))
    assert proof.notes == proof.doubts == ()


def test_a_sparse_matrix_beyond_memory_is_refused_with_a_remedy():
    """A million rows of a million columns."""
    with pytest.raises(ObjectiveError, match=r"must fit into .* GiB.*1000000 x 1000000.*tf.data datasets"):
        make_data("here", scipy.sparse.csr_matrix((10**6, 10**6), dtype="float32"))


# -- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "y", "said"),
    [
        ("sparse_categorical_crossentropy", np.eye(3)[np.arange(120) % 3], "got one-hot rows of 3. Use the loss"),
        ("categorical_crossentropy", np.arange(120) % 3, "Use keras.utils.to_categorical, or the loss 'sparse_"),
    ],
)
def test_labels_in_the_form_of_another_loss_name_the_right_one(tmp_path, loss, y, said):
    """Both ways round."""
    with pytest.raises(ObjectiveError, match=said):
        prepared_of(
            tmp_path,
            lambda: compiled(keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")]), loss=loss),
            (X, y),
        )


def test_tokens_beyond_an_embedding_name_its_size(tmp_path):
    """Before anything is trained, for one of several inputs too."""

    def build() -> keras.Model:
        inputs = {"n": keras.Input((4,), name="n"), "t": keras.Input((5,), name="t")}
        words = layers.Flatten()(layers.Embedding(20, 2, name="words")(inputs["t"]))
        return compiled(keras.Model(inputs, layers.Dense(1)(layers.Concatenate()([inputs["n"], words]))), loss="mse")

    tokens = RNG.integers(0, 20, (120, 5))
    assert prove(prepared_of(tmp_path, build, ({"n": X, "t": tokens}, X[:, 0]))).doubts == ()
    tokens[3, 3] = 25
    with pytest.raises(ObjectiveError, match=r"from 0 to 19 for the layer 'words', got 0 to 25. Give it input_dim=26"):
        prepared_of(tmp_path, build, ({"n": X, "t": tokens}, X[:, 0]))


# -- steps that return other names, or that only train -------------------------------------------


class Adversarial(keras.Model):
    """Two losses and no "loss", trackers of other names, no validation."""

    def __init__(self):
        super().__init__()
        self.made, self.judged = layers.Dense(4), layers.Dense(1)
        self.d_tracker, self.g_tracker = keras.metrics.Mean(name="critic"), keras.metrics.Mean(name="maker")

    @property
    def metrics(self):
        return [self.d_tracker, self.g_tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            made = self.made(tf.ones_like(data))
            g_loss = ops.mean(ops.square(made - data)) + 0 * ops.mean(self.judged(made))
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        self.d_tracker.update_state(ops.mean(self.judged(data)))
        self.g_tracker.update_state(g_loss)
        return {"d_loss": self.d_tracker.result(), "g_loss": self.g_tracker.result()}


def test_a_step_without_a_loss_is_tuned_on_the_name_that_the_study_gives(tmp_path):
    """What is measured on training data is called so wherever it is shown."""
    with pytest.raises(ObjectiveError, match="Set monitor to the one that its optimizer lowers: d_loss or g_loss"):
        prepared_of(tmp_path, lambda: compiled(Adversarial()), X)
    prepared = prepared_of(tmp_path, lambda: compiled(Adversarial()), X, monitor="g_loss")
    proof = prove(prepared)
    assert [d for d in proof.doubts if "g_loss on training data" in d] == list(proof.doubts)
    run = prepared.engine.start("sgd", prepared.splits[0])
    losses = run.steps(np.zeros(3)).losses
    assert len(np.unique(losses)) == 3  # each batch's own, not a mean over batches
    StudyRunner(prepared, Reporter(quiet=True)).run()
    record = load_record(prepared.study)
    assert record.monitor.name == "g_loss"
    said = summary(record, [])
    assert "g_loss on training data" in said and "val_" not in said


def test_a_step_without_validation_is_tuned_on_its_training_loss(tmp_path):
    """Without a word in the study file."""

    class Trains(Reconstructs):
        test_step = keras.Model.test_step

    prepared = prepared_of(tmp_path, lambda: compiled(Trains()), X)
    assert prepared.monitor.label == "loss on training data"
    with pytest.raises(KnownError, match=r"'val_mae' is not measured: the model has a train_step, and its test_step"):
        prepared_of(tmp_path, lambda: compiled(Trains()), X, monitor="val_mae")
