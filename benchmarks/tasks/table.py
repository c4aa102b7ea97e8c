"""Regression on a table: Friedman's first function of five out of thirty columns, with batch normalization."""

import keras
from sklearn.datasets import make_friedman1


def load_data():
    """Return x, shape (700, 30), and standardized targets, shape (700, 1)."""
    x, y = make_friedman1(700, n_features=30, noise=1.0, random_state=0)
    y = (y - y.mean()) / y.std()
    return x.astype("float32"), y.astype("float32")[:, None]


def build_model():
    """Return a dense network with batch normalization."""
    hidden = [keras.layers.Dense(64, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(32, "relu")]
    model = keras.Sequential([keras.Input((30,)), *hidden, keras.layers.Dense(1)])
    model.compile(loss="mse")
    return model
