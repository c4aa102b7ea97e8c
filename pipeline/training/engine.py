"""The one place where a model is trained: traced once per optimizer, reset between runs.

A search over learning rates, decay schemes and optimizers keeps the architecture fixed, so one
compiled function serves every trial and fold.  The learning rate is data: a table of one value
per step.  One epoch is one call, in which a loop gathers shuffled mini-batches from tensors in
memory, calls the model's own `train_step`, records each step's loss, stops at the step where the
run diverges, and evaluates the validation samples at the end.

Every run of the same fold and seed sees the same initial weights, shuffles and layer randomness
(common random numbers), so that differences between runs are differences between configurations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import KnownError, ObjectiveError
from pipeline.training.data import Data, leaves, map_tree
from pipeline.training.divergence import REASONS, REFERENCE_STEPS, DivergenceRule, ceiling
from pipeline.training.optimizers import OptimizerSpec, build_optimizer, find_optimizer
from pipeline.training.tensorflow_import import import_tensorflow
from pipeline.training.xla_random import philox

Floats = NDArray[np.float64]

SNAPSHOT_BYTES = 1 << 30
"""Initial weights of past seeds are kept for reuse up to this size in bytes, else drawn again."""

EVALUATION_VALUES = 1 << 18
"""Validation batches hold about this many input values, and 1,024 samples at the most."""

NO_RECENT_LOSSES = np.full(2, -np.inf, np.float32)
"""The last two losses before a run's first step: too low for any ceiling."""

XLA_COMPILE_SECONDS = 1.5
"""What compiling one optimizer is expected to cost before it has been measured, in seconds."""


@dataclass(frozen=True)
class Split:
    """Training and validation samples of one fold, and the seed of everything random in it.

    Attributes:
        train: indices of training samples, shape (n,).
        validation: indices of validation samples, shape (m,).
        seed: seed of initial weights, shuffles and layer randomness.
    """

    train: NDArray[np.int32]
    validation: NDArray[np.int32]
    seed: int

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the steps of an epoch; a last partial batch counts, as in `model.fit`."""
        return -(-len(self.train) // batch_size)


@dataclass(frozen=True)
class Epoch:
    """What one epoch returned.

    Attributes:
        losses: loss of each step that ran, shape (steps,).
        metrics: training metrics over the epoch and, with "val_" before the name, validation metrics.
        diverged_step: step of this epoch, counted from 0, at which the run diverged, or None.
        reason: why it diverged, or None.
    """

    losses: Floats
    metrics: dict[str, float]
    diverged_step: int | None
    reason: str | None


@dataclass
class _Epoch:
    """An epoch as a function, with slower forms of it for models that the fastest cannot run.

    Attributes:
        forms: (what it is called, the function), fastest first.
        rows: rows that the table must have, where XLA wants them static, else None.
        on_fallback: told the name of the form that took over, and the error that made it.
        proven: whether the first form has run, so that later errors are real ones.
    """

    forms: list[tuple[str, Callable[..., Any]]]
    rows: int | None
    on_fallback: Callable[[str, Exception], None]
    proven: bool = False

    def __call__(self, *arguments: Any) -> Any:
        while True:
            try:
                result = self.forms[0][1](*arguments)
            except KnownError:
                raise
            except Exception as error:  # whatever tracing somebody's train_step may raise
                if self.proven or len(self.forms) == 1:
                    raise
                self.forms.pop(0)
                self.on_fallback(self.forms[0][0], error)
            else:
                self.proven = True
                return result


@dataclass
class _Program:
    """An optimizer with its slots, and the epoch traced for it.

    Attributes:
        optimizer: the Keras optimizer; its learning rate is read from the table.
        reset: function of (model state, slots) that assigns both.
        initial_slots: values of the optimizer's variables before its first step.
        epoch: the traced epoch, for any number of steps.
        compiled_epoch: the same with its loop under XLA, or None.
    """

    optimizer: Any
    reset: Callable[..., Any]
    initial_slots: list[Any]
    epoch: _Epoch
    compiled_epoch: _Epoch | None = None


class Engine:
    """Trains one model on one dataset under any optimizer and learning-rate table.

    Args:
        build_model: function without arguments that returns a compiled Keras model.
        data: the samples that every split indexes.
        batch_size: samples per step.
        seed: seed of the first model's initial weights.

    Raises:
        ObjectiveError: when the model does not fit the data.
    """

    def __init__(self, build_model: Callable[[], Any], data: Data, *, batch_size: int, seed: int = 0) -> None:
        self.tf, self.keras = import_tensorflow()
        self.build_model = build_model
        self.data = data
        self.batch_size = batch_size
        self.xla = False
        self.fallback: str | None = None
        self._parts = tuple(map_tree(self.tf.constant, part) for part in data.parts())
        values = max(1, sum(int(np.prod(leaf.shape[1:])) for _, leaf in leaves(data.x)))
        self._evaluation_batch = max(min(EVALUATION_VALUES // values, 1024), min(batch_size, 1024))
        self._programs: dict[str, _Program] = {}
        self._snapshots: dict[int, list[Any]] = {}
        self._initial_losses: dict[int, Floats] = {}
        self._rate: Any = None
        self.model = self._new_model(seed)
        self._unseeded = self._global_seed_generator()
        self._own_train_step = _overrides(self.keras, self.model, "train_step")
        self._own_test_step = _overrides(self.keras, self.model, "test_step")
        self.train_names, self.test_names = self._build(self.model)
        self._extras = _other_state(self.tf, self.keras, self.model)
        self._initial_extras = [self.tf.constant(v.numpy()) for v in self._extras]

    @property
    def monitors(self) -> list[str]:
        """Names that a study can monitor: every validation metric with "val_" before it."""
        return [f"val_{name}" for name in self.test_names]

    @property
    def parameters(self) -> int:
        """Number of the model's weights, frozen ones included."""
        return sum(int(np.prod(v.shape)) for v in self.model.weights)

    def start(self, optimizer: str | OptimizerSpec, split: Split) -> Run:
        """Reset weights, slots and random states, and return a run of the optimizer on the split.

        Args:
            optimizer: a name in `OPTIMIZERS`, or a specification of one's own.
            split: the samples and the seed.
        """
        program = self._program(optimizer)
        initial_losses = self._losses_at_rate_zero(program, split)
        self._reset(program, split.seed)
        return Run(self, program, split, initial_losses)

    def _losses_at_rate_zero(self, program: _Program, split: Split) -> Floats:
        """Return the losses of the split's first batches under its initial weights.

        They are the reference of the divergence rule, the same for every configuration, so they
        are measured once per split.
        """
        if split.seed not in self._initial_losses:
            self._reset(program, split.seed)
            order = shuffle(split, epoch=0)[: REFERENCE_STEPS * self.batch_size]
            steps = -(-len(order) // self.batch_size)
            table = np.stack([np.zeros(steps), np.full(steps, np.inf)], axis=1)
            epoch = program.compiled_epoch or program.epoch
            result, _ = self._call(epoch, order, table, NO_RECENT_LOSSES, split.validation[:0])
            self._initial_losses[split.seed] = result.losses
        return self._initial_losses[split.seed]

    def _reset(self, program: _Program, seed: int) -> None:
        unseeded = self.tf.constant([seed % 2**31, 0], self._unseeded.state.dtype)
        program.reset([*self._initial_state(seed), unseeded, *self._initial_extras], program.initial_slots)

    def calibrate(self, optimizer: str, split: Split, *, epochs: int, programs: int) -> str:
        """Decide by measurement whether XLA pays for the training that lies ahead.

        The cost is bounded by three timed epochs and one compilation, and is spent only where the
        training ahead is long enough to win it back.

        Args:
            optimizer: the optimizer to measure.
            split: the split to measure on.
            epochs: epochs of training that lie ahead, all trials and folds together.
            programs: optimizers that would each be compiled.

        Returns:
            The decision and its reason, in one line.
        """
        obstacle = self._xla_obstacle()
        if obstacle:
            return f"plain graph ({obstacle})"
        program = self._program(optimizer)
        plain = self._seconds_per_epoch(program.epoch, program, split)
        if self.fallback is not None:
            return self.fallback
        if plain * epochs < XLA_COMPILE_SECONDS * programs * 2:
            return f"plain graph ({1000 * plain:.1f} ms per epoch; too little training ahead for XLA to pay)"
        started = time.perf_counter()
        try:
            compiled = self._trace(program.optimizer, xla=True)
            self._seconds_per_epoch(compiled, program, split, repeats=1)
        except Exception as error:  # any op without an XLA kernel ends here; the plain graph runs it
            return f"plain graph (XLA cannot compile this model: {_first_line(error)})"
        compile_seconds = time.perf_counter() - started
        fast = self._seconds_per_epoch(compiled, program, split)
        figures = f"{1000 * fast:.1f} against {1000 * plain:.1f} ms per epoch, {compile_seconds:.1f} s to compile"
        if fast < 0.8 * plain and (plain - fast) * epochs > compile_seconds * programs:
            self.xla = True
            program.compiled_epoch = compiled
            return f"XLA ({figures})"
        return f"plain graph (XLA: {figures})"

    # -- building ---------------------------------------------------------------------------

    def _new_model(self, seed: int) -> Any:
        self.keras.utils.set_random_seed(seed % 2**32)
        return self.build_model()

    def _global_seed_generator(self) -> Any:
        """Return the generator behind random operations that were given no seed."""
        from keras.src.random.seed_generator import global_seed_generator

        return global_seed_generator()

    def _keep_global_seed_generator(self) -> None:
        """Put our generator back: `set_random_seed` drops it, and a trace must hold one that is reset."""
        from keras.src.backend.common import global_state

        global_state.set_global_attribute("global_seed_generator", self._unseeded)

    def _gather(self, index: Any) -> tuple[Any, ...]:
        """Return the samples at `index` from every part, as `train_step` takes them."""
        return tuple(map_tree(lambda a: self.tf.gather(a, index), part) for part in self._parts)

    def _use(self, model: Any, optimizer: Any) -> Any:
        """Give the model an optimizer, wrapped for loss scaling where `compile` would wrap it."""
        wrapper = self.keras.optimizers.LossScaleOptimizer
        if model.dtype_policy.name == "mixed_float16" and not isinstance(optimizer, wrapper):
            optimizer = wrapper(optimizer)
        model.optimizer = optimizer
        return optimizer

    def _build(self, model: Any) -> tuple[list[str], list[str]]:
        """Create every variable before the loop is traced.

        Returns:
            The names that `train_step` and `test_step` return.
        """
        tf = self.tf
        self._use(model, build_optimizer("sgd", 0.0))
        batch = self._gather(tf.range(min(2, self.data.samples)))
        if not (self._own_train_step or self._own_test_step):
            try:
                model._symbolic_build(data_batch=batch)
                names = list(_scalars(model.get_metrics_result()))
                return names, names
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                pass  # `model.fit` builds such models while it traces the step; so does the probe

        def probe(step: Callable[[Any], Any]) -> list[str]:
            names: list[str] = []
            spec = tf.nest.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), batch)
            traced = tf.function(lambda data: names.extend(_scalars(step(data))), autograph=False)
            try:
                traced.get_concrete_function(spec)
            except Exception:  # a step that cannot be traced is asked by running it
                names.clear()
                names.extend(_scalars(step(batch)))
            return list(dict.fromkeys(names))

        train_names = probe(model.train_step)
        if "loss" not in train_names:
            raise ObjectiveError(
                f"train_step must return a dict with 'loss', got {', '.join(train_names) or 'nothing'}."
            )
        try:
            test_names = probe(model.test_step)
        except Exception as error:
            if not self._own_train_step:
                raise
            raise ObjectiveError(
                f"the model overrides train_step, but its test_step cannot be run ({_first_line(error)}). "
                "Override test_step too, so that the validation samples have a value."
            ) from error
        return train_names, test_names

    def _state(self, model: Any) -> list[Any]:
        """Return the variables that a run starts from: weights, statistics and random states."""
        metrics = {id(v) for v in model.metrics_variables}
        return [v for v in model.variables if id(v) not in metrics]

    def _initial_state(self, seed: int) -> list[Any]:
        """Return the values a seed starts from, drawn by building the model anew under it."""
        if seed not in self._snapshots:
            model = self._new_model(seed)
            if not all(layer.built for layer in model._flatten_layers()):
                self._build(model)
            self._keep_global_seed_generator()
            values = [self.tf.constant(v.numpy()) for v in self._state(model)]
            if [v.shape for v in values] != [v.shape for v in self._state(self.model)]:
                raise ObjectiveError(
                    "build_model() must return the same architecture on every call, got other weights."
                )
            size = sum(v.shape.num_elements() * v.dtype.size for v in values)
            while self._snapshots and size * (len(self._snapshots) + 1) > SNAPSHOT_BYTES:
                self._snapshots.pop(next(iter(self._snapshots)))
            self._snapshots[seed] = values
        return self._snapshots[seed]

    def _program(self, chosen: str | OptimizerSpec) -> _Program:
        spec = find_optimizer(chosen)
        name = f"{spec.keras_class}{sorted(spec.settings.items())}"
        if name not in self._programs:
            optimizer = self._use(self.model, build_optimizer(spec, lambda: self._rate))
            optimizer.build(self.model.trainable_variables)
            state = [*self._state(self.model), self._unseeded.state, *self._extras]
            slots = list(optimizer.variables)

            def reset(state_values: list[Any], slot_values: list[Any]) -> None:
                for variable, value in zip((*state, *slots), (*state_values, *slot_values), strict=True):
                    variable.assign(value)

            self._programs[name] = _Program(
                optimizer=optimizer,
                reset=self.tf.function(reset, autograph=False),
                initial_slots=[self.tf.constant(v.numpy()) for v in slots],
                epoch=self._trace(optimizer, xla=False),
            )
        program = self._programs[name]
        if self.xla and program.compiled_epoch is None:
            program.compiled_epoch = self._trace(program.optimizer, xla=True)
        return program

    def _trace(self, optimizer: Any, *, xla: bool) -> _Epoch:
        """Return the epoch as one graph function.

        It takes sample indices of the epoch, shape (n,); rate and loss ceiling of each step, shape
        (steps, 2); the number of samples and of steps that count (XLA wants both arrays at their
        largest size); the last two losses of the epoch before; validation indices, shape (m,).
        It returns losses, steps done, divergence code, the last two losses, training metrics and
        validation metrics.
        """
        tf, model, batch_size = self.tf, self.model, self.batch_size

        def one_step(index: Any, row: Any) -> tuple[Any, Any]:
            model.optimizer = optimizer
            self._rate = row[0]
            for metric in model.metrics:
                if metric.name == "loss":  # so that what the step returns is this batch's own loss
                    metric.reset_state()
            logs = _scalars(model.train_step(self._gather(index)))
            loss = tf.cast(logs["loss"], tf.float32)
            carried = self.train_names if self._own_train_step else []
            return loss, tf.stack([tf.cast(logs[name], tf.float32) for name in carried]) if carried else tf.zeros([0])

        def one_test(index: Any) -> Any:
            logs = _scalars(model.test_step(self._gather(index)))
            carried = [tf.cast(logs[name], tf.float32) for name in self.test_names if self._own_test_step]
            return tf.stack(carried) if carried else tf.zeros([0])

        form: dict[str, Callable[..., Any]] = {"train": one_step, "test": one_test}

        def steps(count: Any, index_of: Callable[[Any], Any], table: Any, recent: Any, size: Any) -> tuple[Any, ...]:
            """Run `count` steps; stop where the divergence rule says so."""
            losses = tf.TensorArray(tf.float32, size=size, element_shape=())
            width = len(self.train_names) if self._own_train_step else 0

            def body(i: Any, code: Any, before: Any, latest: Any, logs: Any, losses: Any) -> tuple[Any, ...]:
                row = table[i]
                loss, logs = form["train"](index_of(i), row)
                return i + 1, judge(before, latest, loss, row[1]), latest, loss, logs, losses.write(i, loss)

            start = (0, 0, recent[0], recent[1], tf.zeros([width]), losses)
            done, code, before, latest, logs, losses = tf.while_loop(
                lambda i, code, *_: (i < count) & (code == 0), body, start
            )
            return done, code, tf.stack([before, latest]), logs, losses.stack()

        def judge(before: Any, latest: Any, loss: Any, limit: Any) -> Any:
            median = tf.maximum(tf.minimum(before, latest), tf.minimum(tf.maximum(before, latest), loss))
            return tf.where(tf.math.is_finite(loss), tf.where(median > limit, 2, 0), 1)

        def loop_in_xla(order: Any, table: Any, full: Any, recent: Any) -> tuple[Any, ...]:
            with philox():
                return steps(
                    full, lambda i: tf.slice(order, [i * batch_size], [batch_size]), table, recent, table.shape[0]
                )

        compiled_loop = tf.function(loop_in_xla, jit_compile=True, autograph=False)

        def full_then_partial(order: Any, table: Any, samples: Any, recent: Any) -> tuple[Any, ...]:
            # XLA wants static shapes, so the last partial batch is a step of the plain graph.
            full = samples // batch_size
            done, code, recent, logs, losses = compiled_loop(order, table, full, recent)

            def partial() -> tuple[Any, ...]:
                loss, logs = one_step(order[full * batch_size : samples], table[full])
                updated = tf.tensor_scatter_nd_update(losses, [[full]], [loss])
                code = judge(recent[0], recent[1], loss, table[full, 1])
                return full + 1, code, tf.stack([recent[1], loss]), logs, updated

            more = (code == 0) & (samples > full * batch_size)
            result: tuple[Any, ...] = tf.cond(more, partial, lambda: (done, code, recent, logs, losses))
            return result

        def evaluate(validation: Any) -> Any:
            size, test = self._evaluation_batch, form["test"]
            width = len(self.test_names) if self._own_test_step else 0
            model.reset_metrics()

            def body(start: Any, _: Any) -> tuple[Any, Any]:
                return start + size, test(validation[start : start + size])

            _, logs = tf.while_loop(lambda start, _: start < tf.size(validation), body, (0, tf.zeros([width])))
            return logs if width else self._metric_results(self.test_names)

        def epoch(order: Any, table: Any, samples: Any, recent: Any, validation: Any) -> tuple[Any, ...]:
            self._keep_global_seed_generator()
            model.reset_metrics()
            if xla:
                done, code, recent, logs, losses = full_then_partial(order, table, samples, recent)
            else:
                count = tf.shape(table)[0]
                done, code, recent, logs, losses = steps(
                    count, lambda i: order[i * batch_size : (i + 1) * batch_size], table, recent, count
                )
            train = logs if self._own_train_step else self._metric_results(self.train_names)
            finite = [tf.reduce_all(tf.math.is_finite(v)) for v in model.trainable_variables if v.dtype != "int32"]
            healthy = tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)
            code = tf.where((code == 0) & ~healthy, 3, code)
            return losses, done, code, recent, train, evaluate(validation)

        capacity = self._capacity if xla else None
        signature = [
            tf.TensorSpec([capacity * batch_size if capacity else None], tf.int32),
            tf.TensorSpec([capacity, 2], tf.float32),
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([2], tf.float32),
            tf.TensorSpec([None], tf.int32),
        ]

        def step_by_step(*arguments: Any) -> tuple[Any, ...]:
            """The same loop in Python around steps that are traced one by one."""
            if form["train"] is one_step:
                index = tf.TensorSpec([None], tf.int32)
                row = tf.TensorSpec([2], tf.float32)
                form["train"] = tf.function(one_step, autograph=False, input_signature=[index, row])
                form["test"] = tf.function(one_test, autograph=False, input_signature=[index])
            return epoch(*arguments)

        def eagerly(*arguments: Any) -> tuple[Any, ...]:
            """The same loop in Python around steps that run as Python, as `run_eagerly` does."""
            form.update(train=one_step, test=one_test)
            return epoch(*arguments)

        in_graph = tf.function(epoch, autograph=False, input_signature=signature)
        forms = [("in one graph", in_graph), ("step by step", step_by_step), ("eagerly", eagerly)]
        return _Epoch(forms[2:] if model.run_eagerly else forms[:1] if xla else forms, capacity, self._fall_back)

    def _fall_back(self, form: str, error: Exception) -> None:
        if self.fallback is None or form not in self.fallback:
            self.fallback = f"trains {form}: the epoch cannot be traced as one graph ({_first_line(error)})"

    @property
    def _capacity(self) -> int:
        """Steps of the longest epoch that the data allows."""
        return -(-self.data.samples // self.batch_size)

    def _metric_results(self, names: list[str]) -> Any:
        results = _scalars(self.model.get_metrics_result())
        return self.tf.stack([self.tf.cast(results[name], self.tf.float32) for name in names])

    # -- running ----------------------------------------------------------------------------

    def _call(self, epoch: _Epoch, order: Any, table: Any, recent: Any, validation: Any) -> tuple[Epoch, Any]:
        """Call a traced epoch; return what it did and the last two losses, for the next call."""
        tf, samples = self.tf, len(order)
        if epoch.rows is not None:
            order = np.pad(order, (0, epoch.rows * self.batch_size - samples))
            table = np.pad(table, ((0, epoch.rows - len(table)), (0, 0)))
        losses, done, code, recent, train, test = epoch(
            tf.constant(order, tf.int32),
            tf.constant(table, tf.float32),
            tf.constant(samples),
            recent,
            tf.constant(validation, tf.int32),
        )
        done, code = int(done), int(code)
        losses = losses.numpy()[:done].astype(float)
        metrics = dict(zip(self.train_names, train.numpy().tolist(), strict=True))
        weights = np.minimum(self.batch_size, samples - self.batch_size * np.arange(done))
        metrics["loss"] = float(np.average(losses, weights=weights)) if done else float("nan")
        if len(validation):
            values = test.numpy().tolist()
            metrics |= {f"val_{name}": value for name, value in zip(self.test_names, values, strict=True)}
        return Epoch(losses, metrics, done - 1 if code else None, REASONS[code] if code else None), recent

    def _seconds_per_epoch(self, epoch: _Epoch, program: _Program, split: Split, repeats: int = 3) -> float:
        seconds = []
        for _ in range(repeats):
            self._reset(program, split.seed)
            run = Run(self, program, split, np.ones(1), epoch)
            started = time.perf_counter()
            run.epoch(np.full(split.steps_per_epoch(self.batch_size), 1e-6))
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds))

    def _xla_obstacle(self) -> str | None:
        """Return why XLA is not worth trying, known without measuring, or None."""
        if self.model.run_eagerly:
            return "the model asks to run eagerly"
        if any(leaf.dtype.kind in "USO" for part in self.data.parts() for _, leaf in leaves(part)):
            return "strings cannot be compiled"
        if self.tf.config.list_physical_devices("GPU"):
            return None
        layers = list(self.model._flatten_layers())
        if any("Conv" in type(layer).__name__ for layer in layers):
            return "XLA runs convolutions slowly on a CPU"
        if len(layers) > 200:
            return "too many layers to compile soon"
        return None


class Run:
    """One training run, epoch after epoch.  Made by `Engine.start`."""

    def __init__(
        self,
        engine: Engine,
        program: _Program,
        split: Split,
        initial_losses: Floats,
        epoch: _Epoch | None = None,
    ) -> None:
        self.engine, self.program, self.split, self.initial_losses = engine, program, split, initial_losses
        self.epochs_done = self.steps_done = 0
        self._epoch = epoch or program.compiled_epoch or program.epoch
        self._recent: Any = NO_RECENT_LOSSES

    def epoch(self, rates: Any, rule: DivergenceRule | None = None, *, validate: bool = True) -> Epoch:
        """Train one epoch and evaluate the validation samples.

        Args:
            rates: learning rate of each step, shape (steps per epoch,).
            rule: when to stop; without one only a non-finite loss stops.
            validate: evaluate the validation samples at the end.

        Returns:
            Losses, metrics, and where it diverged.
        """
        order = shuffle(self.split, self.epochs_done)
        held = self.split.validation if validate else self.split.validation[:0]
        result = self._go(order, np.asarray(rates), rule, held, self._epoch)
        self.epochs_done += 1
        return result

    def steps(self, rates: Any, rule: DivergenceRule | None = None) -> Epoch:
        """Train as many steps as there are rates, over as many shuffles as that takes, without validation.

        Args and returns: as `epoch`.
        """
        rates, size = np.asarray(rates), self.engine.batch_size
        order = np.empty(0, np.int32)
        while len(order) < len(rates) * size:
            order = np.concatenate([order, shuffle(self.split, self.epochs_done)])
            self.epochs_done += 1
        # A compiled epoch has room for so many steps and no more; the run's state carries over.
        chunk = self._epoch.rows or len(rates)
        losses: list[Floats] = []
        for start in range(0, len(rates), chunk):
            part = rates[start : start + chunk]
            samples = order[start * size : (start + len(part)) * size]
            result = self._go(samples, part, rule, self.split.validation[:0], self._epoch)
            losses.append(result.losses)
            if result.diverged_step is not None:
                return replace(result, losses=np.concatenate(losses), diverged_step=start + result.diverged_step)
        return replace(result, losses=np.concatenate(losses))

    def _go(self, order: Any, rates: Any, rule: DivergenceRule | None, validation: Any, epoch: _Epoch) -> Epoch:
        ceilings = np.full(len(rates), np.inf)
        if rule is not None and np.isfinite(rule.factor):
            ceilings[max(0, rule.from_step - 1 - self.steps_done) :] = ceiling(self.initial_losses, rule)
        table = np.stack([rates, ceilings], axis=1)
        result, self._recent = self.engine._call(epoch, order, table, self._recent, validation)
        self.steps_done += len(result.losses)
        return result


def shuffle(split: Split, epoch: int) -> NDArray[np.int32]:
    """Return the split's training indices in the order of an epoch, the same for every configuration."""
    return np.random.default_rng([split.seed, epoch]).permutation(split.train).astype(np.int32)


def _overrides(keras: Any, model: Any, name: str) -> bool:
    """Return whether the model's class brings its own method `name`."""
    return getattr(type(model), name) is not getattr(keras.Model, name)


def _other_state(tf: Any, keras: Any, model: Any) -> list[Any]:
    """Return the variables that a model keeps beside Keras's own: plain tf.Variables, further optimizers.

    They are looked for among the attributes of the model and its layers, in lists and dicts too.
    """
    known = {id(getattr(v, "value", v)) for v in (*model.variables, *model.metrics_variables)}
    if model.optimizer is not None:
        known |= {id(v.value) for v in model.optimizer.variables}
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, keras.optimizers.Optimizer):
            for variable in value.variables if value is not model.optimizer else ():
                look(variable)
        elif isinstance(value, tf.Variable | keras.Variable):
            plain = getattr(value, "value", value) if isinstance(value, keras.Variable) else value
            if id(plain) not in known:
                known.add(id(plain))
                found.append(plain)
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)
        elif isinstance(value, dict):
            for item in value.values():
                look(item)

    for owner in model._flatten_layers():
        for name, value in vars(owner).items():
            if not name.startswith("_"):
                look(value)
    return found


def _scalars(logs: Any) -> dict[str, Any]:
    """Return the named scalars among what a step returned."""
    if not isinstance(logs, dict):
        return {}
    return {str(key): value for key, value in logs.items() if len(getattr(value, "shape", ())) == 0}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
