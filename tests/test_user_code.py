"""Programs that were not written for lrtune: what they import from their folder, and files beside them."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

import pipeline
from pipeline.errors import ObjectiveError
from pipeline.objective import load_objective
from pipeline.user_code import UserCode, describe_fault
from tests.test_objective import DATA, MODEL


def write(folder, **files):
    """Write Python files into a folder; two underscores are a slash."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_folder_may_have_names_that_are_taken(tmp_path):
    """`pipeline`, a module of the standard library, an installed package: the program's own come first, only for it."""
    write(
        tmp_path,
        pipeline__start="",
        pipeline__deep__half="from ..clean import FACTOR\ndef half(x): return x * FACTOR",
        pipeline__clean="from constants import FACTOR\nimport pipeline.deep.half as again",
        constants="FACTOR = 0.5",
        calendar="MONTHS = 7",
        sklearn="import pipeline\nNAME = pipeline.__name__",
        train=MODEL
        + "import pipeline.deep.half, calendar\nfrom pipeline.deep.half import half\nfrom sklearn import NAME\n"
        + "def load_data():\n    import pipeline as mine\n    from pipeline import clean\n"
        + "    from calendar import MONTHS\n"
        + "    assert mine.deep.half.half is half and clean.again is mine.deep.half and calendar.MONTHS == MONTHS\n"
        + "    X = np.full((30, 2), 4.0)\n    return half(X), np.arange(30) % 3\n",
    )
    for package in ("pipeline", "pipeline/deep"):
        (tmp_path / package / "__init__.py").write_text("from .clean import FACTOR\n" if package == "pipeline" else "")
    objective = load_objective("train.py", tmp_path)
    assert np.unique(objective.train.x).tolist() == [2.0]
    assert sys.modules["pipeline"] is pipeline
    assert str(tmp_path) not in sys.path  # worker processes take it over before they have imported lrtune
    import calendar

    assert calendar.monthrange(2024, 2) == (3, 29)


def test_what_is_asked_for_by_name_is_found_beside_a_name_that_is_taken(tmp_path):
    """A package without __init__.py, importlib, and pickles, in a folder that also has a `test.py`."""
    write(
        tmp_path,
        test="",
        lrtune_loose__clean="F = 2.0",
        lrtune_test_lazy="G = 3.0",
        lrtune_test_kept="class Kept:\n    pass",
        pipeline__own="H = 5.0",
        train=MODEL + "import importlib, pickle\nfrom lrtune_loose.clean import F\nfrom pipeline.own import H\n"
        "G = importlib.import_module('lrtune_test_lazy').G\n"
        "def load_data():\n    kept = pickle.loads(b'\\x80\\x04clrtune_test_kept\\nKept\\n.')\n"
        "    assert kept.__name__ == 'Kept'\n    return np.full((30, 2), F * G * H), np.arange(30) % 3\n",
    )
    assert load_objective("train.py", tmp_path).train.x.max() == 30.0
    assert sys.modules["pipeline"] is pipeline


def test_two_programs_may_have_helpers_of_the_same_name(tmp_path):
    """Each gets its own, also in what is imported only when a function runs."""
    for number in (1, 2):
        folder = tmp_path / str(number)
        lazily = (
            "def load_data():\n    from lrtune_test_helper import N\n    return np.full((30, 2), N), np.arange(30) % 3"
        )
        write(folder, lrtune_test_helper=f"N = {number}.0", train=MODEL + lazily)
    one, two = (load_objective("train.py", tmp_path / number) for number in "12")
    assert (one.train.x.max(), two.train.x.max()) == (1.0, 2.0)


def test_a_missing_module_is_named_as_the_program_names_it(tmp_path):
    """Not by the name that it has inside lrtune."""
    write(tmp_path, pipeline="", train=MODEL + "from pipeline.nowhere import x\n" + DATA)
    with pytest.raises(ObjectiveError, match=r"train.py: cannot be imported: No module named 'pipeline.nowhere'"):
        load_objective("train.py", tmp_path)


@pytest.mark.parametrize("at", ["import", "call", "gfile"])
def test_files_beside_the_program_are_found_from_anywhere(tmp_path, monkeypatch, at):
    """By relative paths; the working directory comes first and stays as it was."""
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "elsewhere" / "data").mkdir(parents=True)
    np.save(tmp_path / "project" / "data" / "x.npy", np.ones((30, 2)))
    read = {
        "import": "X = np.load('data/x.npy')\n",
        "call": "def read(): return np.load('data/x.npy')\n",
        "gfile": "import io, tensorflow as tf\n"
        "def read(): return np.load(io.BytesIO(tf.io.gfile.GFile('data/x.npy', 'rb').read()))\n",
    }[at]
    last = f"def load_data(): return {'X' if at == 'import' else 'read()'}, np.arange(30) % 3"
    write(tmp_path / "project", train=MODEL + read + last)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_objective("train.py", tmp_path / "project").train.x.max() == 1.0
    assert load_objective("../project/train.py", tmp_path).train.x.max() == 1.0
    np.save(tmp_path / "elsewhere" / "data" / "x.npy", np.full((30, 2), 2.0))
    assert load_objective("train.py", tmp_path / "project").train.x.max() == 2.0


def test_files_beside_the_study_file_are_found(tmp_path, monkeypatch):
    """A folder in `objective.kwargs` may start at the study file, as all its paths do."""
    np.save(tmp_path / "x.npy", np.ones((30, 2)))
    write(tmp_path / "code", train=MODEL + "def load_data(file=''): return np.load(file), np.arange(30) % 3")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_objective("code/train.py", tmp_path, kwargs={"file": "x.npy"}).train.samples == 24


def test_a_mistake_in_a_helper_is_told_with_its_file(tmp_path):
    """The line alone would be looked for in the wrong file."""
    write(tmp_path, lrtune_test_broken="x = 1\ny = = 2", train="import lrtune_test_broken\n" + MODEL + DATA)
    with pytest.raises(ObjectiveError, match=r"invalid syntax \(lrtune_test_broken.py, line 2\)"):
        load_objective("train.py", tmp_path)


def test_a_file_that_is_nowhere_is_told_once(tmp_path):
    """And what else goes wrong in the folder where the file is, is told as it is."""
    write(tmp_path, train=MODEL + "def load_data(): return np.load('nowhere.npy'), 1")
    with pytest.raises(ObjectiveError, match=r"load_data\(\) raised FileNotFoundError.*nowhere.npy' \(line \d+\)\.$"):
        load_objective("train.py", tmp_path)
    (tmp_path / "there.npy").write_bytes(b"no array")
    write(tmp_path, train=MODEL + "def load_data(): return np.load('there.npy'), 1")
    with pytest.raises(ObjectiveError, match=r"load_data.. raised (ValueError|UnpicklingError|EOFError)"):
        load_objective("train.py", tmp_path)


def test_a_download_at_the_top_of_a_program_is_told_as_one_in_load_data(tmp_path, monkeypatch):
    """With the file's place, its name and what Keras does to another file there."""
    import urllib.error

    import keras.src.utils.file_utils as files

    def no_network(*_: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(files, "urlretrieve", no_network)
    monkeypatch.setattr(files.config, "keras_home", lambda: str(tmp_path))
    write(tmp_path, train=MODEL + "from keras.datasets import mnist\nTRAIN, TEST = mnist.load_data()\n" + DATA)
    place = tmp_path / "datasets" / "mnist.npz"
    said = rf"it could not download .*place it at {place}, under exactly this name .Keras compares its checksum"
    with pytest.raises(ObjectiveError, match=said):
        load_objective("train.py", tmp_path)


def test_a_program_has_the_command_line_of_its_own(tmp_path, monkeypatch, capsys):
    """It may parse it, and what it prints is no result of lrtune's."""
    begin = (
        "import argparse, sys\nparser = argparse.ArgumentParser()\nparser.add_argument('--n', type=int, default=7)\n"
    )
    write(tmp_path, train=begin + "N = parser.parse_args().n\nprint('hello')\n" + MODEL + DATA)
    monkeypatch.setattr(sys, "argv", ["lrtune", "check", "train.toml", "--trials", "3"])
    load_objective("train.py", tmp_path)
    assert sys.argv[0] == "lrtune"
    captured = capsys.readouterr()
    assert "hello" in captured.err and not captured.out


def test_names_of_metrics_do_not_depend_on_how_many_models_were_built(tmp_path):
    """As in the program's own process, where there is one."""
    named = MODEL.replace("True))", "True), metrics=[keras.metrics.SparseTopKCategoricalAccuracy(2)])")
    write(tmp_path, train="import keras\nkeras.layers.Dense(3)\n" + named + DATA)
    objective = load_objective("train.py", tmp_path)
    models = [objective.build_model() for _ in range(3)]
    assert {model.layers[-1].name for model in models} == {models[0].layers[-1].name}
    assert {model.metrics[-1].name for model in models} == {models[0].metrics[-1].name}


def test_an_attempt_elsewhere_begins_as_the_first_did(tmp_path, monkeypatch):
    """Data and weights do not tell from which folder a study was run."""
    np.save(tmp_path / "w.npy", np.zeros(1))
    text = """
import keras, random, numpy as np
def load_data():
    x = np.random.permutation(60).reshape(30, 2) + random.random()
    np.load("w.npy")
    return x, np.arange(30) % 2
def build_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(loss="binary_crossentropy", metrics=[keras.metrics.Precision()])
    np.load("w.npy")
    return model
"""
    write(tmp_path, train=text)
    seen = []
    for folder in (tmp_path, "/"):
        monkeypatch.chdir(folder)
        objective = load_objective("train.py", tmp_path)
        keras.utils.set_random_seed(3)
        model = objective.build_model()
        seen.append((objective.train.fingerprint(), model.get_weights()[0].tolist()))
    assert seen[0] == seen[1]


def test_a_program_may_keep_a_layer_between_its_models(tmp_path):
    """Its name is taken already when the second model is made."""
    text = """
import keras, numpy as np
KEPT = []
def load_data():
    return np.zeros((30, 2)), np.arange(30) % 3
def build_model():
    if not KEPT:
        KEPT.append(keras.layers.Dense(4))
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(3)(KEPT[0](inputs)))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
"""
    write(tmp_path, train=text)
    objective = load_objective("train.py", tmp_path)
    assert [len(objective.build_model().layers) for _ in range(3)] == [3, 3, 3]


def test_datasets_that_will_not_find_their_files_are_refused(tmp_path):
    """They open them while they train; others of a folder found this way are taken."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.csv").write_text("1,2,0\n" * 8)
    begin = MODEL + "import os, tensorflow as tf\ndef load_data():\n    assert os.listdir('data')\n"
    parse = ".map(lambda line: (tf.strings.to_number(tf.strings.split(line, ',')[:2]), 0)).batch(4)"
    write(tmp_path, train=begin + f"    d = tf.data.TextLineDataset('data/x.csv'){parse}\n    return d, d")
    with pytest.raises(
        ObjectiveError, match=r"its datasets read files by paths relative to .*Run lrtune in that folder"
    ):
        load_objective("train.py", tmp_path)
    write(tmp_path, train=begin + "    d = tf.data.Dataset.from_tensor_slices((np.ones((8, 2)), [0] * 8)).batch(4)\n"
          "    return d, d")  # fmt: skip
    assert load_objective("train.py", tmp_path).train.first is not None


@pytest.mark.slow
def test_a_program_named_as_lrtune_is_tuned_by_workers(tmp_path, lrtune):
    """Its own processes still find themselves."""
    write(
        tmp_path, pipeline="import pipeline_data\n" + MODEL + "load_data = pipeline_data.load_data", pipeline_data=DATA
    )
    assert lrtune("init", str(tmp_path / "pipeline.py")).returncode == 0
    quick = ("--trials", "3", "--epochs", "2", "--confirm.finalists", "0", "--workers.count", "2")
    ended = lrtune("tune", str(tmp_path / "pipeline.toml"), "--validation.folds", "2", "--batch_size", "5", *quick)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "pipeline" / "best.json").exists()


def test_an_error_is_told_by_its_cause():
    """Without TensorFlow's frames, Keras's lists of arguments, and the escapes of a terminal; cut behind a sentence."""
    import keras
    import tensorflow as tf

    def fault(function) -> str:
        try:
            function()
        except Exception as error:
            return describe_fault(error, None)
        raise AssertionError("no error")

    gathered = fault(lambda: tf.function(lambda: tf.gather(tf.zeros([20]), tf.constant([3, 25])))())
    assert "indices[1] = 25 is not in [0, 20)" in gathered and "{{node" not in gathered and "Detected" not in gathered
    assert gathered.endswith("raise its input_dim, or limit the vocabulary")
    keras_said = fault(lambda: keras.layers.Dense(2)(keras.Input((None,))))
    assert "\x1b" not in keras_said and "Arguments received" not in keras_said
    metric = keras.metrics.F1Score()
    told = fault(lambda: metric.update_state(np.zeros(3), np.zeros((3, 1))))
    assert "y.reshape(-1, 1)" in told
    long = fault(lambda: (_ for _ in ()).throw(ValueError("First thing. " + "words " * 300)))
    assert len(long) < 600 and not long.endswith(" word")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])", "parses command-line arguments where it is"),
        ("raise SystemExit('no data')", "ends its process with no data (line 1): nothing that ends"),
    ],
)
def test_a_program_that_ends_is_told_why(tmp_path, program, said):
    """The commonest reason is a parser of arguments."""
    (tmp_path / "train.py").write_text(program)
    with pytest.raises(ObjectiveError) as error:
        UserCode("train.py", tmp_path)
    assert said in str(error.value)


def test_the_backend_of_the_environment_is_named(tiny, lrtune, monkeypatch):
    """Before anything is imported."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    done = lrtune("check", tiny)
    assert done.returncode == 1
    assert "KERAS_BACKEND chooses the backend of Keras and must be 'tensorflow' here, got 'jax'" in done.stderr
