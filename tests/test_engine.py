"""The engine: equal to `model.fit` on every kind of model, reset between runs, stopped where it diverges."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from objectives import quadratic
from pipeline.errors import ObjectiveError
from pipeline.training.data import Data, make_data
from pipeline.training.divergence import TRIAL_RULE, first_divergence
from pipeline.training.engine import Engine
from pipeline.training.optimizers import OPTIMIZERS, build_optimizer
from pipeline.training.sources import shuffle
from pipeline.training.splits import Split

RNG = np.random.default_rng(0)
X = RNG.standard_normal((150, 6)).astype("float32")
LABELS = np.argmax(X[:, :3], axis=1)
TARGET = (X @ RNG.standard_normal(6)).astype("float32")[:, None]
TRAIN, HELD = np.arange(110, dtype=np.int32), np.arange(110, 150, dtype=np.int32)
SPLIT = Split(TRAIN, HELD, 11)
BATCH = 16


def dense() -> keras.Model:
    """A plain classifier with two metrics."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")])
    return model


def random_layers() -> keras.Model:
    """Dropout, noise and batch statistics."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.Dropout(0.3),
            layers.GaussianNoise(0.1),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def regularized() -> keras.Model:
    """Weight and activity penalties, and a frozen layer."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(1e-3)),
            layers.Dense(8, trainable=False),
            layers.Dense(1),
        ]
    )
    model.compile(loss="mse", metrics=["mae"])
    return model


def two_heads() -> keras.Model:
    """Two named inputs and two named outputs with loss weights."""
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    hidden = layers.Dense(8, activation="tanh")(layers.Concatenate()([a, b]))
    outputs = {"kind": layers.Dense(3, name="kind")(hidden), "size": layers.Dense(1, name="size")(hidden)}
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile(
        loss={"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
    )
    return model


def sequence() -> keras.Model:
    """Embedding, LSTM and 1D convolution on integer tokens."""
    model = keras.Sequential(
        [keras.Input((6,)), layers.Embedding(20, 4), layers.Conv1D(4, 3), layers.LSTM(5), layers.Dense(1)]
    )
    model.compile(loss="mse")
    return model


class OwnStep(keras.Model):
    """A subclassed model with its own train_step, test_step and loss tracker, built only when called."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(8, activation="tanh")
        self.out = layers.Dense(1)
        self.tracker = keras.metrics.Mean(name="loss")
        self.mae = keras.metrics.MeanAbsoluteError(name="mae")

    def call(self, x):
        return self.out(self.hidden(x))

    @property
    def metrics(self):
        return [self.tracker, self.mae]

    def _results(self, y, prediction, loss):
        self.tracker.update_state(loss)
        self.mae.update_state(y, prediction)
        return {m.name: m.result() for m in self.metrics}

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            prediction = self(x, training=True)
            loss = ops.mean(ops.square(y - prediction))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self._results(y, prediction, loss)

    def test_step(self, data):
        x, y = data
        prediction = self(x, training=False)
        return self._results(y, prediction, ops.mean(ops.square(y - prediction)))


def own_step() -> keras.Model:
    """The subclassed model, compiled."""
    model = OwnStep()
    model.compile()
    return model


class OwnLoss(keras.Model):
    """A functional model that overrides compute_loss."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.abs(y - y_pred)) + 0.01 * ops.mean(ops.square(y_pred))


def own_loss() -> keras.Model:
    """The model with its own loss, compiled."""
    inputs = keras.Input((6,))
    model = OwnLoss(inputs, layers.Dense(1)(inputs))
    model.compile()
    return model


TOKENS = RNG.integers(0, 20, (150, 6))
WEIGHTS = RNG.uniform(0.1, 2.0, 150).astype("float32")
TWO = ({"a": X[:, :4], "b": X[:, 4:]}, {"kind": LABELS, "size": TARGET})

CASES = {
    "dense": (dense, (X, LABELS)),
    "weighted samples": (dense, (X, LABELS, WEIGHTS)),
    "dropout and batch normalization": (random_layers, (X, LABELS)),
    "regularizers and a frozen layer": (regularized, (X, TARGET)),
    "two inputs and two outputs": (two_heads, TWO),
    "embedding, convolution and LSTM": (sequence, (TOKENS, TARGET)),
    "own train_step": (own_step, (X, TARGET)),
    "own compute_loss": (own_loss, (X, TARGET)),
}


class BatchLosses(keras.callbacks.Callback):
    """Recovers each batch's own loss from the running mean that Keras reports."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes, self.means = sizes, []

    def on_train_batch_end(self, batch, logs=None):
        self.means.append(logs["loss"])

    def losses(self) -> np.ndarray:
        """Return the loss of each batch."""
        seen = np.cumsum(self.sizes[: len(self.means)])
        return np.diff(np.array(self.means) * seen, prepend=0.0) / self.sizes[: len(self.means)]


def taken(tree, index):
    """Index every array of a tree; strings as the tensors that `model.fit` wants them."""
    if isinstance(tree, dict):
        return {k: taken(v, index) for k, v in tree.items()}
    if hasattr(tree, "iloc"):
        return tree.iloc[index]
    return keras.ops.convert_to_tensor(tree[index]) if tree.dtype.kind == "U" else tree[index]


def assert_equals_fit(build, parts, optimizer, *, tolerance: float = 1e-4) -> Engine:
    """Train two epochs with the engine and with `model.fit`; compare losses, metrics and weights.

    Same weights, order and seeds; 110 training samples in batches of 16 end in a partial batch of 14.
    """
    engine = Engine(build, make_data("test", *parts), batch_size=BATCH)
    run = engine.start(optimizer, SPLIT)
    rates = np.full(SPLIT.steps_per_epoch(BATCH), 0.01)
    ours = [run.epoch(rates) for _ in range(2)]

    keras.utils.set_random_seed(SPLIT.seed)
    model = build()
    model.optimizer = build_optimizer(optimizer, 0.01)
    if model.dtype_policy.name == "mixed_float16":
        model.optimizer = keras.optimizers.LossScaleOptimizer(model.optimizer)
    if isinstance(model.optimizer, keras.optimizers.ScheduleFreeAdamW):
        # Built inside `fit`'s graph, its averages would start at zero instead of at the weights.
        model.optimizer.build(model.trainable_variables)
    model.optimizer.finalize_variable_values = lambda *_: None  # `fit` would end each epoch as if it were the last
    own_tracker = isinstance(model, OwnStep)  # its mean over batches is not weighted by their size
    for epoch, result in enumerate(ours):
        order = shuffle(SPLIT, epoch)
        record = BatchLosses([min(BATCH, len(order) - i) for i in range(0, len(order), BATCH)])
        history = model.fit(
            *[taken(p, order) for p in parts[:2]],
            sample_weight=taken(parts[2], order) if len(parts) > 2 else None,
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            callbacks=[record],
            validation_data=tuple(taken(p, HELD) for p in parts),
        ).history
        if own_tracker:
            history.pop("loss")
        else:
            np.testing.assert_allclose(result.losses, record.losses(), rtol=2 * tolerance, atol=tolerance / 10)
            assert result.metrics.keys() == history.keys()
        for name, values in history.items():
            assert result.metrics[name] == pytest.approx(values[0], rel=tolerance, abs=tolerance / 100), name
    for theirs, mine in zip(model.get_weights(), engine.trained_model(SPLIT).get_weights(), strict=True):
        if theirs.dtype.kind == "f":
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance / 100)
    return engine


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["adam", "nesterov"])
def test_the_engine_equals_model_fit(case, optimizer):
    """Every kind of model, under an adaptive optimizer and one with momentum."""
    assert_equals_fit(*CASES[case], optimizer)


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - {"adam", "nesterov"}))
def test_every_optimizer_trains_as_under_model_fit(optimizer):
    """Also those whose slots begin as copies of the weights, under another seed than they were built with."""
    engine = assert_equals_fit(random_layers, (X, LABELS), optimizer, tolerance=1e-3)
    rates = np.full(SPLIT.steps_per_epoch(BATCH), 0.01)
    other = Split(TRAIN, HELD, SPLIT.seed + 1)
    first = engine.start(optimizer, other).epoch(rates).losses
    engine.start(optimizer, SPLIT).epoch(rates)
    np.testing.assert_array_equal(engine.start(optimizer, other).epoch(rates).losses, first)


@pytest.mark.parametrize("case", CASES)
def test_a_run_starts_anew_whatever_ran_before(case):
    """After another optimizer at another rate, and after a divergence, a run repeats to the last bit."""
    build, parts = CASES[case]
    engine = Engine(build, make_data("test", *parts), batch_size=BATCH)
    rates = np.full(SPLIT.steps_per_epoch(BATCH), 0.01)

    def losses() -> np.ndarray:
        run = engine.start("adam", SPLIT)
        return np.concatenate([run.epoch(rates).losses for _ in range(2)])

    first = losses()
    engine.start("momentum", SPLIT).epoch(rates * 10)
    engine.start("sgd", SPLIT).epoch(rates * 1e20, TRIAL_RULE)
    np.testing.assert_array_equal(losses(), first)


@pytest.mark.parametrize(
    ("optimizer", "build"), [*((name, dense) for name in sorted(OPTIMIZERS)), ("adam", random_layers)]
)
def test_xla_gives_the_same_training_as_the_plain_graph(optimizer, build):
    """Losses, metrics, dropped units and the partial batch agree within float tolerance."""
    results = []
    for xla in (False, True):
        engine = Engine(build, make_data("test", X, LABELS), batch_size=BATCH)
        engine.xla = xla
        run = engine.start(optimizer, SPLIT)
        results.append([run.epoch(np.full(7, 0.01)) for _ in range(2)])
    for plain, compiled in zip(*results, strict=True):
        assert len(compiled.losses) == 7
        tolerance = 3e-2 if optimizer == "lion" else 1e-3  # it follows signs, which rounding can turn
        np.testing.assert_allclose(compiled.losses, plain.losses, rtol=tolerance)
        assert compiled.metrics == pytest.approx(plain.metrics, rel=2 * tolerance)


def test_the_learning_rate_is_the_tables_at_every_step():
    """Gradient descent at a table of rates moves the weights as the update rule says."""
    x, y = np.ones((8, 1), "float32"), np.zeros((8, 1), "float32")

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False, kernel_initializer="ones")])
        model.compile(loss="mse")
        return model

    split = Split(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32), 0)
    engine = Engine(build, make_data("test", x, y), batch_size=2)
    engine.start("sgd", split).epoch([0.1, 0.2, 0.0, 0.4])
    # the gradient of w^2 is 2 w
    assert engine.model.get_weights()[0].item() == pytest.approx((1 - 0.2) * (1 - 0.4) * 1.0 * (1 - 0.8), rel=1e-5)


def quadratic_engine() -> Engine:
    """An engine on the quadratic, whose stability limit is known."""
    (x, y), _ = quadratic.load_data()
    return Engine(quadratic.build_model, make_data("quadratic", x, y), batch_size=32)


WIDE = Split(np.arange(400, dtype=np.int32), np.arange(400, 512, dtype=np.int32), 5)


@pytest.mark.parametrize(("factor", "diverges"), [(0.5, False), (0.95, False), (1.05, True), (2.0, True)])
def test_the_quadratic_diverges_exactly_above_its_stability_limit(factor, diverges):
    """Gradient descent above 2 / lambda_max is stopped as diverged, below it is not."""
    run = quadratic_engine().start("sgd", WIDE)
    rates = np.full(WIDE.steps_per_epoch(32), factor * quadratic.STABILITY_LIMIT)
    results = [run.epoch(rates, TRIAL_RULE) for _ in range(6)]
    assert any(r.diverged_step is not None for r in results) == diverges


@pytest.mark.parametrize("rate", [0.25, 0.5, 3.0, 1e12, 1e30])
def test_the_compiled_loop_applies_the_divergence_rule(rate):
    """The loop stops at the step and for the reason that the plain rule gives on the same losses."""
    engine = quadratic_engine()
    free = engine.start("sgd", WIDE)
    table = np.full(60, rate)
    losses = free.steps(table).losses
    from pipeline.training.divergence import ceiling

    expected = first_divergence(losses, ceiling(free.initial_losses, TRIAL_RULE), TRIAL_RULE.from_step)
    stopped = engine.start("sgd", WIDE).steps(table, TRIAL_RULE)
    assert expected is not None
    assert (stopped.diverged_step, stopped.reason) == expected
    assert len(stopped.losses) == expected[0] + 1


def test_divergence_is_seen_across_epochs_of_one_step():
    """Full-batch training has one step per epoch; the last losses carry over."""
    (x, y), _ = quadratic.load_data()
    engine = Engine(quadratic.build_model, make_data("quadratic", x, y), batch_size=512)
    run = engine.start("sgd", Split(np.arange(500, dtype=np.int32), np.arange(500, 512, dtype=np.int32), 1))
    reasons = [run.epoch([0.4], TRIAL_RULE).reason for _ in range(14)]
    assert "loss blew up" in reasons


def test_folds_of_different_size_share_one_trace(classification: Data):
    """K-fold parts differ by a sample; nothing is traced again for it."""
    engine = Engine(dense, classification, batch_size=BATCH)
    for size in (110, 111, 112):
        split = Split(np.arange(size, dtype=np.int32), np.arange(size, 150, dtype=np.int32), size)
        engine.start("adam", split).epoch(np.full(split.steps_per_epoch(BATCH), 0.01))
    assert engine._program("adam", engine.batch_size).epoch.forms[0][1].experimental_get_tracing_count() == 1


def test_seeds_give_different_weights_and_the_same_seed_the_same(classification: Data):
    """Initial weights are a function of the split's seed."""
    engine = Engine(dense, classification, batch_size=BATCH)
    kernels = []
    for seed in (1, 2, 1):
        engine.start("sgd", Split(TRAIN, HELD, seed))
        kernels.append(engine.model.get_weights()[0])
    np.testing.assert_array_equal(kernels[0], kernels[2])
    assert not np.array_equal(kernels[0], kernels[1])


def test_a_train_step_without_a_loss_is_refused():
    """The message names what came back and what is needed."""

    class NoLoss(OwnStep):
        def train_step(self, data):
            return {"score": ops.mean(self(data[0]))}

    def build() -> keras.Model:
        model = NoLoss()
        model.compile()
        return model

    with pytest.raises(ObjectiveError, match=r"must return a dict with 'loss', got score"):
        Engine(build, make_data("test", X, TARGET), batch_size=BATCH)


@pytest.mark.parametrize("xla", [False, True])
def test_a_run_with_its_own_batch_size_trains_as_an_engine_of_that_size(xla):
    """The sizes share samples and initial weights, and do not disturb one another."""
    data = make_data("test", X, LABELS)
    engine, alone = Engine(dense, data, batch_size=16), Engine(dense, data, batch_size=40)
    engine.xla = alone.xla = xla
    rates = np.full(SPLIT.steps_per_epoch(40), 0.01)
    expected = alone.start("adam", SPLIT).epoch(rates)
    usual = np.full(SPLIT.steps_per_epoch(16), 0.01)
    before = engine.start("adam", SPLIT).epoch(usual)
    run = engine.start("adam", SPLIT, 40)
    result = run.epoch(rates)
    np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-5)
    assert result.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert engine.start("adam", SPLIT).epoch(usual).metrics == before.metrics


def test_an_optimizer_that_xla_makes_slow_stays_in_the_plain_graph(monkeypatch):
    """Only the one whose compiled epoch is slower than its plain one; its training is the same."""
    engine = Engine(dense, make_data("test", X, LABELS), batch_size=BATCH)
    assert engine.leave_plain(["sgd", "adam"], SPLIT) == ""
    engine.xla = True
    measured, adam = engine._seconds, engine._program("adam", BATCH)

    def slow_adam(epoch, program, split, steps):
        seconds = measured(epoch, program, split, steps)
        return 1000.0 if epoch is adam.compiled_epoch else min(seconds, 1.0)

    monkeypatch.setattr(engine, "_seconds", slow_adam)
    said = engine.leave_plain(["sgd", "adam"], SPLIT)
    assert engine.plain == {"adam"}
    assert said.startswith("adam in the plain graph")
    monkeypatch.undo()
    reference = Engine(dense, make_data("test", X, LABELS), batch_size=BATCH)
    rates = np.full(7, 0.01)
    np.testing.assert_array_equal(
        engine.start("adam", SPLIT).epoch(rates).losses, reference.start("adam", SPLIT).epoch(rates).losses
    )


def test_another_thread_that_draws_random_numbers_changes_no_weight(classification):
    """The workers of a cluster have such threads; Keras draws its seeds from Python's global generator."""
    import random
    import sys
    import threading

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((6,))])
        for _ in range(30):
            model.add(layers.Dense(4))
        model.add(layers.Dense(3))
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    quiet = Engine(build, classification, batch_size=BATCH, seed=3)
    expected = [v.numpy() for v in quiet.model.variables]
    ended = threading.Event()

    def draw() -> None:
        while not ended.is_set():
            random.random()

    thread, interval = threading.Thread(target=draw), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(5):
            found = Engine(build, classification, batch_size=BATCH, seed=3)
            for one, other in zip(expected, found.model.variables, strict=True):
                np.testing.assert_array_equal(one, other.numpy())
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
