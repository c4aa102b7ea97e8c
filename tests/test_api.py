"""The Python interface: what notebooks call, with the defaults of the commands."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import KnownError
from tests.conftest import ROOT


@pytest.fixture
def samples() -> tuple[np.ndarray, np.ndarray]:
    """200 samples of 4 features in 2 classes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4)).astype("float32")
    return x, (x[:, 0] + x[:, 1] > 0).astype("int64")


def build_model():
    """Return a small classifier, compiled."""
    import keras

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(0.003), loss=loss, metrics=["accuracy"])
    return model


def test_a_range_test_leaves_the_model_as_it_was(samples):
    """Weights, moving averages, optimizer and compiled metrics stay; the model goes on training."""
    from pipeline import range_test

    x, y = samples
    model = build_model()
    model.fit(x, y, epochs=2, verbose=0)
    before, optimizer = [v.numpy() for v in model.variables], model.optimizer
    slots = [v.numpy() for v in optimizer.variables]
    state = np.random.get_state()[1].copy()
    found = range_test(model, x, y, optimizers=["sgd", "adam"], steps=30)
    assert model.optimizer is optimizer
    assert (np.random.get_state()[1] == state).all()
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())
    for value, variable in zip(slots, optimizer.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())
    assert list(found.suggested) == ["sgd", "adam"]
    assert (found.bounds["low"] < found.bounds["high"]).all()
    assert found["adam"].low <= found.suggested["adam"] <= found["adam"].high
    assert "adam" in repr(found)
    assert found._repr_html_().count("<tr>") == 3
    assert len(found.figure().data) > 4
    losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0] * 1.05
    assert float(np.array(model.optimizer.learning_rate)) == pytest.approx(0.003)


def test_a_range_test_says_what_is_wrong(samples):
    """An unknown optimizer is named, with the nearest one."""
    from pipeline import range_test

    with pytest.raises(KnownError, match="did you mean 'adam'"):
        range_test(build_model(), *samples, optimizers=["adm"])


def test_a_study_from_python_is_one_of_the_commands(samples, tmp_path, lrtune):
    """Its answer, frames and figures are there; it resumes; the commands read it; fit saves a model."""
    import keras

    from pipeline import trials, tune

    keys = {"trials": 6, "epochs": 3, "search": {"optimizers": ["sgd", "adam"]}, "validation": {"folds": 2}}
    confirm = {"finalists": 1, "repeats": 2}
    tuned = tune(build_model, samples, name="mine", folder=tmp_path, progress=False, confirm=confirm, **keys)
    assert len(tuned.trials) == 6
    assert tuned.best["optimizer"] in ("sgd", "adam")
    assert tuned.report.exists()
    assert "import keras" in tuned.code
    assert "Train with" in repr(tuned)
    assert "Train with" in tuned._repr_html_()
    for name in ("landscape", "range tests", "curves", "history"):
        assert len(tuned.figure(name).data) >= 1
    with pytest.raises(KnownError, match="must be one of landscape"):
        tuned.figure("x")
    keys["trials"] = 7
    more = tune(build_model, samples, name="mine", folder=tmp_path, progress=False, confirm=confirm, **keys)
    assert more.trials["value"].tolist()[:6] == tuned.trials["value"].tolist()
    assert len(trials(tmp_path / "mine.toml")) == 7
    assert "7 of 7 trials" in lrtune("status", tmp_path / "mine.toml").stdout
    fitted = more.fit()
    assert keras.models.load_model(fitted.path).predict(samples[0][:3], verbose=0).shape == (3, 2)
    assert fitted.test["accuracy"] > 0.4


def test_a_study_from_python_refuses_wrong_keys(samples, tmp_path):
    """The message names the key, and nothing is left behind."""
    from pipeline import tune

    with pytest.raises(KnownError, match=r"tune: trails: is not a key.*did you mean 'trials'"):
        tune(build_model, samples, folder=tmp_path, trails=3)
    with pytest.raises(KnownError, match="without folders"):
        tune(build_model, samples, name="../x", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_finder_finds_and_puts_everything_back(samples):
    """Inside an ordinary fit; batch losses, not running means; weights and rate as before."""
    from pipeline import LearningRateFinder

    x, y = samples
    model = build_model()
    before = [v.numpy() for v in model.variables]
    finder = LearningRateFinder(steps=40)
    with pytest.raises(KnownError, match="nothing to show before"):
        finder.result  # noqa: B018
    model.fit(x, y, batch_size=20, epochs=100, verbose=0, callbacks=[finder])
    assert 10 < len(finder.losses) <= 40
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())
    assert float(np.array(model.optimizer.learning_rate)) == pytest.approx(0.003)
    assert int(np.array(model.optimizer.iterations)) == 0
    assert finder.result.low <= finder.suggested <= finder.result.high
    assert len(finder.figure().data) == 2
    assert "adam" in repr(finder)
    # The first losses are those of single batches at rates too small to learn.
    assert np.std(finder.losses[:10]) > 0.01


def test_the_finder_stops_by_the_rule_of_all_range_tests(samples):
    """A flat negative loss is not one that blew up."""
    import keras

    from pipeline import LearningRateFinder

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss=lambda y, p: 0 * p - 5.0)
    finder = LearningRateFinder(steps=30, high=1e-3)
    model.fit(*samples, batch_size=20, epochs=100, verbose=0, callbacks=[finder])
    assert len(finder.losses) == 30


def unbuilt_model():
    """Return a compiled model of its own class that has no weights before its first batch."""
    import keras
    import tensorflow as tf

    class Towers(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(16, "relu")
            self.norm = keras.layers.BatchNormalization()
            self.out = keras.layers.Dense(2)

        def call(self, inputs, training=False):
            return self.out(self.norm(self.hidden(inputs), training=training))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                predicted = self(x, training=True)
                loss = self.compute_loss(x, y, predicted)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            for metric in self.metrics:
                metric.update_state(loss) if metric.name == "loss" else metric.update_state(y, predicted)
            return {metric.name: metric.result() for metric in self.metrics}

    model = Towers()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(0.003), loss=loss, metrics=["accuracy"])
    return model


def test_a_model_without_weights_yet_is_built_and_otherwise_left_alone(samples):
    """Range test and finder on a model that `fit` would build: afterwards it trains as if they had not run."""
    import keras

    from pipeline import LearningRateFinder, range_test

    x, y = samples

    def losses_after(act):
        keras.utils.set_random_seed(5)
        model = unbuilt_model()
        act(model)
        assert float(np.array(model.optimizer.learning_rate)) == pytest.approx(0.003)
        return model.fit(x, y, epochs=4, shuffle=False, verbose=0).history["loss"]

    finder = LearningRateFinder(steps=40)
    plain = losses_after(lambda model: None)
    tested = losses_after(lambda model: range_test(model, x, y, optimizers=["sgd", "adam"], steps=30))
    found = losses_after(lambda model: model.fit(x, y, batch_size=20, epochs=9, verbose=0, callbacks=[finder]))
    assert 10 < len(finder.losses) <= 40
    assert finder.result.low <= finder.suggested <= finder.result.high
    # Which weights a seed draws depends on when they are made; that they were never trained shows in the loss.
    assert tested[0] == pytest.approx(plain[0], rel=0.5)
    assert found[0] == pytest.approx(plain[0], rel=0.5)
    assert tested[-1] < tested[0]
    assert found[-1] < found[0]


def test_the_finder_names_what_it_cannot_do(samples):
    """A schedule cannot be ramped."""
    import keras

    from pipeline import LearningRateFinder

    model = build_model()
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    model.compile(optimizer=keras.optimizers.SGD(schedule), loss=model.loss)
    with pytest.raises(KnownError, match="plain learning rate"):
        model.fit(*samples, verbose=0, callbacks=[LearningRateFinder()])


def test_importing_it_imports_no_tensorflow():
    """`import pipeline` stays light: the interface loads when it is asked for."""
    import subprocess
    import sys

    code = "import sys, pipeline; assert 'tensorflow' not in sys.modules and 'optuna' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
