"""Images: a small convolutional network on the 8×8 digits that scikit-learn ships."""

import keras
from sklearn.datasets import load_digits


def load_data():
    """Return images, shape (1797, 8, 8, 1), and digits."""
    x, y = load_digits(return_X_y=True)
    return (x / 16.0).astype("float32").reshape(-1, 8, 8, 1), y


def build_model():
    """Return two convolutions and a dense head."""
    convolutions = [
        keras.layers.Conv2D(16, 3, activation="relu", padding="same"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(32, 3, activation="relu", padding="same"),
        keras.layers.GlobalAveragePooling2D(),
    ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *convolutions, keras.layers.Dense(10)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
