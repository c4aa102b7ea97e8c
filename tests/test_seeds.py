"""Seeds: what is drawn depends on them alone, and graphs are prepared once."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python import pywrap_tfe

from pipeline.training import engine as engine_module
from pipeline.training import seeds
from pipeline.training.engine import Engine
from pipeline.training.splits import Split
from tests.test_engine import BATCH, LABELS, SPLIT, X, dense, make_data


@pytest.fixture
def cleared(monkeypatch):
    """The number of times that TensorFlow threw its prepared operations away, in a process that has just begun."""
    count: list[object] = []
    clear = pywrap_tfe.TFE_ContextClearCaches
    monkeypatch.setattr(pywrap_tfe, "TFE_ContextClearCaches", lambda handle: (count.append(handle), clear(handle)))
    monkeypatch.setattr(seeds, "_drawn", [])
    from tensorflow.python.framework import random_seed

    monkeypatch.setattr(random_seed, "get_seed", random_seed.get_seed)
    return count


def train(engine: Engine, numbers: range) -> list[np.ndarray]:
    """Return the losses of a step-wise epoch for each of many seeds."""
    rates = np.full(SPLIT.steps_per_epoch(BATCH), 0.01)
    splits = [Split(SPLIT.train, SPLIT.validation, number) for number in numbers]
    return [engine.start("adam", split).epoch(rates).losses for split in splits]


def test_a_new_seed_prepares_no_graph_anew(cleared):
    """Where only Keras's own random operations are used; the numbers are those of an engine that clears always."""
    engine = Engine(dense, make_data("test", X, LABELS), batch_size=BATCH)
    began = len(cleared)
    assert began
    kept = train(engine, range(5))
    assert len(cleared) == began
    seeds._drawn[0] = True
    always = Engine(dense, make_data("test", X, LABELS), batch_size=BATCH)
    for one, other in zip(kept, train(always, range(5)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(cleared) >= began + 5


def remembering() -> keras.Model:
    """A model whose weights come from operations of TensorFlow that remember how much they have drawn."""

    def initial(shape, dtype=None):
        return tf.random.normal(shape, stddev=0.1) + tf.random.uniform(shape, -0.1, 0.1, seed=3)

    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, kernel_initializer=initial)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_operations_that_remember_begin_anew_with_every_seed(cleared, monkeypatch):
    """A seed leads to the same weights whenever they are drawn, as in a process that begins with it."""
    monkeypatch.setattr(engine_module, "SNAPSHOT_BYTES", 0)  # every seed is drawn again
    engine = Engine(remembering, make_data("test", X, LABELS), batch_size=BATCH)
    losses = [run[0] for run in train(engine, range(3)) + train(engine, range(3))]
    assert losses[:3] == losses[3:] and len(set(losses)) == 3
    assert len(cleared) > 3
