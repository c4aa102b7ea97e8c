"""Loss and outputs that do not belong together, and losses that contradict their own metrics; in numbers alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.copies import copies
from pipeline.core.heads import RANGES, Head, contradiction, mismatch

RANDOM = np.random.default_rng(0)
SCORES = RANDOM.normal(size=(32, 3))
PROBABILITIES = np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)
CLASSES = RANDOM.integers(0, 3, 32)
SPARSE, BINARY = "sparsecategoricalcrossentropy", "binarycrossentropy"

FAULTS = {
    "scores for probabilities": (SPARSE, False, "linear", SCORES, CLASSES, "Set from_logits=True"),
    "scores of one unit": (BINARY, False, "linear", SCORES[:, :1], CLASSES > 0, 'activation="sigmoid"'),
    "scores of a model that shows no layers": (BINARY, False, None, SCORES[:, :1], CLASSES > 0, "from_logits=True"),
    "zeros of a layer that begins at zero": (BINARY, False, "linear", 0 * SCORES[:, :1], CLASSES > 0, "from_logits"),
    "probabilities for scores": (SPARSE, True, "softmax", PROBABILITIES, CLASSES, "Remove from_logits=True"),
    "the same, not told by a layer": (SPARSE, True, None, PROBABILITIES, CLASSES, "Remove from_logits=True"),
    "a sigmoid for scores": (BINARY, True, "sigmoid", PROBABILITIES[:, :1], CLASSES > 0, "Remove from_logits=True"),
    "a softmax over one unit": (BINARY, False, "softmax", np.ones((32, 1)), CLASSES > 0, "softmax over one unit"),
    "the same in a regression": ("mse", False, "softmax", np.ones((32, 1)), SCORES, "softmax over one unit"),
    "a sigmoid below its targets": ("mse", False, "sigmoid", PROBABILITIES[:, :1], 100 * SCORES, "from 0 to 1, got"),
    "tanh": ("mae", False, "tanh", PROBABILITIES[:, :1], 5 * SCORES, "from -1 to 1"),
    "relu under negative targets": ("huber", False, "relu", PROBABILITIES[:, :1], -np.abs(SCORES), "from 0 up"),
}

SOUND = {
    "scores": (SPARSE, True, "linear", SCORES, CLASSES),
    "probabilities": (SPARSE, False, "softmax", PROBABILITIES, CLASSES),
    "one sigmoid": (BINARY, False, "sigmoid", PROBABILITIES[:, :1], CLASSES > 0),
    "independent sigmoids of several classes": (SPARSE, False, "sigmoid", PROBABILITIES, CLASSES),
    "a regression": ("mse", False, "linear", SCORES, SCORES),
    "an image between 0 and 1": ("mse", False, "sigmoid", PROBABILITIES, PROBABILITIES),
    "counts under relu": ("mse", False, "relu", PROBABILITIES, CLASSES),
    "a loss of one's own": ("pinball", False, "linear", SCORES, SCORES),
    "outputs that are not finite": (BINARY, False, "linear", SCORES * np.nan, CLASSES),
    "scores that happen to be small": (BINARY, True, None, PROBABILITIES[:, :1] - 0.5, CLASSES > 0),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_meant_is_refused_with_the_change_that_mends_it(case):
    """Every fault of the kind, where the layers show it and where the numbers do."""
    *head, said = FAULTS[case]
    found = mismatch(Head("", *head))
    assert found is not None
    assert found.refused
    assert said in found.text


@pytest.mark.parametrize("case", SOUND)
def test_what_belongs_together_is_left_alone(case):
    """No false alarm."""
    assert mismatch(Head("", *SOUND[case])) is None


def test_what_may_be_meant_is_a_doubt():
    """A few outliers out of reach, negative returns under relu, and scores that Keras finds by itself."""
    targets = np.linspace(0, 1, 100)
    targets[:3] = 1.5
    outliers = mismatch(Head("", "mse", False, "sigmoid", PROBABILITIES, targets))
    returns = mismatch(Head("price", "mse", False, "relu", PROBABILITIES, np.linspace(-1, 10, 100)))
    taken = mismatch(Head("", SPARSE, True, "softmax", PROBABILITIES, CLASSES, warned=True))
    unknown = mismatch(Head("", "mine", False, "sigmoid", PROBABILITIES, 100 * SCORES))
    several = mismatch(Head("", "categoricalcrossentropy", False, "softmax", PROBABILITIES, SCORES > 0))
    one = np.eye(3)[CLASSES]
    assert mismatch(Head("", "categoricalcrossentropy", False, "softmax", PROBABILITIES, one * 0.9 + 0.1 / 3)) is None
    for found in (outliers, returns, taken, unknown, several):
        assert found is not None
        assert not found.refused
    assert "3%" in outliers.text and "output 'price'" in returns.text and "takes the scores behind them" in taken.text


def test_a_range_is_what_its_activation_reaches():
    """Keras's own functions stay inside, at extreme inputs too."""
    import keras

    x = np.linspace(-50, 50, 1001).astype("float32")
    for name, (low, high) in RANGES.items():
        values = np.asarray(keras.activations.get(name)(x[:, None] if name == "softmax" else x))
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6, name


@pytest.mark.parametrize(
    ("name", "loss", "metrics", "said"),
    [
        ("categoricalcrossentropy", -1.9, {}, "never negative"),
        ("mse", 0.25, {"mae": 3.9}, "square of its own mean absolute error"),
        ("meansquarederror", 1.0, {"mean_squared_error": 2.0}, "its own mean squared error is 2"),
        ("sparsecategoricalcrossentropy", 0.05, {"accuracy": 0.5}, "too low for its own accuracy"),
    ],
)
def test_a_loss_that_its_own_metrics_rule_out(name, loss, metrics, said):
    """Inequalities that hold for all predictions."""
    assert said in str(contradiction(name, loss, metrics))


def test_no_prediction_contradicts_itself():
    """Random predictions of every kind satisfy the inequalities."""
    for _ in range(200):
        y, p = RANDOM.normal(size=40), RANDOM.normal(size=40) * RANDOM.uniform(0.1, 5)
        error = {"mae": float(np.abs(y - p).mean()), "mse": float(((y - p) ** 2).mean())}
        assert contradiction("mse", error["mse"], error) is None
        scores = RANDOM.normal(size=(40, 3)) * RANDOM.uniform(0.1, 9)
        share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        labels = RANDOM.integers(0, 3, 40)
        loss = float(-np.log(share[np.arange(40), labels]).mean())
        accuracy = float((scores.argmax(axis=1) == labels).mean())
        assert contradiction("sparsecategoricalcrossentropy", loss, {"accuracy": accuracy}) is None
    assert contradiction("mine", -5.0, {"mae": 1.0}) is None


def test_copies_are_counted_exactly():
    """In dtypes of any size, text, several arrays and long samples; a difference anywhere is one."""
    index = np.arange(20)
    images = RANDOM.normal(size=(20, 30, 40)).astype("float32")
    images[15:] = images[:5]
    assert copies([images], index[:10], index[10:]) == 5
    labels = np.arange(20) % 5
    assert copies([images, labels], index[:10], index[10:]) == 5
    other = labels.copy()
    other[17] = 9
    assert copies([images, other], index[:10], index[10:]) == 4
    rows = np.zeros((6, 3))
    rows[3:] = [[1, 2, 3]] * 3
    assert copies([rows], np.array([0, 3]), np.array([1, 2, 4, 5])) == 2  # empty rows are no copies
    assert copies([np.array(["a", "b", "b\0", "a"])], np.array([0, 1]), np.array([2, 3])) == 2
    for kind in ("bool", "uint8", "int16", "float16", "float64"):
        rows = RANDOM.integers(0, 2, (60, 9)).astype(kind)
        rows = np.unique(rows, axis=0)
        assert copies([rows], np.arange(10), np.arange(10, len(rows))) == 0, kind
