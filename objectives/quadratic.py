"""A noisy quadratic whose stability limit is known: gradient descent diverges exactly above 2 / LARGEST_CURVATURE.

The weights w are pulled to zero by the loss (c_1 w_1^2 + ... + c_n w_n^2) / 2.  Each sample adds
a small random slope, so that mini-batch gradients are noisy as in real training; the curvature,
and with it the limit, is the same for every batch.
"""

import keras
import numpy as np
from keras import ops

CURVATURES = (10.0, 5.0, 1.0, 0.3, 0.1)
LARGEST_CURVATURE = max(CURVATURES)
STABILITY_LIMIT = 2.0 / LARGEST_CURVATURE
NOISE = 0.02


class Valley(keras.layers.Layer):
    """Return the height of the quadratic at its own weights, tilted by each sample's slope."""

    def build(self, input_shape):
        self.position = self.add_weight(shape=(len(CURVATURES),), initializer="ones", name="position")

    def call(self, slopes):
        height = 0.5 * ops.sum(ops.array(CURVATURES, dtype="float32") * ops.square(self.position))
        return height + ops.sum(slopes * self.position, axis=-1, keepdims=True)


def load_data():
    """Return (slopes, zeros) for training and test; x has shape (n, 5), y is not used by the loss."""
    rng = np.random.default_rng(0)
    slopes = NOISE * rng.standard_normal((640, len(CURVATURES))).astype("float32")
    nothing = np.zeros((640, 1), "float32")
    return (slopes[:512], nothing[:512]), (slopes[512:], nothing[512:])


def height(y_true, y_pred):
    """Loss: the output itself."""
    return y_pred[:, 0]


def build_model():
    """Return a model whose loss is the quadratic."""
    model = keras.Sequential([keras.Input(shape=(len(CURVATURES),)), Valley()])
    model.compile(loss=height)
    return model
