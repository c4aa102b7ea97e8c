"""A dense network with dropout on Fashion-MNIST."""

import keras
from keras.datasets import fashion_mnist


def load_data():
    """Return (x_train, y_train), (x_test, y_test): pixels in [0, 1], shape (n, 28, 28), and classes 0 to 9."""
    (x_train, y_train), (x_test, y_test) = fashion_mnist.load_data()
    return ((x_train / 255.0).astype("float32"), y_train), ((x_test / 255.0).astype("float32"), y_test)


def build_model(units=512, dropout=0.2):
    """Return one hidden layer with dropout; it gives probabilities."""
    model = keras.Sequential(
        [
            keras.Input(shape=(28, 28)),
            keras.layers.Flatten(),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
