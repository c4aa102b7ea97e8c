"""Few samples and many columns: breast cancer measurements, a network with dropout and weight penalties."""

import keras
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler


def load_data():
    """Return standardized measurements, shape (569, 30), and the diagnosis."""
    x, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(x).astype("float32"), y.astype("float32")[:, None]


def build_model():
    """Return a dense network with dropout."""
    penalty = keras.regularizers.L2(1e-3)
    hidden = [keras.layers.Dense(64, "relu", kernel_regularizer=penalty), keras.layers.Dropout(0.4)]
    model = keras.Sequential([keras.Input((30,)), *hidden, *[keras.layers.Dense(32, "relu"), keras.layers.Dense(1)]])
    model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
