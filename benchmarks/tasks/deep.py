"""A deep network without normalization on four classes that overlap, which learns late and dies early."""

import keras
from sklearn.datasets import make_classification


def load_data():
    """Return x, shape (1200, 20), and one of four classes."""
    x, y = make_classification(
        1200, 20, n_informative=8, n_redundant=4, n_classes=4, n_clusters_per_class=2, flip_y=0.05, random_state=0
    )
    return x.astype("float32"), y


def build_model():
    """Return eight dense layers."""
    hidden = [keras.layers.Dense(32, "relu") for _ in range(7)]
    model = keras.Sequential([keras.Input((20,)), *hidden, keras.layers.Dense(4)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
