"""Side effects in a clinical trial by age: made data, one feature, a network of three layers.

The people are drawn at random: ages 13 to 100, half of them under 65.  Of the younger, one in
twenty has side effects; of the older, all but one in twenty.
"""

import keras
import numpy as np

PEOPLE = 2100
OLD = 65


def load_data():
    """Return ages scaled to [0, 1], shape (2100, 1), and whether there were side effects, 0 or 1."""
    random = np.random.default_rng(0)
    old = np.arange(PEOPLE) % 2
    ages = np.where(old, random.integers(OLD, 101, PEOPLE), random.integers(13, OLD, PEOPLE))
    effects = np.where(random.uniform(size=PEOPLE) < 0.05, 1 - old, old)
    return ((ages - 13) / 87).astype("float32")[:, None], effects


def build_model():
    """Return a dense network with a weight penalty on its middle layer; it gives probabilities."""
    model = keras.Sequential(
        [
            keras.Input(shape=(1,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(32, activation="relu", kernel_regularizer=keras.regularizers.L2(0.01)),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
