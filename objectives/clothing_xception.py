"""Transfer learning on photos of clothes: Xception without its top, frozen, and one dense layer.

The photos lie in a folder of train/, validation/ and test/, each with a folder of .jpg files per
class.  The study file names it as `folder`, or the environment variable CLOTHING_PHOTOS does.
"""

import os
from pathlib import Path

import keras
import numpy as np

SIDE = 150


def load_data(folder=None):
    """Return (x_train, y_train), (x_validation, y_validation), (x_test, y_test).

    Photos have shape (n, 150, 150, 3) and values 0 to 255; y is one-hot over the classes.
    """
    folder = Path(folder or os.environ.get("CLOTHING_PHOTOS") or "clothing")
    if not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"no photos in {folder.absolute()}: name a folder of train/, validation/ and test/ as "
            "objective.kwargs.folder in the study file, or in the environment variable CLOTHING_PHOTOS"
        )
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    return tuple(photos(folder / part, classes) for part in ("train", "validation", "test"))


def photos(folder, classes):
    """Return the photos of a folder and their classes, one-hot."""
    paths = [(path, number) for number, name in enumerate(classes) for path in sorted((folder / name).glob("*.jpg"))]
    images = [keras.utils.img_to_array(keras.utils.load_img(path, target_size=(SIDE, SIDE))) for path, _ in paths]
    targets = keras.utils.to_categorical([number for _, number in paths], len(classes))
    return np.stack(images).astype("uint8"), targets


def build_model(weights="imagenet", classes=10):
    """Return Xception's body, frozen, and a dense layer that gives logits; weights may be "random"."""
    body = keras.applications.Xception(
        weights=None if weights == "random" else weights, include_top=False, input_shape=(SIDE, SIDE, 3)
    )
    body.trainable = False
    inputs = keras.Input(shape=(SIDE, SIDE, 3))
    features = body(keras.applications.xception.preprocess_input(inputs), training=False)
    outputs = keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(features))
    model = keras.Model(inputs, outputs)
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
