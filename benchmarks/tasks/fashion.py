"""Fashion-MNIST: a ConvNet on 12,000 of its images, read by Keras's own loader."""

import keras


def load_data():
    """Return images, shape (12000, 28, 28, 1), and classes."""
    (x, y), _ = keras.datasets.fashion_mnist.load_data()
    return (x[:12000] / 255.0).astype("float32")[..., None], y[:12000].astype("int32")


def build_model():
    """Return two convolutions, each with pooling, and two dense layers."""
    layers = [
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential([keras.Input((28, 28, 1)), *layers])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
