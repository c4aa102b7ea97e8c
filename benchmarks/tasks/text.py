"""Text: bags of word numbers whose topic an averaged embedding tells."""

import keras
import numpy as np


def load_data():
    """Return word numbers, shape (1200, 30), and the index of one of four topics."""
    rng = np.random.default_rng(0)
    words = rng.dirichlet(np.full(1000, 0.05), 4)
    common = rng.dirichlet(np.full(1000, 0.5))
    topic = rng.integers(0, 4, 1200)
    x = np.stack([rng.choice(1000, 30, p=0.15 * words[t] + 0.85 * common) for t in topic])
    return x.astype("int32"), topic


def build_model():
    """Return an embedding, its average over the words, and a dense head."""
    layers = [keras.layers.Embedding(1000, 16), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(16, "relu")]
    model = keras.Sequential([keras.Input((30,), dtype="int32"), *layers, keras.layers.Dense(4)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
