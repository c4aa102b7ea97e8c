"""An autoencoder: digits through a bottleneck of eight numbers, by mean squared error."""

import keras
from sklearn.datasets import load_digits


def load_data():
    """Return images, shape (1797, 64), twice: the target is the input."""
    x = (load_digits().data / 16.0).astype("float32")
    return x, x


def build_model():
    """Return encoder and decoder in one."""
    layers = [keras.layers.Dense(48, "elu"), keras.layers.Dense(8), keras.layers.Dense(48, "elu")]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(64, "sigmoid")])
    model.compile(loss="mse")
    return model
