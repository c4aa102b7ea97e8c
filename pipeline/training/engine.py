"""The one place where a model is trained: traced once per optimizer, reset between runs.

A search over learning rates, decay schemes and optimizers keeps the architecture fixed, so one
compiled function serves every trial and fold.  The learning rate is data: a table of one value
per step.  One epoch is one call of the loop in `loop.py`, over samples in memory or a `tf.data`
pipeline.  A frozen first part of the model is run once, before all training.

Every run of the same fold and seed sees the same initial weights, shuffles and layer randomness
(common random numbers), so that differences between runs are differences between configurations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ObjectiveError, first_line
from pipeline.training.building import (
    Builder,
    fixed_batch,
    name_of,
    other_state,
    overrides,
    plain,
    uses,
)
from pipeline.training.data import Data, leaves
from pipeline.training.divergence import NO_RECENT_LOSSES, REASONS, REFERENCE_STEPS, DivergenceRule, ceilings
from pipeline.training.evaluation import why_batches_matter
from pipeline.training.frozen import PLAIN_MODELS, Cut, bytes_per_sample, cut, is_steady, on_features, run_body
from pipeline.training.loop import Loop, TracedEpoch, scalars
from pipeline.training.optimizers import OptimizerSpec, build_optimizer, find_optimizer
from pipeline.training.seeds import draws, graphs_kept, own_draws, set_seed
from pipeline.training.sources import AnySplit, ArraySource, Cursor, Source, make_source
from pipeline.training.stream import Stream
from pipeline.training.tensorflow_import import import_tensorflow

Floats = NDArray[np.float64]

SNAPSHOT_BYTES = 1 << 30
"""Initial weights of past seeds are kept for reuse up to this size in bytes, else drawn again."""

FROZEN_BYTES = 2 << 30
"""Outputs of a frozen body are kept up to this size in bytes; beyond it the whole model is trained."""

TIMED_SECONDS = 1.0
"""About how long a measurement of the training speed takes, in seconds, where single steps are shorter."""

FORMS = 3
"""Forms of the loop: in one graph, step by step, eagerly."""

SUSPICIOUS = 8.0
"""An optimizer that takes so many times as long as the fastest under XLA is compared with its plain graph."""

XLA_SECONDS_PER_OPERATION = 0.0035
"""What compiling is expected to cost, in seconds per operation of the graph; 0.002 to 0.003 were measured."""


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
class _Program:
    """An optimizer with its slots, and the epoch traced for it.

    Attributes:
        optimizer: the Keras optimizer; its learning rate is read from the table.
        variables: the model's state and the optimizer's slots, in this order.
        reset: function of (model state, slots) that assigns both.
        initial_slots: values of the optimizer's variables before its first step.
        copies: slots that start as copies of weights, as (index of the slot, index in the model's state).
        known: ids of the TensorFlow variables among `variables`.
        epoch: the traced epoch, for any number of steps.
        compiled_epoch: the same with its loop under XLA, or None.
    """

    optimizer: Any
    variables: list[Any]
    reset: Callable[..., Any]
    initial_slots: list[Any]
    copies: list[tuple[int, int]]
    known: frozenset[int]
    epoch: TracedEpoch
    compiled_epoch: TracedEpoch | None = None


class Engine:
    """Trains one model on one dataset under any optimizer and learning-rate table.

    Args:
        build_model: function without arguments that returns a compiled Keras model.
        data: the samples that every split indexes.
        batch_size: samples per step, where a run does not name its own; and per validation batch.
        seed: seed of the first model's initial weights.
        frozen_bytes: memory for the outputs of a frozen first part of the model.
        loss_name: what a step's loss is called, where `train_step` returns no "loss"; it may begin with "val_".

    Attributes:
        xla: whether epochs are compiled with XLA.
        plain: names of optimizers that are not.
        form: how many of the loop's faster forms are left out.
        fallback: why the engine trains in a slower way than usual, or None.
        batches_matter: whether the model itself is such that the size of validation batches may matter.
        draws_unseeded: whether a step draws by Keras's random operations without a seed.
        no_validation: why `test_step` cannot be run, or None.
        why_batches: why validation keeps to the batch size of the study, or None where any size gives the same.

    Raises:
        ObjectiveError: when the model does not fit the data.
    """

    def __init__(
        self,
        build_model: Callable[[], Any],
        data: Data | Stream,
        *,
        batch_size: int,
        seed: int = 0,
        frozen_bytes: int = FROZEN_BYTES,
        loss_name: str | None = None,
    ) -> None:
        self.tf, self.keras = import_tensorflow()
        self.builder = build_model if isinstance(build_model, Builder) else Builder(build_model)
        self.data = data
        self.batch_size = data.batch_size if isinstance(data, Stream) else batch_size
        self.xla = False
        self.plain: set[str] = set()
        self.form = 0
        self.fallback: str | None = None
        self.frozen: str | None = None
        self.not_frozen: str | None = None
        self._programs: dict[tuple[str, int], _Program] = {}
        self._snapshots: dict[int, list[Any]] = {}
        self._bodies: dict[int, str] = {}
        self._features: dict[str, list[np.ndarray]] = {}
        self._features_held = ""
        self._body_batch = 1
        self._frozen_bytes = frozen_bytes
        self._initial_losses: dict[tuple[int, tuple[int, int], int], Floats] = {}
        self._rate: Any = None
        self.no_validation: str | None = None
        self.draws_unseeded = False
        self._draws = draws()
        with own_draws(seed):
            self.whole = self.model = self.new_model(seed)
            fixed = fixed_batch(self.model) is not None
            self.source: Source = make_source(self.tf, data, self.batch_size, fixed)
            self._sample = self.source.sample
            self._unseeded = self._global_seed_generator()
            self._own_train_step = overrides(self.keras, self.model, "train_step")
            self._own_test_step = overrides(self.keras, self.model, "test_step")
            self._wanted = (loss_name or "loss").removeprefix("val_")
            self.train_names, self.test_names = self._build(self.model)
        self._why_no_loss()
        self.builder.look(self.model)
        self._cut_frozen(seed)
        self.why_batches = why_batches_matter(self.keras, self.model)
        self.batches_matter = self.why_batches is not None
        if isinstance(self.source, ArraySource):
            self.source.any_batch = self.why_batches is None
        self._make_loop()

    def _make_loop(self) -> None:
        """Begin to trace anew, for the model as it is now."""
        self._programs.clear()
        self._extras = other_state(self.tf, self.keras, self.model)
        self._initial_extras = [self.tf.constant(v.numpy()) for v in self._extras]
        self._loop = Loop(
            tf=self.tf,
            model=self.model,
            source=self.source,
            train_names=self.train_names,
            test_names=self.test_names,
            loss_name=self.loss_name,
            trackers=self.trackers_of(self.model),
            own_train_step=self._own_train_step,
            own_test_step=self._own_test_step,
            capacity=-(-self.data.samples // self.batch_size),
            set_rate=self._set_rate,
            before_trace=self.keep_global_seed_generator,
            on_fallback=self._fall_back,
            on_trace=self._notice,
        )

    def _why_no_loss(self) -> None:
        """Refuse a model of whose steps no loss is known.

        Raises:
            ObjectiveError: naming what its steps return.
        """
        if self.loss_name not in self.train_names:
            listed = ", ".join(self.train_names) or "nothing"
            names = self.train_names
            remedy = (
                f'Set monitor to the one that its optimizer lowers: {" or ".join(names)}; and mode = "min", where the '
                "name does not tell."
                if names
                else "Let it return a dict with 'loss'."
            )
            raise ObjectiveError(f"train_step must return a dict with 'loss', got {listed}. {remedy}")

    @property
    def loss_name(self) -> str:
        """Return which of the numbers that a training step returns is its loss."""
        named = [name for name in self.train_names if "loss" in name]
        if "loss" not in named and self._wanted not in self.train_names and len(named) == 1:
            return named[0]
        return "loss" if "loss" in named else self._wanted

    @property
    def monitors(self) -> list[str]:
        """Names that a study can monitor: its validation metrics, with "val_" before them; or those of training."""
        return [f"val_{name}" for name in self.test_names] or self.train_names

    @property
    def way(self) -> dict[str, Any]:
        """Return how the engine trains, for other engines on the same model to train alike."""
        source = self.source
        any_batch = isinstance(source, ArraySource) and source.any_batch
        return {"xla": self.xla, "plain": sorted(self.plain), "form": self.form, "any_batch": any_batch}

    def go_on(self, way: Mapping[str, Any]) -> None:
        """Train as another engine does.

        Args:
            way: its `way`; keys that are absent leave things as they are.
        """
        self.xla = bool(way.get("xla", self.xla))
        self.plain = set(way.get("plain", self.plain))
        form, source = int(way.get("form", self.form)), self.source
        any_batch = isinstance(source, ArraySource) and bool(way.get("any_batch", source.any_batch))
        if form != self.form or (isinstance(source, ArraySource) and any_batch != source.any_batch):
            self.form = form
            if isinstance(source, ArraySource):
                source.any_batch = any_batch
            self._make_loop()

    def slower(self, *, validation: bool) -> str | None:
        """Give up the next shortcut that may change a number.

        Args:
            validation: whether only validation is in doubt.

        Returns:
            What is done instead, or None where nothing is left to give up.
        """
        source = self.source
        if isinstance(source, ArraySource) and source.any_batch:
            source.any_batch = False
            self.why_batches = "larger ones gave other numbers"
            self._make_loop()
            return f"validation in batches of {self.batch_size}"
        if validation and not self.frozen:
            return None
        if self.xla:
            self.xla = False
            for program in self._programs.values():
                program.compiled_epoch = None
            return "the plain graph"
        if self.frozen:
            self._uncut()
            self._make_loop()
            return "the whole model in every step"
        if self.form < FORMS - 1 and not self.model.run_eagerly:
            self.form += 1
            self._make_loop()
            return ("steps traced one by one", "steps that run eagerly")[self.form - 1]
        return None

    @property
    def parameters(self) -> int:
        """Number of the model's weights, frozen ones included."""
        return sum(int(np.prod(v.shape)) for v in self.whole.weights)

    @property
    def on_gpu(self) -> bool:
        """Return whether TensorFlow sees a GPU."""
        return bool(self.tf.config.list_physical_devices("GPU"))

    @property
    def own_train_step(self) -> bool:
        """Return whether the model's class brings its own training step."""
        return self._own_train_step

    @property
    def own_test_step(self) -> bool:
        """Return whether the model's class brings its own validation step."""
        return self._own_test_step

    @property
    def draws_by_tensorflow(self) -> bool:
        """Return whether operations have asked for seeds to keep since the first model was built."""
        return draws() > self._draws

    def drawn_anew(self, seed: int) -> str | None:
        """Draw the initial weights of a seed once more; return the name of one that came out otherwise, or None."""
        before = self._initial_state(seed)
        self._snapshots.pop(seed)
        for variable, one, other in zip(self._state(self.model), before, self._initial_state(seed), strict=True):
            if not np.array_equal(one.numpy(), other.numpy()):
                return name_of(variable)
        return None

    def start(self, optimizer: str | OptimizerSpec, split: AnySplit, batch_size: int | None = None) -> Run:
        """Reset weights, slots and random states, and return a run of the optimizer on the split.

        Args:
            optimizer: a name in `OPTIMIZERS`, or a specification of one's own.
            split: the samples and the seed.
            batch_size: samples per step, for samples in memory; None takes the engine's.
        """
        program = self._program(optimizer, batch_size or self.batch_size)
        initial_losses = self._losses_at_rate_zero(program, split)
        self._reset(program, split.seed)
        return Run(self, program, split, initial_losses)

    def trained_model(self, split: AnySplit) -> Any:
        """Return the whole model with the weights that the last run left, the run having been on `split`."""
        if not self.frozen:
            return self.whole
        # Cutting leaves marks in a model's graph that saving trips over, and another seed may have drawn
        # another body: a new model gets the trained weights.
        trained = {id(v) for v in self.model.variables}
        values = [v.numpy() if id(v) in trained else None for v in self.whole.variables]
        with own_draws(split.seed):
            model = self.new_model(split.seed)
            self._build(model)
        for variable, value in zip(model.variables, values, strict=True):
            if value is not None:
                variable.assign(value)
        return model

    def _losses_at_rate_zero(self, program: _Program, split: AnySplit) -> Floats:
        """Return the losses of the split's first batches under its initial weights.

        They are the reference of the divergence rule, the same for every configuration of a batch
        size, so they are measured once per split.
        """
        epoch = program.compiled_epoch or program.epoch
        key = split.seed, split.sizes, epoch.source.batch_size
        if key not in self._initial_losses:
            self._reset(program, split.seed)
            steps = min(REFERENCE_STEPS, split.steps_per_epoch(epoch.source.batch_size))
            table = np.stack([np.zeros(steps), ceilings((), None, steps, 0)], axis=1)
            feed, samples = epoch.source.start(split).epoch(steps)
            result, _ = self._call(epoch, feed, samples, table, NO_RECENT_LOSSES, None)
            self._initial_losses[key] = result.losses
        return self._initial_losses[key]

    def _reset(self, program: _Program, seed: int) -> None:
        unseeded = self.tf.constant([seed % 2**31, 0], self._unseeded.state.dtype)
        state, slots = self._initial_state(seed), list(program.initial_slots)
        for slot, index in program.copies:
            slots[slot] = state[index]
        program.reset([*state, unseeded, *self._initial_extras], slots)
        self.builder.restore(but=program.known)
        self.builder.trained = True

    def seconds_per_epoch(self, optimizer: str, split: AnySplit, *, at_least: float = 0.0) -> float:
        """Return the median seconds of an epoch as the engine runs it now, without validation.

        Args:
            optimizer: the optimizer to measure.
            split: the split to measure on.
            at_least: seconds to go on measuring.
        """
        program = self._program(optimizer, self.batch_size)
        epoch = program.compiled_epoch or program.epoch
        began, seconds = time.perf_counter(), [self._seconds_per_epoch(epoch, program, split)]
        while time.perf_counter() - began < at_least:
            seconds.append(self._seconds_per_epoch(epoch, program, split))
        return float(np.median(seconds))

    def _build_slots(self, optimizer: Any) -> list[tuple[int, int]]:
        """Create the optimizer's slots; return which of them start as copies of weights.

        Schedule-free optimizers keep such copies.  They are told by a mark: the slots are created
        while every weight holds a number of its own.
        """
        weights = self.model.trainable_variables
        before = [v.numpy() for v in weights]
        for number, variable in enumerate(weights):
            variable.assign(np.full(variable.shape, number + 0.5, variable.dtype))
        optimizer.build(weights)
        state = {id(v): index for index, v in enumerate(self._state(self.model))}
        copies = []
        for slot, variable in enumerate(optimizer.variables):
            value = variable.numpy()
            for number, weight in enumerate(weights):
                if value.size and value.shape == weight.shape and (value == number + 0.5).all():
                    copies.append((slot, state[id(weight)]))
        for variable, value in zip(weights, before, strict=True):
            variable.assign(value)
        return copies

    def calibrate(self, optimizer: str, split: AnySplit, *, epochs: int, programs: int) -> str:
        """Decide by measurement whether XLA pays for the training that lies ahead.

        The cost is bounded by two measurements of about `TIMED_SECONDS` and one compilation, whose
        seconds are foreseen from the size of the graph, and is spent only where compiling every
        program would take less than half of the training ahead.

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
        program = self._program(optimizer, self.batch_size)
        plain = self._seconds_per_epoch(program.epoch, program, split)
        if self.fallback is not None:
            return self.fallback
        expected = XLA_SECONDS_PER_OPERATION * program.epoch.operations()
        if plain * epochs < expected * programs * 2:
            return f"plain graph ({1000 * plain:.1f} ms per epoch; too little training ahead for XLA to pay)"
        started = time.perf_counter()
        try:
            compiled = self._loop.trace(program.optimizer, xla=True)
            self._seconds(compiled, program, split, 1)
        except Exception as error:  # any op without an XLA kernel ends here; the plain graph runs it
            return f"plain graph (XLA cannot compile this model: {first_line(error)})"
        compile_seconds = time.perf_counter() - started
        fast = self._seconds_per_epoch(compiled, program, split)
        figures = f"{1000 * fast:.1f} against {1000 * plain:.1f} ms per epoch, {compile_seconds:.1f} s to compile"
        if fast < 0.8 * plain and (plain - fast) * epochs > compile_seconds * programs:
            self.xla = True
            program.compiled_epoch = compiled
            return f"XLA ({figures})"
        return f"plain graph (XLA: {figures})"

    def leave_plain(self, optimizers: Iterable[str], split: AnySplit) -> str:
        """Take optimizers out of XLA that run slower under it than in the plain graph.

        XLA compiles every optimizer's update for itself, and now and then one comes out hundreds of
        times slower.  Each is timed once; only one that is suspiciously slower than the fastest is
        compared with its plain graph.

        Args:
            optimizers: names that a study will train.
            split: the split to measure on.

        Returns:
            What was taken out, in one line; empty for nothing.
        """
        if not self.xla:
            return ""
        seconds = {}
        for name in optimizers:
            program = self._program(name, self.batch_size)
            assert program.compiled_epoch is not None
            self._seconds(program.compiled_epoch, program, split, 1)  # compiles
            seconds[name] = self._seconds(program.compiled_epoch, program, split, 2)
        fastest = min(seconds.values())
        found = []
        for name, compiled in seconds.items():
            if compiled > SUSPICIOUS * fastest:
                program = self._program(name, self.batch_size)
                self._seconds(program.epoch, program, split, 1)  # traces
                plain = self._seconds(program.epoch, program, split, 2)
                if plain < compiled:
                    self.plain.add(name)
                    program.compiled_epoch = None
                    found.append(f"{name} in the plain graph, {compiled / plain:.0f} times as fast")
        return "; ".join(found)

    # -- building ---------------------------------------------------------------------------

    def new_model(self, seed: int) -> Any:
        """Return a model with the initial weights of a seed, if its layers are built by `build_model()`."""
        with graphs_kept():
            set_seed(seed)
            return self.builder()

    def _global_seed_generator(self) -> Any:
        """Return the generator behind random operations that were given no seed."""
        from keras.src.random.seed_generator import global_seed_generator

        return global_seed_generator()

    def keep_global_seed_generator(self) -> None:
        """Put our generator back: `set_random_seed` drops it, and a trace must hold one that is reset."""
        from keras.src.backend.common import global_state

        global_state.set_global_attribute("global_seed_generator", self._unseeded)

    def _set_rate(self, rate: Any) -> None:
        self._rate = rate

    def _cut_frozen(self, seed: int) -> None:
        """Replace a frozen first part of the model by its outputs, where they are fixed and fit into memory."""
        source, data = self.source, self.data
        if not isinstance(source, ArraySource) or not isinstance(data, Data) or self.model.run_eagerly:
            return

        def accept(body: Any) -> bool:
            needed = bytes_per_sample(body) * data.samples
            if needed > self._frozen_bytes:
                self.not_frozen = f"its fixed part's outputs need {needed / 1e6:.0f} MB, more than engine.frozen_memory"
                return False
            return is_steady(self.tf, body, self._sample[0])

        try:
            found = cut(self.keras, self.model, accept)
            if found is None:
                self.not_frozen = self.not_frozen or self._why_not_frozen()
                return
            self._bodies[seed] = found.digest()
            self._body_batch = source.evaluation_batch
            self._hold_features(found, self._bodies[seed])
        except (ValueError, TypeError, NotImplementedError, self.tf.errors.OpError):
            self._uncut()  # a graph that cannot be taken apart is trained whole
            return
        self.model = found.head
        self.train_names, self.test_names = self._build(self.model)
        megabytes = bytes_per_sample(found.body) * data.samples / 1e6
        self.frozen = (
            f"its fixed part ({found.fixed}) ran once; the rest is trained on its outputs ({megabytes:.0f} MB)"
        )

    def _uncut(self) -> None:
        """Train the whole model, one without the marks of a cut."""
        assert isinstance(self.source, ArraySource) and isinstance(self.data, Data)
        self.source.hold(self.data)
        self.frozen, self._features, self._features_held = None, {}, ""
        self._snapshots.clear()
        with own_draws(0):
            self.whole = self.model = self.new_model(0)
            self.keep_global_seed_generator()
            self._build(self.model)

    def _why_not_frozen(self) -> str | None:
        """Say why weights that are fixed take part in every step, where they are most of the model's."""
        counts = [
            sum(math.prod(v.shape) for v in part) for part in (self.model.variables, self.model.trainable_variables)
        ]
        if 2 * counts[1] > counts[0]:
            return None
        if type(self.model).__module__ not in PLAIN_MODELS:
            return "most of its weights are fixed, but a model of a class of its own cannot be taken apart"
        return "most of its weights are fixed, but layers before them are trained, draw at random or mask"

    def _hold_features(self, found: Cut | None, body: str) -> None:
        """Put a body's outputs in the place of the inputs; keep as many bodies' as fit into memory."""
        assert isinstance(self.source, ArraySource) and isinstance(self.data, Data)
        if body == self._features_held:
            return
        if body not in self._features:
            assert found is not None
            features = run_body(self.tf, found, self.data.x, self._body_batch)
            size = sum(array.nbytes for array in features)
            while self._features and size * (len(self._features) + 1) > self._frozen_bytes:
                self._features.pop(next(iter(self._features)))
            self._features[body] = features
        self.source.hold(on_features(self.data, self._features[body]))
        self._features_held = body

    def use(self, model: Any, optimizer: Any) -> Any:
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
        self.use(model, build_optimizer("sgd", 0.0))
        batch = self.source.sample if model is self.model is not self.whole else self._sample
        if not (self._own_train_step or self._own_test_step):
            try:
                model._symbolic_build(data_batch=batch)
                names = list(scalars(model.get_metrics_result()))
                self._trackers = {"loss"}
                return names, names
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                pass  # `model.fit` builds such models while it traces the step; so does the probe

        def probe(step: Callable[[Any], Any]) -> list[str]:
            names: list[str] = []
            spec = tf.nest.map_structure(lambda a: _any_size(tf, a, fixed_batch(model)), batch)

            def traced(data: Any) -> None:
                found = scalars(step(data))
                names.extend(found)
                if step == model.train_step and self._own_train_step:
                    self._trackers = self._trackers_of(model, found)

            try:
                tf.function(traced, autograph=False).get_concrete_function(spec)
            except Exception:  # a step that cannot be traced is asked by running it
                names.clear()
                names.extend(scalars(step(batch)))
            return list(dict.fromkeys(names))

        self._trackers = {"loss"}
        train_names = probe(model.train_step)
        try:
            test_names = probe(model.test_step)
        except Exception as error:
            if not self._own_train_step or self._own_test_step:
                raise
            self.no_validation = first_line(error)
            test_names = []
        return train_names, test_names

    def _trackers_of(self, model: Any, logs: Mapping[str, Any]) -> set[str]:
        """Return the names of the metrics behind a step's loss: means over the steps since they were reset."""
        loss = logs.get("loss" if "loss" in logs else self._wanted, next(iter(logs.values()), None))
        graph = getattr(loss, "graph", None)
        found = {"loss"}
        for metric in model.metrics if graph is not None else ():
            if len(metric.variables) <= 2 and uses(graph, loss, map(plain, metric.variables)):
                found.add(metric.name)
        return found

    def trackers_of(self, model: Any) -> list[Any]:
        """Return the metrics of a model to reset before a step, so that the loss it returns is the batch's own."""
        return [metric for metric in model.metrics if metric.name in self._trackers]

    def _notice(self, graph: Any) -> None:
        """Start over what a training step changes and no model has, such as a teacher at the top of a program."""
        own = {id(plain(v)) for v in (*self._state(self.model), *self.model.metrics_variables, *self._extras)}
        own |= {id(plain(v)) for program in self._programs.values() for v in program.variables}
        own.add(id(plain(self._unseeded.state)))
        self.draws_unseeded |= any(v is plain(self._unseeded.state) for v in graph.variables)
        self.builder.keep(v for v in graph.variables if id(v) not in own)

    def _state(self, model: Any) -> list[Any]:
        """Return the variables that a run starts from: weights, statistics and random states."""
        metrics = {id(v) for v in model.metrics_variables}
        return [v for v in model.variables if id(v) not in metrics]

    def _initial_state(self, seed: int) -> list[Any]:
        """Return the values a seed starts from, drawn by building the model anew under it.

        Where the model has a frozen body, the outputs of that seed's body take their place too.
        """
        if seed not in self._snapshots or (self.frozen and self._bodies[seed] not in self._features):
            with own_draws(seed):
                model = self.new_model(seed)
                if not all(layer.built for layer in model._flatten_layers()):
                    self._build(model)
            if self.frozen:
                found = cut(self.keras, model)
                if found is None:
                    raise ObjectiveError("build_model() must freeze the same layers on every call.")
                self._bodies[seed] = found.digest()
                self._hold_features(found, self._bodies[seed])
                model = found.head
            self.keep_global_seed_generator()
            values = [self.tf.constant(v.numpy()) for v in self._state(model)]
            if [v.shape for v in values] != [v.shape for v in self._state(self.model)]:
                raise ObjectiveError(
                    "build_model() must return the same architecture on every call, got other weights."
                )
            size = sum(v.shape.num_elements() * v.dtype.size for v in values)
            while self._snapshots and size * (len(self._snapshots) + 1) > SNAPSHOT_BYTES:
                self._snapshots.pop(next(iter(self._snapshots)))
            self._snapshots[seed] = values
        if self.frozen:
            self._hold_features(None, self._bodies[seed])
        return self._snapshots[seed]

    def _program(self, chosen: str | OptimizerSpec, batch_size: int) -> _Program:
        spec = find_optimizer(chosen)
        name = f"{spec.keras_class}{sorted(spec.settings.items())}", batch_size
        loop = self._loop if batch_size == self.batch_size else self._loop.resized(batch_size)
        if name not in self._programs:
            optimizer = self.use(self.model, build_optimizer(spec, lambda: self._rate))
            copies = self._build_slots(optimizer)
            state = [*self._state(self.model), self._unseeded.state, *self._extras]
            slots = list(optimizer.variables)

            def reset(state_values: list[Any], slot_values: list[Any]) -> None:
                for variable, value in zip((*state, *slots), (*state_values, *slot_values), strict=True):
                    variable.assign(value)

            self._programs[name] = _Program(
                optimizer=optimizer,
                variables=[*state, *slots],
                reset=self.tf.function(reset, autograph=False),
                initial_slots=[self.tf.constant(v.numpy()) for v in slots],
                copies=copies,
                known=frozenset(id(plain(v)) for v in (*state, *slots)),
                epoch=loop.trace(optimizer, xla=False, without=self.form),
            )
        program = self._programs[name]
        if self.xla and spec.name not in self.plain and program.compiled_epoch is None:
            program.compiled_epoch = loop.trace(program.optimizer, xla=True)
        return program

    def _fall_back(self, form: str, error: Exception) -> None:
        if self.fallback is None or form not in self.fallback:
            self.fallback = f"trains {form}: the epoch cannot be traced as one graph ({first_line(error)})"

    # -- running ----------------------------------------------------------------------------

    def _call(
        self, epoch: TracedEpoch, feed: Any, samples: int, table: Any, recent: Any, validated: AnySplit | None
    ) -> tuple[Epoch, Any]:
        """Call a traced epoch; return what it did and the last two losses, for the next call."""
        tf = self.tf
        if epoch.rows is not None:
            table = np.pad(table, ((0, epoch.rows - len(table)), (0, 0)))
        losses, done, code, recent, train, test = epoch(
            epoch.source.arguments(feed, epoch.rows),
            tf.constant(table, tf.float32),
            tf.constant(samples),
            recent,
            epoch.source.held(validated),
        )
        done, code = int(done), int(code)
        losses = losses.numpy()[:done].astype(float)
        metrics = dict(zip(self.train_names, train.numpy().tolist(), strict=True))
        if losses.ndim == 2:
            losses, weights = losses[:, 0], losses[:, 1]
        else:
            size = epoch.source.batch_size
            weights = np.minimum(size, samples - size * np.arange(done))
        mean = float(np.average(losses, weights=weights)) if done else float("nan")
        metrics |= {"loss": mean, self.loss_name: mean}  # whatever the step calls it, there is a curve of that name
        if validated is not None:
            values = test.numpy().tolist()
            metrics |= {f"val_{name}": value for name, value in zip(self.test_names, values, strict=True)}
            if f"val_{self.loss_name}" in metrics:
                metrics["val_loss"] = metrics[f"val_{self.loss_name}"]
        return Epoch(losses, metrics, done - 1 if code else None, REASONS[code] if code else None), recent

    def _seconds_per_epoch(self, epoch: TracedEpoch, program: _Program, split: AnySplit) -> float:
        """Return the seconds of an epoch without validation, measured on as many of its steps as a second allows."""
        whole = split.steps_per_epoch(self.batch_size)
        self._seconds(epoch, program, split, 1)  # traces and warms up
        steps = int(np.clip(TIMED_SECONDS / 3 / self._seconds(epoch, program, split, 1), 1, whole))
        return float(np.median([self._seconds(epoch, program, split, steps) for _ in range(3)])) * whole / steps

    def _seconds(self, epoch: TracedEpoch, program: _Program, split: AnySplit, steps: int) -> float:
        """Return the seconds of the first steps of a run."""
        self._reset(program, split.seed)
        feed, samples = self.source.start(split).epoch(steps)
        table = np.stack([np.full(steps, 1e-6), ceilings((), None, steps, 0)], axis=1)
        started = time.perf_counter()
        self._call(epoch, feed, samples, table, NO_RECENT_LOSSES, None)
        return time.perf_counter() - started

    def _xla_obstacle(self) -> str | None:
        """Return why XLA is not worth trying, known without measuring, or None."""
        if self.model.run_eagerly:
            return "the model asks to run eagerly"
        if not isinstance(self.source, ArraySource):
            return "batches come from a tf.data pipeline"
        if any(isinstance(leaf, self.tf.RaggedTensor) for part in self.source.parts for _, leaf in leaves(part)):
            return "ragged inputs cannot be compiled"
        if any(leaf.dtype == self.tf.string for part in self.source.parts for _, leaf in leaves(part)):
            return "strings cannot be compiled"
        if self.on_gpu:
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
        split: AnySplit,
        initial_losses: Floats,
        epoch: TracedEpoch | None = None,
    ) -> None:
        self.engine, self.program, self.split, self.initial_losses = engine, program, split, initial_losses
        self.steps_done = 0
        self._epoch = epoch or program.compiled_epoch or program.epoch
        self._cursor: Cursor = self._epoch.source.start(split)
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
        feed, samples = self._cursor.epoch()
        validate = validate and self.split.sizes[1] > 0 and bool(self.engine.test_names)
        return self._go(feed, samples, np.asarray(rates), rule, validate)

    def steps(self, rates: Any, rule: DivergenceRule | None = None) -> Epoch:
        """Train as many steps as there are rates, over as many shuffles as that takes, without validation.

        Args and returns: as `epoch`.
        """
        rates = np.asarray(rates)
        # A compiled epoch has room for so many steps and no more; the run's state carries over.
        chunk = self._epoch.rows or len(rates)
        if self.split.sizes[0] < self._epoch.source.batch_size:
            chunk = 1  # a whole shuffle is one step
        losses: list[Floats] = []
        for start in range(0, len(rates), chunk):
            part = rates[start : start + chunk]
            feed, samples = self._cursor.steps(len(part))
            result = self._go(feed, samples, part, rule, False)
            losses.append(result.losses)
            if result.diverged_step is not None:
                return replace(result, losses=np.concatenate(losses), diverged_step=start + result.diverged_step)
        return replace(result, losses=np.concatenate(losses))

    def validate(self) -> dict[str, float]:
        """Return the validation metrics as they are now, without training; keeps the place in the data."""
        cursor = self._epoch.source.start(self.split)
        feed, _ = cursor.epoch(1)
        return {k: v for k, v in self._go(feed, 0, np.zeros(0), None, True).metrics.items() if k.startswith("val_")}

    def state(self) -> dict[str, NDArray[Any]]:
        """Return all that the next epoch depends on: variables, random states, and the position in the data."""
        values = {f"variable-{i}": np.asarray(v.numpy()) for i, v in enumerate(self.program.variables)}
        for i, variable in enumerate(self.engine.builder.outliving(but=self.program.known)):
            values[f"apart-{i}"] = np.asarray(variable.numpy())
        for i, place in enumerate(self._cursor.position()):
            values[f"cursor-{i}"] = np.asarray(place)
        return {**values, "recent": np.asarray(self._recent), "steps": np.asarray(self.steps_done)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where a run of the same configuration and split was when `state` was taken.

        Args:
            state: what its `state()` returned after a whole epoch.

        Raises:
            KeyError, ValueError: when it is the state of another model.
        """
        variables = self.program.variables
        values = [state[f"variable-{i}"] for i in range(len(variables))]
        if any(value.shape != tuple(v.shape) for value, v in zip(values, variables, strict=True)):
            raise ValueError("a run's state must have the shapes of the model's variables")
        slots = len(variables) - len(self.program.initial_slots)
        tensors = [self.engine.tf.constant(value) for value in values]
        self.program.reset(tensors[:slots], tensors[slots:])
        for i, variable in enumerate(self.engine.builder.outliving(but=self.program.known)):
            variable.assign(state[f"apart-{i}"])
        places = sum(name.startswith("cursor-") for name in state)
        self._cursor.go_to([state[f"cursor-{i}"] for i in range(places)])
        self._recent, self.steps_done = np.asarray(state["recent"], np.float32), int(state["steps"])

    def _go(self, feed: Any, samples: int, rates: Any, rule: DivergenceRule | None, validate: bool) -> Epoch:
        limits = ceilings(self.initial_losses, rule, len(rates), self.steps_done)
        table = np.stack([rates, limits], axis=1)
        result, self._recent = self.engine._call(
            self._epoch, feed, samples, table, self._recent, self.split if validate else None
        )
        self.steps_done += len(result.losses)
        return result


def _any_size(tf: Any, tensor: Any, size: int | None) -> Any:
    """Return the form of a batch of a size, or of any."""
    spec = tf.type_spec_from_value(tensor)
    return tf.TensorSpec([size, *tensor.shape[1:]], tensor.dtype) if isinstance(spec, tf.TensorSpec) else spec
