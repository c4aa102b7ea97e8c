"""Objectives: what `load_data` may return, and a clear message for everything that is wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import ObjectiveError
from pipeline.objective import load_objective
from pipeline.training.data import make_data

MODEL = """
import keras, numpy as np
def build_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
"""
DATA = """
import numpy as np
X, Y = np.zeros((30, 2)), np.arange(30) % 3
def load_data():
    return (X[:20], Y[:20]), (X[20:], Y[20:])
"""


def load(folder, text):
    """Write an objective and load it."""
    (folder / "objective.py").write_text(text)
    return load_objective("objective.py", folder)


def test_a_sound_objective(tmp_path):
    """Floats become float32, integers stay; class labels are found."""
    objective = load(tmp_path, MODEL + DATA)
    assert (objective.train.samples, objective.test.samples) == (20, 10)
    assert objective.train.x.dtype == np.float32
    assert objective.train.y.dtype == np.int64
    assert objective.labels.max() == 2


def test_x_and_y_alone_hold_out_a_test_set(tmp_path):
    """A fifth of (x, y) is the test set, the same on every load."""
    text = MODEL + DATA + "def load_data(): return X, Y"
    one, two = load(tmp_path, text), load(tmp_path, text)
    assert (one.train.samples, one.test.samples) == (24, 6)
    assert one.train.fingerprint() == two.train.fingerprint()


def test_the_objectives_own_folder_can_be_imported_from(tmp_path):
    """A script that imports its neighbours works as when it is run."""
    (tmp_path / "neighbour_of_objective.py").write_text(DATA)
    assert load(tmp_path, MODEL + "from neighbour_of_objective import load_data").train.samples == 20


@pytest.mark.parametrize(
    ("returned", "samples", "test_samples"),
    [
        ("({'a': X, 'b': X}, Y)", 24, 6),
        ("((X, X), Y)", 24, 6),
        ("((X, X), (Y, X[:, :1]))", 24, 6),
        ("(X[:20], Y[:20], np.ones(20)), (X[20:], Y[20:], np.ones(10))", 20, 10),
        ("(pd.DataFrame(X), pd.Series(Y))", 24, 6),
        ("(X.tolist(), Y.tolist())", 24, 6),
        ("[[X[:15], Y[:15]], [X[15:], Y[15:]]]", 15, 15),
    ],
)
def test_the_forms_that_load_data_may_return(tmp_path, returned, samples, test_samples):
    """Dicts, tuples, weights, frames and lists; two inputs with two targets are not taken for a test set."""
    model = MODEL.replace("SparseCategoricalCrossentropy(from_logits=True)", "MeanSquaredError()")
    objective = load(tmp_path, f"{model}{DATA}import pandas as pd\ndef load_data(): return {returned}")
    assert (objective.train.samples, objective.test.samples) == (samples, test_samples)


BAD = [
    ("def build_model(: pass", "cannot be imported: "),
    ("raise ValueError('no GPU')", "objective.py: cannot be imported: ValueError: no GPU (line 1)"),
    ("import not_a_package", "cannot be imported: No module named 'not_a_package' (line 1). Install what it needs"),
    ("import sys; sys.exit(3)", "objective.py: cannot be imported: it ends its process with 3 (line 1)"),
    (DATA, "must define build_model() that returns a compiled Keras model"),
    (MODEL + "def load_dat(): pass", "must define load_data() that returns (x_train, y_train), (x_test, y_test)"
     "; did you mean 'load_dat'?"),
    (MODEL.replace("return model", "return 3") + DATA, "build_model() must return a keras.Model, got int"),
    (MODEL.replace("return model", "") + DATA, "must return a keras.Model, got NoneType"),
    (MODEL.replace("    model.compile", "    0 and model.compile") + DATA, "must return a compiled model"),
    (MODEL.replace("build_model()", "build_model(width)") + DATA, "must work without arguments, got required width"),
    (MODEL.replace("model.compile", "1 / 0; model.compile") + DATA,
     "build_model() raised ZeroDivisionError: division by zero (line 5)"),
    (MODEL + "def load_data(): return 3", "got int"),
    (MODEL + "def load_data(): return None", "got NoneType"),
    (MODEL + DATA + "def load_data(): return (X, Y[:7])", "same number of samples, got x 30, y 7"),
    (MODEL + DATA + "def load_data(): return (X[:0], Y[:0])", "there must be at least one sample, got none"),
    (MODEL + DATA + "def load_data(): return (X, object())", "y must be an array, a pandas frame"),
    (MODEL + DATA + "Y = Y + 1", "must hold labels from 0 to 2, the model's outputs, got 1 to 3"),
    (MODEL + DATA + "Y = Y - 1", "got -1 to 1. Number the classes from 0"),
    (MODEL.replace("SparseCategoricalCrossentropy(from_logits=True)", "CategoricalCrossentropy()") + DATA,
     "must hold one-hot rows as wide as the model's 3 outputs"),
    (MODEL.replace("SparseCategoricalCrossentropy(from_logits=True)", "BinaryCrossentropy()") + DATA,
     "must lie in [0, 1] for the loss 'binary_crossentropy', got 0 to 2"),
    (MODEL + DATA + "X = np.array([[1], [1, 2]] * 15, dtype=object)", "x must hold samples of one length, got"),
    (MODEL + DATA + "Y = np.array(['hat', 'shoe', 'skirt'] * 10)", "got text such as 'hat', 'shoe', 'skirt'. Encode"),
    (MODEL + DATA + "import pandas as pd\nX = pd.DataFrame({'a': [1.0] * 30, 'town': 'x', 'on': pd.Timestamp(0)})",
     "x must hold numbers alone or text alone, got columns of something else: town, on. Encode them"),
    (MODEL + DATA + "X = np.full((30, 2), np.datetime64(0, 's'))", "x must hold numbers or strings, got dates"),
    (MODEL + "def load_data(): return np.zeros((9, 2))", "An autoencoder's target is its input: return (x, x)."),
    ("from .other import x", "Name it as a module of its package: objective = \""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_wrong_with_an_objective_is_one_clear_line(tmp_path, text, message):
    """Where, the rule, what came, and the line in the user's own file."""
    with pytest.raises(ObjectiveError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_objective_that_does_not_exist(tmp_path, monkeypatch):
    """The nearest file is named; a module that is none says so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").write_text("")
    with pytest.raises(ObjectiveError, match=r"'digit.py' does not exist.*did you mean 'digits.py'\?"):
        load_objective("digit.py", tmp_path)
    with pytest.raises(ObjectiveError, match=r"neither a .py file nor a module"):
        load_objective("no_such_module.at_all", tmp_path)


def test_the_fingerprint_sees_every_change_of_the_data():
    """One value, a dtype, a name or the order of samples changes the hash."""
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    prints = [make_data("t", x, y).fingerprint()]
    changed = x.copy()
    changed[3, 1] += 1e-3
    prints += [
        make_data("t", changed, y).fingerprint(),
        make_data("t", x, y.astype("int32")).fingerprint(),
        make_data("t", {"a": x}, y).fingerprint(),
        make_data("t", x[::-1], y).fingerprint(),
        make_data("t", x, y, np.ones(6)).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert make_data("t", x.copy(), y.copy()).fingerprint() == prints[0]


def test_pandas_strings_and_categories_become_arrays():
    """Text columns stay text; a categorical column becomes its values; a series becomes a column, as in `model.fit`."""
    frame = pd.DataFrame({"a": [1.5, 2.5], "b": [1, 2]})
    data = make_data("t", {"numbers": frame, "words": pd.Series(["x", "y"])}, pd.Series(["p", "q"], dtype="category"))
    assert data.x["numbers"].dtype == np.float32
    assert data.x["words"].tolist() == [["x"], ["y"]]
    assert data.y.tolist() == [["p"], ["q"]]
