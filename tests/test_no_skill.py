"""What a model reaches that ignores its inputs, and a study that says when none of its trials did better."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from pipeline.training.no_skill import no_skill

RANDOM = np.random.default_rng(0)
CLASSES = RANDOM.choice(4, 300, p=[0.1, 0.2, 0.3, 0.4])
CASES = {
    "sparse_categorical_crossentropy": CLASSES,
    "categorical_crossentropy": np.eye(4)[CLASSES],
    "binary_crossentropy": (CLASSES > 2).astype(float)[:, None],
    "mean_squared_error": RANDOM.normal(5, 3, (300, 2)),
    "mean_absolute_error": RANDOM.normal(5, 3, (300, 2)),
}


@pytest.mark.parametrize("loss", CASES)
def test_no_constant_answer_is_better_by_keras_own_loss(loss):
    """The value is that of some constant, and of many others around it none is below."""
    y = CASES[loss]
    bar = no_skill(y, loss.replace("_", ""))["loss"]
    centre = {
        "sparse_categorical_crossentropy": np.bincount(CLASSES) / 300,
        "mean_absolute_error": np.median(y, axis=0),
    }.get(loss, y.mean(axis=0))
    function = keras.losses.get(loss)

    def value(answer):
        return float(np.mean(function(y, np.tile(answer, (len(y), 1)).astype("float32"))))

    assert value(centre) == pytest.approx(bar, rel=1e-4)
    for _ in range(30):
        other = np.abs(centre * np.exp(RANDOM.normal(0, 0.3, centre.shape)))
        if "entropy" in loss:
            other = other / other.sum() if len(other) > 1 else np.minimum(other, 0.99)
        assert value(other) >= bar * (1 - 1e-4)


def test_accuracy_is_the_share_of_the_commonest_class():
    """In every form of labels."""
    share = np.bincount(CLASSES).max() / 300
    assert no_skill(CLASSES, "sparsecategoricalcrossentropy")["accuracy"] == pytest.approx(share)
    assert no_skill(np.eye(4)[CLASSES], "categoricalcrossentropy")["accuracy"] == pytest.approx(share)
    assert no_skill(np.array([0, 0, 0, 1]), "binarycrossentropy")["accuracy"] == 0.75
    assert no_skill({"a": CLASSES}, "mse") == {} == no_skill(CLASSES, "huber")


PROGRAM = """
import keras, numpy as np
def load_data():
    random = np.random.default_rng(0)
    x = random.normal(size=(600, 4))
    y = {y}
    return x, y
def build_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense({units})])
    model.compile(loss={loss}, metrics=["accuracy"])
    return model
"""
CROSS_ENTROPY = "keras.losses.SparseCategoricalCrossentropy(from_logits=True)"


@pytest.mark.parametrize(
    ("y", "loss", "monitor", "said"),
    [
        ("random.choice(3, 600, p=[0.6, 0.3, 0.1])", CROSS_ENTROPY, "val_accuracy", "the commonest class gives 0."),
        ("random.normal(size=600)", "'mse'", "val_loss", "one constant answer gives 0."),
        ("np.argmax(x[:, :3], axis=1)", CROSS_ENTROPY, "val_accuracy", None),
        ("x[:, 0] + x[:, 1]", "'mse'", "val_loss", None),
    ],
)
def test_a_study_says_that_nothing_was_learned_only_where_it_is_so(tmp_path, lrtune_here, y, loss, monitor, said):
    """At the top of the report and in the terminal, with what the bar is."""
    units = 1 if loss == "'mse'" else 3
    (tmp_path / "train.py").write_text(PROGRAM.format(y=y, units=units, loss=loss))
    keys = f'objective = "train.py"\nmonitor = "{monitor}"\ntrials = 3\nepochs = 6\n[validation]\nscheme = "hold-out"\n'
    keys += "[search]\nlearning_rate = { low = 0.01, high = 0.1 }\n[confirm]\nfinalists = 0\n"
    (tmp_path / "train.toml").write_text(keys)
    ended = lrtune_here("tune", tmp_path / "train.toml")
    assert ended.returncode == 0, ended.stderr
    report = (tmp_path / "train" / "report.html").read_text()
    for text in (ended.stdout, report):
        assert ("No trial learned to use the inputs" in text) == (said is not None)
        assert said is None or said in text


@pytest.mark.parametrize(
    ("loss", "known"),
    [
        ("'mse'", True),
        ("keras.losses.MeanSquaredError()", True),
        ("keras.losses.MeanSquaredError(reduction='sum')", False),
        ("keras.losses.BinaryCrossentropy(label_smoothing=0.1)", False),
        ("keras.losses.Huber()", True),
        ("'mse', loss_weights=[0.5]", False),
    ],
)
def test_only_a_plain_loss_is_held_against_a_constant(tmp_path, loss, known):
    """A sum, a smoothed or weighted loss, a penalty or an own step has another scale."""
    from pipeline.objective import load_objective

    text = PROGRAM.format(y="random.integers(0, 2, 600)", units=1, loss=loss)
    (tmp_path / "train.py").write_text(text)
    assert (load_objective("train.py", tmp_path).only_loss is not None) == known
    if known:
        penalised = text.replace("Dense(1)", "Dense(1, kernel_regularizer='l2')")
        own = text.replace(
            "def load", "class Own(keras.Sequential):\n    def train_step(self, data):\n        pass\ndef load"
        )
        for other in (penalised, own.replace("model = keras.Sequential", "model = Own")):
            (tmp_path / "train.py").write_text(other)
            assert load_objective("train.py", tmp_path).only_loss is None
