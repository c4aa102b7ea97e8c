"""Programs as they are found in the wild, tuned with nothing but `init` and `tune`.

Each is written for Keras alone: none names lrtune.  Its file is what its author would run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest

from pipeline.report.export import keras_code
from pipeline.report.records import load_record, recommend
from pipeline.study_file import read_study

pytestmark = pytest.mark.slow

HEAD = "import keras, numpy as np\nfrom keras import layers\nrandom = np.random.default_rng(0)\n"

PROGRAMS = {
    "regression from a CSV file, in its own units": """
import pandas as pd
def load_data():
    table = pd.read_csv("houses.csv")
    return table.drop(columns="price"), table["price"]
def build_model():
    scale = layers.Normalization()
    scale.adapt(load_data()[0].to_numpy("float32"))
    model = keras.Sequential([keras.Input((2,)), scale, layers.Dense(8, "relu"), layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(0.01, clipnorm=1.0), loss="mae", metrics=["mse"])
    return model
""",
    "text, with the vocabulary read when the file is": """
TEXTS = np.array([("good film " if i % 2 else "bad plot ") * (1 + i % 3) for i in range(120)])
vectorize = layers.TextVectorization(max_tokens=20, output_sequence_length=6)
vectorize.adapt(TEXTS)
def load_data():
    return (TEXTS[:100], np.arange(100) % 2), (TEXTS[100:], np.arange(100, 120) % 2)
def build_model():
    inputs = keras.Input((), dtype="string")
    hidden = layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(vectorize(inputs)))
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(hidden))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model
""",
    "a time series": """
def load_data():
    series = np.sin(np.arange(160) / 5)
    windows = np.lib.stride_tricks.sliding_window_view(series, 9)
    return windows[:, :8, None], windows[:, 8]
def build_model():
    model = keras.Sequential([keras.Input((8, 1)), layers.LSTM(4), layers.Dense(1)])
    model.compile(loss="mse", optimizer="rmsprop")
    return model
""",
    "inputs and outputs by name": """
def load_data():
    x = {"age": random.normal(size=(90, 1)), "town": np.array(["A", "B", "C"] * 30)}
    y = {"grade": np.arange(90) % 3, "size": x["age"][:, 0] * 2}
    return x, y
def build_model():
    age, town = keras.Input((1,), name="age"), keras.Input((), dtype="string", name="town")
    known = layers.StringLookup(vocabulary=["A", "B", "C"], output_mode="one_hot")(town)
    both = layers.Dense(8, "relu")(layers.concatenate([age, known]))
    outputs = {"grade": layers.Dense(3, name="grade")(both), "size": layers.Dense(1, name="size")(both)}
    model = keras.Model({"age": age, "town": town}, outputs)
    losses = {"grade": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"}
    model.compile("adam", loss=losses, loss_weights={"grade": 1.0, "size": 0.2}, metrics={"grade": ["accuracy"]})
    return model
""",
    "an autoencoder": """
def load_data():
    x = random.uniform(size=(90, 8, 8, 1)).astype("float32")
    return (x[:70], x[:70]), (x[70:], x[70:])
def build_model():
    model = keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
        layers.Conv2DTranspose(1, 3, strides=2, padding="same", activation="sigmoid")])
    model.compile(loss="binary_crossentropy", optimizer=keras.optimizers.Adam(3e-4))
    return model
""",
    "a class of its own, with its own steps": """
class VAE(keras.Model):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.seen = keras.metrics.Mean(name="loss")
    @property
    def metrics(self):
        return [self.seen]
    def call(self, x):
        return self.decoder(self.encoder(x))
    def train_step(self, data):
        import tensorflow as tf
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(data[0] - self(data[0])))
        self.optimizer.apply_gradients(zip(tape.gradient(loss, self.trainable_weights), self.trainable_weights))
        self.seen.update_state(loss)
        return {"loss": self.seen.result()}
    def test_step(self, data):
        self.seen.update_state(keras.ops.mean(keras.ops.square(data[0] - self(data[0]))))
        return {"loss": self.seen.result()}
def load_data():
    x = random.normal(size=(90, 4)).astype("float32")
    return x, x
def build_model():
    model = VAE(keras.Sequential([layers.Dense(2)]), keras.Sequential([layers.Dense(4)]))
    model.compile(optimizer="adam")
    return model
""",
    "tf.data": """
import tensorflow as tf
def load_data():
    x = random.normal(size=(96, 4)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, (x[:, 0] > 0).astype(int)))
    train = data.take(72).cache().shuffle(72).batch(16).prefetch(tf.data.AUTOTUNE)
    return train, data.skip(72).filter(lambda x, y: True).batch(16)
def build_model():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
""",
    "sample weights for training alone, a score of one class, and its own folder": """
from pipeline.clean import halve
from config import UNITS
BATCH_SIZE = 16
N_EPOCHS = 3
def load_data():
    x = random.normal(size=(90, 4))
    y = (x[:, 0] > 0).astype(int)
    return (halve(x[:70]), y[:70, None], np.where(y[:70], 3.0, 1.0)), (halve(x[70:]), y[70:, None])
def build_model(units=UNITS):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units, "relu"), layers.Dense(1, "sigmoid")])
    model.compile("nadam", "binary_crossentropy", metrics=[keras.metrics.F1Score(threshold=0.5, name="f1"),
                  keras.metrics.Precision()])
    return model
if __name__ == "__main__":
    build_model().fit(*load_data()[0][:2], epochs=N_EPOCHS)
""",
}


UNLEARNED = ("regression from a CSV file, in its own units", "an autoencoder")
"""Prices of tens of thousands, and images of noise: two epochs teach no model of these anything."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_stranger_is_tuned_and_fitted(tmp_path, lrtune_here, monkeypatch, name):
    """From another folder; the answer, its code and a trained model are there at the end."""
    project = tmp_path / "project"
    (project / "pipeline").mkdir(parents=True)
    (project / "pipeline" / "__init__.py").write_text("")
    (project / "pipeline" / "clean.py").write_text("def halve(x):\n    return x / 2\n")
    (project / "config.py").write_text("UNITS = 5\n")
    rooms = np.arange(90.0)
    table = pd.DataFrame({"rooms": rooms, "age": rooms[::-1], "price": 1000.0 * rooms + 50_000})
    table.to_csv(project / "houses.csv", index=False)
    (project / "train.py").write_text(HEAD + PROGRAMS[name])
    monkeypatch.chdir(tmp_path)
    made = lrtune_here("init", "project/train.py")
    assert made.returncode == 0, made.stderr
    epochs = "30" if "its own folder" in name else "2"
    options = ("--trials", "4", "--epochs", epochs, "--confirm.finalists", "1", "--confirm.repeats", "2")
    tuned = lrtune_here("tune", "project/train.toml", *options, "--search.optimizers", "['sgd', 'adam']")
    assert tuned.returncode == 0, tuned.stderr
    out = project / "train"
    best = json.loads((out / "best.json").read_text())
    if name in UNLEARNED:
        assert not best["recommended"] and "Nothing is recommended" in tuned.stdout
        assert lrtune_here("fit", "project/train.toml").returncode == 1
        return
    assert np.isfinite(best["value"])
    scope: dict[str, object] = {}
    exec((out / "best.py").read_text(), scope)
    assert isinstance(scope["optimizer"], keras.optimizers.Optimizer)
    fitted = lrtune_here("fit", "project/train.toml", "--json")
    assert fitted.returncode == 0, fitted.stderr
    result = json.loads(fitted.stdout)
    saved = tmp_path / result["model"]
    assert saved.exists()
    assert np.isfinite(result["train"]["loss"])
    assert bool(result["test"]) == (name != "tf.data")
    if "own steps" in name:
        assert "build_model()" in result["saved"] and (out / "model.weights.h5").exists()
    else:
        keras.models.load_model(saved)
    if "its own folder" in name:
        assert {"val_f1", "val_precision"} < set(pd.read_csv(out / "curves.csv"))
        assert "\nepochs      = 3 " in (project / "train.toml").read_text()
        assert "sample_weight=..." in (out / "best.py").read_text()
    assert "pipeline.clean" not in sys.modules


def test_weights_for_training_alone_are_kept_by_fit(tmp_path, lrtune_here):
    """A rare class that weighs much is still found by the model that `fit` saves."""
    text = """
def load_data():
    x = random.normal(size=(600, 2)).astype("float32")
    y = (x[:, 0] + random.normal(size=600) > 2.2).astype(int)
    return (x[:480], y[:480], np.where(y[:480], 30.0, 1.0)), (x[480:], y[480:])
def build_model():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=[keras.metrics.Recall(name="recall")])
    return model
"""
    (tmp_path / "train.py").write_text(HEAD + text)
    keys = 'objective = "train.py"\ntrials = 2\nepochs = 8\n[search]\nlearning_rate = { values = [0.05] }\n'
    keys += 'optimizers = ["adam"]\ndecays = ["constant"]\n[confirm]\nfinalists = 0\n[validation]\nfolds = 2\n'
    (tmp_path / "train.toml").write_text(keys)
    assert lrtune_here("tune", tmp_path / "train.toml").returncode == 0
    fitted = lrtune_here("fit", tmp_path / "train.toml", "--json")
    assert json.loads(fitted.stdout)["test"]["recall"] > 0.7


def test_fit_lays_the_decay_out_over_the_epochs_that_the_study_ran_with(tmp_path, lrtune_here):
    """Options given to `tune` alone hold for `fit` too, the objective's parameters among them."""
    text = """
def load_data(samples=90):
    x = random.normal(size=(samples, 4)).astype("float32")
    return x, x.sum(axis=1)
def build_model(units=1):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units), layers.Dense(1)])
    model.compile("adam", "mse")
    return model
"""
    (tmp_path / "train.py").write_text(HEAD + text)
    keys = 'objective = "train.py"\nepochs = 40\ntrials = 3\n[search]\noptimizers = ["sgd"]\ndecays = ["linear"]\n'
    keys += "learning_rate = { low = 0.01, high = 0.05 }\n[confirm]\nfinalists = 0\n[validation]\nfolds = 2\n"
    (tmp_path / "train.toml").write_text(keys)
    options = ("--epochs", "3", "--objective.kwargs.units", "7", "--seed", "5")
    assert lrtune_here("tune", tmp_path / "train.toml", *options).returncode == 0
    one = json.loads(lrtune_here("fit", tmp_path / "train.toml", "--json").stdout)
    model = keras.models.load_model(one["model"])
    two = json.loads(lrtune_here("fit", tmp_path / "train.toml", "--json", *options).stdout)
    assert one == two
    assert model.layers[0].units == 7


def test_the_models_own_optimizer_runs_beside_the_default(tmp_path, lrtune_here):
    """At its own rate, outside the bounds too, and the answer says how it did."""
    text = """
def load_data():
    x = random.normal(size=(200, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)
def build_model():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-7, momentum=0.9), loss)
    return model
"""
    (tmp_path / "train.py").write_text(HEAD + text)
    keys = 'objective = "train.py"\ntrials = 5\nepochs = 3\n[search]\noptimizers = ["momentum", "adam"]\n'
    keys += "[confirm]\nfinalists = 0\n[validation]\nfolds = 2\n"
    (tmp_path / "train.toml").write_text(keys)
    ended = lrtune_here("tune", tmp_path / "train.toml")
    assert ended.returncode == 0, ended.stderr
    trials = pd.read_csv(tmp_path / "train" / "trials.csv")
    own = trials[trials["number"] == 1].iloc[0]
    assert (own["optimizer"], own["decay"], own["learning_rate"]) == ("momentum", "constant", 1e-7)
    said = (
        f"The optimizer that the model was compiled with, SGD at 1e-07, momentum 0.9, has val_loss {own['value']:.4g}"
    )
    assert said in ended.stdout
    assert said in (tmp_path / "train" / "report.html").read_text()
    assert trials["number"].tolist() == list(range(5))


@pytest.mark.parametrize(
    ("compiled", "said"),
    [
        ("'adam'", None),
        ("keras.optimizers.Adam(0.001)", None),
        ("'rmsprop'", None),
        ("keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.1, 9))", "AdamW with CosineDecay"),
        ("keras.optimizers.Adam(2e-3, global_clipnorm=2.0, use_ema=True)", "Adam at 0.002, global_clipnorm 2, use_ema"),
    ],
)
def test_an_optimizer_that_gives_way_is_named(tmp_path, lrtune_here, compiled, said):
    """Nothing of it vanishes without a word; defaults need none."""
    text = f"""
def load_data():
    return random.normal(size=(40, 2)), np.arange(40) % 2
def build_model():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, "sigmoid")])
    model.compile({compiled}, "binary_crossentropy")
    return model
"""
    (tmp_path / "train.py").write_text(HEAD + text)
    (tmp_path / "train.toml").write_text('objective = "train.py"\nbatch_size = 8\n')
    ended = lrtune_here("check", tmp_path / "train.toml")
    assert ended.returncode == 0, ended.stderr
    assert ("gives way" in ended.stderr) == (said is not None)
    assert said is None or f"the model's own, {said}, gives way" in ended.stderr


def test_groups_are_used_where_the_study_file_names_no_scheme(tmp_path, lrtune_here):
    """And not where it does; what else is called groups is left alone."""
    text = """
def load_data():
    return random.normal(size=(80, 2)), np.arange(80) % 2
def build_model():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy")
    return model
"""
    sound, other = "def groups():\n    return np.arange(80) // 8\n", "def groups():\n    return ['a', 'b']\n"
    study = tmp_path / "train.toml"
    for added, keys, used in (
        (sound, "", True),
        (sound, '[validation]\nscheme = "k-fold"\n', False),
        (sound, '[validation]\nscheme = "hold-out"\n', True),
        (other, '[validation]\nscheme = "hold-out"\n', False),
        (other, "", False),
        ("def groups(of):\n    return of\n", "", False),
    ):
        (tmp_path / "train.py").write_text(HEAD + text + added)
        study.write_text(f'objective = "train.py"\nbatch_size = 8\n{keys}')
        ended = lrtune_here("check", study)
        assert ended.returncode == 0, ended.stderr
        assert ("groups of groups(): none is on both sides" in ended.stderr) == used
    (tmp_path / "train.py").write_text(HEAD + text + sound)
    study.unlink()
    assert lrtune_here("init", tmp_path / "train.py").returncode == 0
    assert 'scheme = "group-k-fold"' in study.read_text()


def test_init_takes_over_what_the_program_says_of_itself(tmp_path, lrtune_here):
    """Epochs and batch size by name; training on import is told; a notebook is refused."""
    text = "EPOCHS = 7\nBATCH_SIZE: int = 3\nBATCH = 64\ndef load_data(): ...\ndef build_model(): ...\n"
    (tmp_path / "my train.py").write_text(text + "model = build_model()\nmodel.fit(*load_data(), epochs=EPOCHS)\n")
    ended = lrtune_here("init", tmp_path / "my train.py")
    assert ended.returncode == 0, ended.stderr
    assert "trains whenever it is imported (line 7)" in ended.stderr
    assert f"lrtune check '{tmp_path / 'my train.toml'}'" in ended.stdout
    config = read_study(tmp_path / "my train.toml").config
    assert (config.epochs, config.batch_size) == (7, 3)
    (tmp_path / "n.ipynb").write_text("{}")
    ended = lrtune_here("init", tmp_path / "n.ipynb", "--quiet")
    assert ended.returncode == 1
    assert "must be a Python file" in ended.stderr


def test_a_time_series_is_exported_with_the_steps_of_all_samples(tmp_path, lrtune_here):
    """Its first fold is a fraction of what the code will train on."""
    (tmp_path / "train.py").write_text(HEAD + PROGRAMS["a time series"])
    keys = 'objective = "train.py"\ntrials = 2\nepochs = 4\nbatch_size = 8\n[search]\noptimizers = ["adam"]\n'
    keys += 'decays = ["linear"]\n[validation]\nscheme = "time-series"\n[confirm]\nfinalists = 0\n'
    (tmp_path / "train.toml").write_text(keys)
    checked = lrtune_here("check", tmp_path / "train.toml")
    assert "3 to 13 steps per epoch" in checked.stdout
    assert lrtune_here("tune", tmp_path / "train.toml").returncode == 0
    record = load_record(read_study(tmp_path / "train.toml"))
    linear = record.trials[1]
    assert linear.configuration.decay == "linear"
    code = keras_code(record, replace(recommend(record), trial=linear))
    assert "over 4 epochs of 16 steps, of all samples" in code  # 122 training samples in steps of 8
    assert "decay_steps=63" in code
    report = (tmp_path / "train" / "report.html").read_text()
    assert "of about 22 to 102 training" in report and "(time-series)" in report


def test_the_report_names_the_command_that_resumes_with_its_options(tmp_path, lrtune_here):
    """As last given, without where the trials are kept; run as printed, it is accepted."""
    import html
    import re
    import shlex

    (tmp_path / "train.py").write_text(HEAD + PROGRAMS["a time series"])
    keys = 'objective = "train.py"\n[search]\noptimizers = ["adam"]\nlearning_rate = { low = 0.001, high = 0.01 }\n'
    (tmp_path / "train.toml").write_text(keys + "[validation]\nfolds = 2\n[confirm]\nfinalists = 0\n")
    storage = f"sqlite:///{tmp_path / 'secret-place.db'}"
    words = ["--epochs", "2", "--search.decays", "['linear', 'cosine']", "--storage", storage]
    for trials in ("2", "3"):
        ended = lrtune_here("tune", tmp_path / "train.toml", *words, "--trials", trials)
        assert ended.returncode == 0, ended.stderr
    report = (tmp_path / "train" / "report.html").read_text()
    said = re.search(r"Resume or extend: <code>(.*?)</code>", report)
    assert said is not None
    command = shlex.split(html.unescape(said.group(1)))
    assert command[-2:] == ["--trials", "3"]
    assert "secret-place" not in " ".join(command)
    again = lrtune_here(*command[1:], "--storage", storage)
    assert again.returncode == 0, again.stderr
    assert "3 of 3 trials are there" in again.stderr
