"""A small convolutional network on MNIST, by which range tests are often taught."""

import keras
from keras.datasets import mnist


def load_data():
    """Return (x_train, y_train), (x_test, y_test): pixels in [0, 1], shape (n, 28, 28, 1), and digits 0 to 9."""
    (x_train, y_train), (x_test, y_test) = mnist.load_data()
    return (scaled(x_train), y_train), (scaled(x_test), y_test)


def scaled(images):
    """Return images as floats in [0, 1] with a channel."""
    return (images / 255.0).astype("float32")[..., None]


def build_model():
    """Return two convolutions and two dense layers; it gives logits."""
    model = keras.Sequential(
        [
            keras.Input(shape=(28, 28, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model
