"""A study proves itself sound before it trains: every kind of fault on models of its own."""

from __future__ import annotations

from types import ModuleType

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from pipeline.errors import NoAnswerError, ObjectiveError
from pipeline.progress import Reporter
from pipeline.search.prepare import prepare
from pipeline.search.soundness import agree, prove
from pipeline.search.study import StudyRunner
from pipeline.study_file import study_of
from pipeline.training.building import Builder
from pipeline.training.engine import Engine
from pipeline.training.parity import Reference, Trained
from pipeline.training.splits import Split

RNG = np.random.default_rng(0)
X = RNG.standard_normal((200, 6)).astype("float32")
TARGET = (X @ RNG.standard_normal(6)).astype("float32")[:, None]
LABELS = (X[:, 0] > 0).astype("int64")
SPLIT = Split(np.arange(150, dtype=np.int32), np.arange(150, 200, dtype=np.int32), 3)


def compiled(model: keras.Model, loss="mse", **keywords) -> keras.Model:
    """Return a model, compiled."""
    model.compile(loss=loss, **keywords)
    return model


def dense(last: layers.Layer | None = None, loss="mse", **keywords) -> keras.Model:
    """A small network."""
    parts = [keras.Input((6,)), layers.Dense(8, activation="relu"), last or layers.Dense(1)]
    return compiled(keras.Sequential(parts), loss, **keywords)


def prepared_of(tmp_path, build_model, data=(X, TARGET), **keys):
    """Return a study of functions that live here, ready to prove itself."""
    module = ModuleType("notebook")
    module.build_model, module.load_data = build_model, lambda: data
    search = {"optimizers": ("sgd", "adam"), **keys.pop("search", {})}
    table = {"objective": "notebook", "epochs": 2, "trials": 4, "validation": {"scheme": "hold-out"}}
    workers = {"count": 1}
    study = study_of(tmp_path / "s.toml", {**table, "search": search, "workers": workers, **keys})
    return prepare(study, Reporter(quiet=True), module)


# -- what is sound ---------------------------------------------------------------------------


class Supervised(keras.Model):
    """A train_step of its own, as Keras's pages write it."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(8, activation="tanh"), layers.Dense(1)

    def call(self, x):
        return self.out(self.hidden(x))

    def gradients(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            prediction = self(x, training=True)
            loss = self.compute_loss(x, y, prediction)
        return loss, prediction, tape.gradient(loss, self.trainable_variables)

    def train_step(self, data):
        loss, prediction, gradients = self.gradients(data)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for metric in self.metrics:
            metric.update_state(loss) if metric.name == "loss" else metric.update_state(data[1], prediction)
        return {m.name: m.result() for m in self.metrics}


class SpectralNorm(Supervised):
    """A layer that moves its own weights in every forward pass."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.SpectralNormalization(layers.Dense(8))


class Teacher(Supervised):
    """Distillation with a teacher that follows the student."""

    def __init__(self):
        super().__init__()
        self.teacher = layers.Dense(1, trainable=False)

    def call(self, x):
        self.teacher(x)
        return super().call(x)

    def train_step(self, data):
        logs = super().train_step(data)
        self.teacher.bias.assign(0.9 * self.teacher.bias + 0.1 * self.out.bias)
        return logs


class Ascends(Supervised):
    """SAM: up to where the loss is higher, and back again, which rounds."""

    def train_step(self, data):
        _, _, up = self.gradients(data)
        norm = tf.linalg.global_norm(up)
        for variable, gradient in zip(self.trainable_variables, up, strict=True):
            variable.assign_add(0.05 * gradient / norm)
        loss, _, gradients = self.gradients(data)
        for variable, gradient in zip(self.trainable_variables, up, strict=True):
            variable.assign_sub(0.05 * gradient / norm)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Accumulates(Supervised):
    """Sums the gradients of five batches by hand."""

    def __init__(self):
        super().__init__()
        self.hidden.build((None, 6)), self.out.build((None, 8))
        self.sums = [tf.Variable(tf.zeros(v.shape), trainable=False) for v in self.trainable_variables]
        self.count = tf.Variable(0, trainable=False)

    def train_step(self, data):
        loss, _, gradients = self.gradients(data)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.assign_add(gradient / 5)
        self.count.assign_add(1)

        def apply():
            pairs = zip([tf.convert_to_tensor(s) for s in self.sums], self.trainable_variables, strict=True)
            self.optimizer.apply_gradients(pairs)
            for total in self.sums:
                total.assign(tf.zeros_like(total))
            self.count.assign(0)
            return 0

        tf.cond(self.count >= 5, apply, lambda: 0)
        return {"loss": loss}


SHARED_METRICS = [keras.metrics.MeanAbsoluteError(name="mae"), keras.metrics.RootMeanSquaredError(name="rmse")]

SOUND = {
    "plain": lambda: dense(),
    "metrics made once": lambda: dense(metrics=SHARED_METRICS),
    "sharpness-aware": lambda: compiled(Ascends()),
    "gradients summed by hand": lambda: compiled(Accumulates()),
    "constraints": lambda: dense(layers.Dense(1, kernel_constraint="max_norm")),
    "own train_step": lambda: compiled(Supervised()),
    "spectral normalization": lambda: compiled(SpectralNorm()),
    "a teacher": lambda: compiled(Teacher()),
    "dropout and batch statistics": lambda: compiled(
        keras.Sequential([keras.Input((6,)), layers.Dropout(0.5), layers.BatchNormalization(), layers.Dense(1)])
    ),
    "mixed precision": lambda: compiled(
        keras.Sequential([keras.Input((6,)), layers.Dense(4, dtype="mixed_float16"), layers.Dense(1, dtype="float32")])
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_models_raise_no_doubt(tmp_path, case):
    """No false alarm, and the engine is found to train as Keras does."""
    proof = prove(prepared_of(tmp_path, SOUND[case]))
    assert proof.doubts == ()
    assert proof.notes == ()


# -- runs are independent --------------------------------------------------------------------


def shared_body():
    """Return a build_model whose first layers were made once."""
    body = keras.Sequential([keras.Input((6,)), layers.Dense(16, "relu"), layers.BatchNormalization()])
    return lambda: compiled(keras.Sequential([keras.Input((6,)), body, layers.Dense(1)])), body


def test_what_models_share_starts_every_run_at_its_first_values():
    """Trained or not by earlier runs, for a new seed too; only what build_model makes is drawn anew."""
    build, body = shared_body()
    first = [v.numpy() for v in body.variables]
    engine = Engine(build, _data(), batch_size=16)
    expected = engine.start("adam", SPLIT).steps(np.full(5, 0.01)).losses
    engine.start("sgd", SPLIT).steps(np.full(20, 0.1))
    assert any(not np.array_equal(a, v.numpy()) for a, v in zip(first, body.variables, strict=True))
    np.testing.assert_array_equal(engine.start("adam", SPLIT).steps(np.full(5, 0.01)).losses, expected)
    other = engine.start("adam", Split(SPLIT.train, SPLIT.validation, 77))
    for value, variable in zip(first, body.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert not np.array_equal(other.steps(np.full(5, 0.01)).losses, expected)
    assert engine.drawn_anew(SPLIT.seed) is None


def test_a_frozen_body_that_models_share_stays_cached():
    """Its outputs are computed once for all seeds."""
    body = keras.Sequential([keras.Input((6,)), layers.Dense(16, "relu")], name="body")
    body.trainable = False
    engine = Engine(
        lambda: compiled(keras.Sequential([keras.Input((6,)), body, layers.Dense(1)])), _data(), batch_size=16
    )
    assert engine.frozen is not None
    for seed in (3, 4, 5):
        engine.start("sgd", Split(SPLIT.train, SPLIT.validation, seed)).steps([0.01])
    assert len(engine._features) == 1


def test_a_model_that_is_returned_twice_starts_over(tmp_path):
    """Every run begins at the weights that it was given with, and it is left with them."""
    model = dense()
    before = model.get_weights()
    prepared = prepared_of(tmp_path, lambda: model)
    assert prove(prepared).doubts == ()
    engine = prepared.engine
    runs = [engine.start("sgd", Split(SPLIT.train, SPLIT.validation, seed)).steps([0.1] * 3).losses for seed in (1, 1)]
    np.testing.assert_array_equal(*runs)
    prepared.objective.build_model.restore()
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_teacher_at_the_top_of_a_program_starts_over():
    """It belongs to no model, and the training step changes it: it is found in the step's graph."""
    teacher = tf.Variable(tf.zeros([1]))

    class Student(Supervised):
        def train_step(self, data):
            logs = super().train_step(data)
            teacher.assign(0.5 * teacher + 0.5 * self.out.bias)
            self.hidden.bias.assign_add(0.01 * teacher[0] * tf.ones([8]))
            return logs

    engine = Engine(lambda: compiled(Student()), _data(), batch_size=16)
    runs = [engine.start("adam", SPLIT).steps(np.full(12, 0.05)).losses for _ in range(2)]
    np.testing.assert_array_equal(*runs)
    assert float(teacher.numpy()[0]) != 0
    run = engine.start("adam", SPLIT)
    assert float(teacher.numpy()[0]) == 0
    rates = np.full(SPLIT.steps_per_epoch(16), 0.05)
    run.epoch(rates)
    state, expected = run.state(), run.epoch(rates).losses
    again = engine.start("adam", SPLIT)
    again.restore(state)
    np.testing.assert_array_equal(again.epoch(rates).losses, expected)


def test_sharing_that_begins_after_training_is_refused():
    """Its first values are not known any more."""
    made: list[keras.layers.Layer] = []

    def build() -> keras.Model:
        made.append(layers.Dense(4))
        layer = made[-1] if len(made) < 6 else made[-2]
        return compiled(keras.Sequential([keras.Input((6,)), layer, layers.Dense(1)]))

    engine = Engine(build, _data(), batch_size=16)
    with pytest.raises(ObjectiveError, match="must return models that do not depend on earlier runs"):
        for seed in range(9):
            engine.start("sgd", Split(SPLIT.train, SPLIT.validation, seed)).steps([0.1])


def test_weights_that_depend_on_what_ran_before_are_refused(tmp_path):
    """A build_model that counts its calls gives other weights under the same seed."""
    calls: list[int] = []

    def build() -> keras.Model:
        calls.append(1)
        return dense(layers.Dense(1, bias_initializer=keras.initializers.Constant(0.1 * len(calls))))

    with pytest.raises(ObjectiveError, match=r"the same initial weights whenever it is called.*bias"):
        prove(prepared_of(tmp_path, build))


def test_randomness_that_keras_does_not_seed_is_said(tmp_path):
    """Then nothing can be compared, and nothing is refused: a note for tf.random, a doubt for what cannot be told."""

    class Noisy(Supervised):
        def call(self, x):
            noise = tf.numpy_function(
                lambda n: np.random.default_rng().normal(size=n).astype("float32"), [8], tf.float32
            )
            return super().call(x) + 0.01 * tf.ensure_shape(noise, [8])[:1]

    (doubt,) = prove(prepared_of(tmp_path, lambda: compiled(Noisy()))).doubts
    assert doubt.startswith("Two runs of the same seed differ")

    class Drawn(Supervised):
        def call(self, x):
            return super().call(x) + 0.1 * tf.random.normal([1])

    (tmp_path / "tf").mkdir()
    proof = prove(prepared_of(tmp_path / "tf", lambda: compiled(Drawn())))
    assert proof.doubts == ()
    assert "since a step draws by tf.random" in proof.notes[0]


# -- the optimizer that trains -----------------------------------------------------------------


class TwoRates(Supervised):
    """Body and head have optimizers of their own; the compiled one is never used."""

    def __init__(self):
        super().__init__()
        self.body_optimizer, self.head_optimizer = keras.optimizers.Adam(1e-4), keras.optimizers.SGD(1e-3)

    def train_step(self, data):
        loss, _, gradients = self.gradients(data)
        both = (self.body_optimizer, gradients[:2], self.hidden), (self.head_optimizer, gradients[2:], self.out)
        for optimizer, own, layer in both:
            optimizer.apply_gradients(zip(own, layer.trainable_variables, strict=True))
        return {"loss": loss}


def one_beside() -> keras.Model:
    """The compiled optimizer trains the head, one that no attribute shows the rest."""
    other = keras.optimizers.RMSprop(1e-3)

    class OneBeside(Supervised):
        def train_step(self, data):
            loss, _, gradients = self.gradients(data)
            other.apply_gradients(zip(gradients[:2], self.hidden.trainable_variables, strict=True))
            self.optimizer.apply_gradients(zip(gradients[2:], self.out.trainable_variables, strict=True))
            return {"loss": loss}

    return OneBeside()


AT_THE_TOP = keras.optimizers.RMSprop(1e-3)


class OneForAll(Supervised):
    """An optimizer made once: Keras binds it to the variables of its first model."""

    def train_step(self, data):
        loss, _, gradients = self.gradients(data)
        AT_THE_TOP.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class ByHand(Supervised):
    """Gradient descent without an optimizer."""

    def train_step(self, data):
        loss, _, gradients = self.gradients(data)
        for variable, gradient in zip(self.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.01 * gradient)
        return {"loss": loss}


class ByHandToo(Supervised):
    """The optimizer, and gradient descent beside it."""

    def train_step(self, data):
        loss, _, gradients = self.gradients(data)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.out.kernel.assign_sub(0.01 * gradients[2])
        return {"loss": loss}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (TwoRates, r"never does; its step uses 'body_optimizer' \(Adam\), 'head_optimizer' \(SGD\)"),
        (OneForAll, "Unknown variable.*let self.optimizer train everything"),
        (one_beside, "only that one is searched; its step uses RMSprop beside it"),
        (ByHand, "got a step that never does. Let train_step call self.optimizer"),
    ],
)
def test_a_step_that_another_optimizer_trains_is_refused(tmp_path, model, said):
    """With the names of those that it uses."""
    with pytest.raises(ObjectiveError, match=said):
        prove(prepared_of(tmp_path, lambda: compiled(model())))


def test_weights_that_move_by_themselves_are_a_doubt(tmp_path):
    """What the step does at rate 0 is not searched."""
    (doubt,) = prove(prepared_of(tmp_path, lambda: compiled(ByHandToo()))).doubts
    assert "moves weights by itself, at a learning rate of 0 too" in doubt and "kernel" in doubt


def test_a_model_without_weights_to_train_is_refused(tmp_path):
    """Everything frozen."""

    def build() -> keras.Model:
        model = dense()
        model.trainable = False
        return compiled(model)

    with pytest.raises(ObjectiveError, match="none that is trainable"):
        prove(prepared_of(tmp_path, build))


# -- the engine and Keras ----------------------------------------------------------------------


def test_an_engine_that_differs_goes_on_in_its_next_slower_way(tmp_path):
    """A batch-dependent loss taken in large batches by mistake: validation falls back, and says so."""
    images = RNG.uniform(size=(200, 6)).astype("float32")
    masks = np.where(np.arange(200)[:, None] % 20, 0, images > 0.8).astype("float32")
    prepared = prepared_of(
        tmp_path, lambda: dense(layers.Dense(6, "sigmoid"), keras.losses.Dice()), (images, masks), batch_size=8
    )
    engine = prepared.engine
    assert "dice" in str(engine.why_batches)
    engine.go_on({"any_batch": True})
    assert engine.source.evaluation_batch > 8
    notes = agree(prepared, Reference(engine, "adam", prepared.splits[0], 1e-3))
    assert len(notes) == 1 and "validation in batches of 8" in notes[0]
    assert engine.source.evaluation_batch == 8


def test_an_engine_that_differs_in_every_way_stops_with_a_request(tmp_path, monkeypatch):
    """Each slower way is tried once; then the message names the difference."""
    prepared, tried = prepared_of(tmp_path, dense), []
    monkeypatch.setattr(Reference, "_by_keras", lambda self, eagerly: _shifted(self._by_engine()))
    slower = prepared.engine.slower
    monkeypatch.setattr(prepared.engine, "slower", lambda **how: tried.append(slower(**how)) or tried[-1])
    with pytest.raises(ObjectiveError, match=r"loss of step 1: .*please report it with the model"):
        agree(prepared, Reference(prepared.engine, "adam", prepared.splits[0], 1e-3))
    assert tried == [
        "validation in batches of 32", "steps traced one by one", "steps that run eagerly", None,
    ]  # fmt: skip


def _shifted(trained: Trained) -> Trained:
    return Trained(trained.losses + 1.0, trained.metrics, trained.begin, trained.weights)


def test_another_engine_goes_on_the_same_way(tmp_path):
    """What was found for a model is what workers and resumed studies do."""
    first, second = (prepared_of(tmp_path, dense).engine for _ in range(2))
    first.slower(validation=False)
    first.slower(validation=False)
    second.go_on(first.way)
    assert second.way == first.way == {"xla": False, "plain": [], "form": 1, "any_batch": False}
    split = Split(SPLIT.train[:100], SPLIT.train[100:140], 3)
    rates = np.full(split.steps_per_epoch(32), 0.01)
    runs = [engine.start("adam", split).epoch(rates) for engine in (first, second)]
    assert runs[0].metrics == runs[1].metrics


# -- the loss ----------------------------------------------------------------------------------


class OfKeras2(Supervised):
    """The metrics of a script for Keras 2, which feed predictions to the tracker of the loss."""

    def train_step(self, data):
        _, prediction, gradients = self.gradients(data)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.compiled_metrics.update_state(data[1], prediction)
        return {m.name: m.result() for m in self.metrics}


class Upwards(Supervised):
    """Gradients of the wrong sign."""

    def train_step(self, data):
        loss, _, gradients = self.gradients(data)
        self.optimizer.apply_gradients((-g, v) for g, v in zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def test_a_loss_that_contradicts_its_metrics_is_the_first_doubt(tmp_path):
    """A mean squared error below the square of the mean absolute one; Keras's warning is shown too."""
    far = TARGET * 3 + 5
    doubts = prove(prepared_of(tmp_path, lambda: compiled(OfKeras2(), metrics=["mae"]), (X, far))).doubts
    assert any("What train_step calls its loss is not the loss of the model" in doubt for doubt in doubts[:2])
    assert any("Keras warns about the training step: `model.compiled_metrics()` is deprecated" in d for d in doubts)


def test_a_loss_that_no_step_lowers_is_the_first_doubt(tmp_path):
    """Ascent instead of descent."""
    assert prove(prepared_of(tmp_path, lambda: compiled(Upwards()))).doubts[0].startswith("The loss does not fall")


def test_three_equal_curves_end_the_study(tmp_path):
    """A step that multiplies its gradients by zero: the optimizer is used and nothing moves."""

    class Nothing(Supervised):
        def train_step(self, data):
            loss, _, gradients = self.gradients(data)
            self.optimizer.apply_gradients((0 * g, v) for g, v in zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    prepared = prepared_of(
        tmp_path, lambda: compiled(Nothing()), search={"learning_rate": {"low": 1e-3, "high": 1e-1}}, trials=8
    )
    with pytest.raises(NoAnswerError, match="the same to the last bit from trials 0, 1, 2"):
        StudyRunner(prepared, Reporter(quiet=True)).run()


# -- loss and outputs, through the model ---------------------------------------------------------


class Hidden(keras.Model):
    """A model of its own class, whose last layer only its graph shows."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def call(self, x):
        return self.last(x)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("last", "loss", "y", "said"),
    [
        ({"units": 1}, "binary_crossentropy", LABELS, "Set from_logits=True"),
        ({"units": 2}, "sparse_categorical_crossentropy", LABELS, "Set from_logits=True"),
        ({"units": 1, "activation": "softmax"}, "binary_crossentropy", LABELS, "softmax over one unit"),
        ({"units": 1, "activation": "sigmoid"}, "mse", 100 * TARGET, "reaches from 0 to 1"),
        ({"units": 1, "activation": "tanh"}, "mae", 100 * TARGET, "reaches from -1 to 1"),
    ],
)
def test_a_loss_that_its_outputs_do_not_fit_is_refused(tmp_path, last, loss, y, said, wrapped):
    """In a plain model and in one of its own class alike."""

    def build() -> keras.Model:
        return compiled(Hidden(layers.Dense(**last)), loss) if wrapped else dense(layers.Dense(**last), loss)

    with pytest.raises(ObjectiveError, match=said):
        prove(prepared_of(tmp_path, build, (X, y)))


def test_probabilities_that_keras_takes_back_are_a_doubt(tmp_path):
    """It finds the scores behind a softmax, warns, and trains rightly."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    doubts = prove(prepared_of(tmp_path, lambda: dense(layers.Dense(2, "softmax"), loss), (X, LABELS))).doubts
    assert "Keras takes the scores behind them" in doubts[0]


def test_one_output_of_several_is_named(tmp_path):
    """A dict of losses, one of which does not fit."""

    def build() -> keras.Model:
        inputs = keras.Input((6,))
        outputs = {"kind": layers.Dense(1, name="kind")(inputs), "size": layers.Dense(1, name="size")(inputs)}
        return compiled(keras.Model(inputs, outputs), {"kind": "binary_crossentropy", "size": "mse"})

    with pytest.raises(ObjectiveError, match="the output 'kind' must hold probabilities"):
        prove(prepared_of(tmp_path, build, (X, {"kind": LABELS, "size": TARGET})))


# -- the data ----------------------------------------------------------------------------------


def masked(y, prediction):
    """A mean squared error over the targets that are there."""
    there = ops.logical_not(ops.isnan(y))
    error = ops.where(there, y, prediction) - prediction
    return ops.sum(ops.square(error), axis=-1) / ops.maximum(ops.sum(ops.cast(there, "float32"), axis=-1), 1)


def test_missing_targets_train_where_the_loss_leaves_them_out(tmp_path):
    """And are refused with their number where it does not, wherever they stand."""
    y = TARGET.copy()
    y[190:] = np.nan
    assert prove(prepared_of(tmp_path, lambda: dense(loss=masked), (X, y))).doubts == ()
    ordered = {"scheme": "time-series", "folds": 2}  # none of them is in the first batch
    with pytest.raises(ObjectiveError, match=r"y has 1 NaN .*and a batch of such samples must have a finite loss"):
        late = TARGET.copy()
        late[20] = np.nan
        prove(prepared_of(tmp_path, dense, (X, late), validation=ordered, batch_size=8))
    with pytest.raises(ObjectiveError, match=r"y has 10 NaN .*first in sample \d+\. Impute or drop"):
        prove(prepared_of(tmp_path, dense, (X, y)))


def test_what_validation_does_not_measure_is_a_doubt(tmp_path):
    """Weights on one side, copies on both, state under shuffled batches, a program that seeds."""
    weights = np.where(LABELS, 5.0, 1.0)
    parts = (X[:120], TARGET[:120], weights[:120]), (X[120:160], TARGET[120:160]), (X[160:], TARGET[160:])
    (doubt,) = prove(prepared_of(tmp_path, dense, parts, validation={})).doubts
    assert doubt.startswith("The training samples have weights and the validation samples have none")
    (reverse,) = prove(prepared_of(tmp_path, dense, (parts[1], parts[0], parts[2]), validation={})).doubts
    assert reverse.startswith("The validation samples have weights")

    twice = np.concatenate([X[:100]] * 2), np.concatenate([TARGET[:100]] * 2)
    (copied,) = prove(prepared_of(tmp_path, dense, twice)).doubts
    assert "stand among the training samples as exact copies" in copied

    def stateful() -> keras.Model:
        inputs = keras.Input(batch_shape=(8, 3, 2))
        return compiled(keras.Model(inputs, layers.Dense(1)(layers.LSTM(4, stateful=True)(inputs))))

    series = X[:160].reshape(160, 3, 2), TARGET[:160]
    prepared = prepared_of(
        tmp_path, stateful, tuple((a[:128], b[:128]) for a, b in [series] * 2), validation={"folds": 2}
    )
    assert prepared.study.config.batch_size == 8
    assert "stateful=True" in prove(prepared).doubts[-1]


def test_a_program_that_seeds_tensorflow_is_told(tmp_path):
    """model.fit then repeats one order of samples; lrtune does not."""

    def build() -> keras.Model:
        keras.utils.set_random_seed(0)
        return dense()

    prepared = prepared_of(tmp_path, build)
    assert prepared.objective.seeded
    assert any("seeds TensorFlow" in doubt for doubt in prove(prepared).doubts)


def test_a_builder_keeps_what_it_is_told_to():
    """Values that are kept come back, others stay."""
    variable, other = tf.Variable(1.0), tf.Variable(1.0)
    builder = Builder(dense)
    builder.keep([variable])
    variable.assign(2.0), other.assign(2.0)
    builder.restore()
    assert (float(variable), float(other)) == (1.0, 2.0)
    builder.keep([variable, other])
    variable.assign(3.0)
    builder.restore(but=frozenset({id(variable)}))
    assert float(variable) == 3.0


def _data():
    from pipeline.training.data import make_data

    return make_data("test", X, TARGET)


@pytest.mark.parametrize("form", ["shuffled", "endless", "weighted"])
def test_datasets_are_compared_with_keras_too(tmp_path, form):
    """Batches of a pipeline, a partial one at the end, shuffles tied to the study's seed."""

    def data():
        parts = (X, TARGET, np.ones(200, "float32")) if form == "weighted" else (X, TARGET)
        train = tf.data.Dataset.from_tensor_slices(tuple(p[:150] for p in parts)).shuffle(150).batch(16)
        return train.repeat() if form == "endless" else train, tf.data.Dataset.from_tensor_slices(
            (X[150:], TARGET[150:])
        ).batch(16)

    keys = {"steps_per_epoch": 9} if form == "endless" else {}
    module = ModuleType("notebook")
    module.build_model, module.load_data = lambda: dense(layers.Dense(1, kernel_regularizer="l2")), data
    study = study_of(
        tmp_path / "s.toml",
        {
            "objective": "notebook",
            "epochs": 2,
            "search": {"optimizers": ("sgd", "adam")},
            "workers": {"count": 1},
            **keys,
        },
    )
    prepared = prepare(study, Reporter(quiet=True), module)
    proof = prove(prepared)
    assert proof.notes == ()
    assert len(proof.doubts) == (form == "weighted")
    found = Reference(prepared.engine, "adam", prepared.splits[0], 1e-3).compare()
    assert found.agrees and found.validation is not None
    assert prepared.splits[0].sizes[1] == 50


class Squeezed(layers.Layer):
    """A layer of one's own behind the last activation."""

    def call(self, x):
        return ops.squeeze(x, -1)


@pytest.mark.parametrize("last", [Squeezed, lambda: layers.Lambda(lambda x: x[:, 0])], ids=["own layer", "lambda"])
def test_an_activation_behind_a_layer_of_ones_own_is_found(tmp_path, last):
    """In the graph of the call, where the layers do not show it."""

    def build() -> keras.Model:
        parts = [keras.Input((6,)), layers.Dense(1, "sigmoid"), last()]
        return compiled(keras.Sequential(parts))

    with pytest.raises(ObjectiveError, match="ends in sigmoid and reaches from 0 to 1"):
        prove(prepared_of(tmp_path, build, (X, 100 * TARGET[:, 0])))


def test_metrics_that_take_scores_for_probabilities_are_a_doubt(tmp_path):
    """With the argument that each of them needs; those that have it are left alone."""
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    wrong = ["accuracy", keras.metrics.AUC(name="auc"), keras.metrics.Precision(name="precision")]
    (doubt,) = prove(prepared_of(tmp_path, lambda: dense(loss=loss, metrics=wrong), (X, LABELS))).doubts
    assert "BinaryAccuracy(threshold=0.0)" in doubt and "AUC(from_logits=True)" in doubt
    assert "Precision(thresholds=0.0)" in doubt
    (tmp_path / "right").mkdir()

    def right() -> keras.Model:
        metrics = [keras.metrics.BinaryAccuracy(threshold=0.0), keras.metrics.AUC(from_logits=True)]
        return dense(loss=loss, metrics=[*metrics, keras.metrics.Recall(thresholds=0.0)])

    assert prove(prepared_of(tmp_path / "right", right, (X, LABELS))).doubts == ()


def test_what_keras_shows_in_place_of_a_steps_own_value_is_a_doubt(tmp_path):
    """A test_step that returns a loss and updates no metric: model.fit shows 0."""

    class Tests(Supervised):
        def test_step(self, data):
            x, y = data
            return {"loss": ops.mean(ops.square(y - self(x)))}

    proof = prove(prepared_of(tmp_path, lambda: compiled(Tests())))
    (doubt,) = proof.doubts
    assert doubt.startswith("In val_loss model.fit shows 0, and test_step returns")


def test_draws_without_a_seed_are_said_and_not_called_a_fault(tmp_path):
    """keras.random without a seed, in validation too; with a generator of the layer's own all is compared."""

    class Noise(layers.Layer):
        def __init__(self, seed):
            super().__init__()
            self.seed = seed

        def call(self, x):
            return x + keras.random.normal(ops.shape(x), seed=self.seed)

    for seeded in (False, True):
        (tmp_path / str(seeded)).mkdir()

        def build() -> keras.Model:
            noise = Noise(keras.random.SeedGenerator(1) if seeded else None)  # noqa: B023
            return compiled(keras.Sequential([keras.Input((6,)), noise, layers.Dense(1)]))

        notes = prove(prepared_of(tmp_path / str(seeded), build)).notes
        assert seeded == (not notes)
        assert seeded or "give it a keras.random.SeedGenerator" in notes[0]


def test_a_loss_with_a_logarithm_names_it(tmp_path):
    """Poisson on outputs below zero."""
    y = np.abs(TARGET)
    with pytest.raises(ObjectiveError, match="'poisson' takes the logarithm of the outputs"):
        prove(prepared_of(tmp_path, lambda: dense(loss="poisson"), (X, y)))
