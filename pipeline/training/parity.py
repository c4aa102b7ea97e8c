"""A few steps of the engine beside the same steps of `model.fit`, and validation beside `model.evaluate`.

The engine resets, shuffles, gathers and traces in its own way; this compares what comes of it with
plain Keras on the user's own model and data.  Keras runs its steps eagerly here, which needs no
tracing; where that differs, also as a graph, as `fit` does by default.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.training.data import Data, as_tensor, map_tree
from pipeline.training.engine import Engine
from pipeline.training.optimizers import build_optimizer, find_optimizer
from pipeline.training.seeds import draws, own_draws
from pipeline.training.sources import AnySplit, shuffle
from pipeline.training.splits import Split

STEPS = 3
"""Steps that are compared before a study trains."""

TOLERANCE = 1e-3
"""By how much, as a share, losses and metrics may differ after a few steps."""

VALIDATION_SHARE = 0.1
"""Without training in between rounding explains so much of that ..."""

WEIGHTS_TOLERANCE = 2e-2
"""... and the distance between the weights, as a share of the way that they went."""

HALF_PRECISION = 20.0
"""Times that much for models that compute with 16 bits."""

VALIDATION_BATCHES = 50
"""A validation dataset of more batches than this is not run through for the comparison."""


@dataclass(frozen=True)
class Trained:
    """What a few steps came to.

    Attributes:
        losses: loss of each step, shape (steps,).
        metrics: training metrics, and validation metrics with "val_" before the name.
        begin, weights: the trainable weights before and afterwards.
    """

    losses: np.ndarray
    metrics: dict[str, float]
    begin: list[np.ndarray]
    weights: list[np.ndarray]


@dataclass(frozen=True)
class Parity:
    """How far the engine and Keras differ.

    Attributes:
        training: largest difference of a loss, a training metric or the weights, as a share.
        validation: largest difference of a validation metric, as a share; None where it was not compared.
        worst: what differs most, with both values.
        allowed: the difference that rounding explains.
        why_not: why they cannot be compared, or None.
        shown: what `model.fit` shows in place of what a step of the model's own returns; empty for nothing.
    """

    training: float
    validation: float | None
    worst: str
    allowed: float
    why_not: str | None = None
    shown: str = ""

    @property
    def agrees(self) -> bool:
        """Return whether the engine trains and validates as Keras does, as far as that can be compared."""
        held = max(self.allowed * VALIDATION_SHARE, 2 * self.training)  # what the weights differ shows there too
        return self.why_not is not None or (self.training <= self.allowed and (self.validation or 0.0) <= held)


class Reference:
    """The same few steps by Keras; run when they are first asked for, and kept.

    Args:
        engine: the engine.
        optimizer: whose steps.
        split: the fold.
        rate: learning rate of every step.
        steps: how many steps; the last of them is a partial batch where the data leave one.
    """

    def __init__(self, engine: Engine, optimizer: str, split: AnySplit, rate: float, steps: int = STEPS) -> None:
        self.engine, self.spec, self.rate, self.steps = engine, find_optimizer(optimizer), rate, steps
        self.split = probe(split, engine.batch_size, steps) if isinstance(split, Split) else split
        self._kept: dict[bool, Trained] = {}
        self._draws = 0
        self._shown = ""

    def compare(self) -> Parity:
        """Train a few steps by the engine as it is now, and say how far Keras is from them.

        Raises:
            Exception: whatever the model's own code raises under Keras in both ways.
        """
        ours = self._by_engine()
        half = self.engine.model.compute_dtype in ("float16", "bfloat16")
        allowed = TOLERANCE * (HALF_PRECISION if half else 1.0)
        found = None
        for eagerly in (True, False):
            try:
                theirs = self._by_keras(eagerly)
            except Exception:  # a step that runs only in a graph, or only eagerly
                if not eagerly and found is None:
                    raise
                continue
            training, worst = _difference(ours, theirs)
            validation, worst_held = _validation_difference(ours, theirs)
            worst = worst_held if (validation or 0.0) > training else worst
            found = Parity(training, validation, worst, allowed, shown=self._shown)
            if found.agrees:
                return found
        assert found is not None
        again = self._by_engine()
        if max(_difference(ours, again)[0], _validation_difference(ours, again)[0] or 0.0) > allowed / 10:
            return Parity(0.0, None, "", allowed, "two runs of the same seed differ: something in it draws at random")
        if self.engine.draws_unseeded:
            said = "it draws by keras.random without a seed; give it a keras.random.SeedGenerator of the model's own"
            return Parity(0.0, None, "", allowed, said)
        if self._draws:
            return Parity(0.0, None, "", allowed, "its random operations are not Keras's, which no seed brings back")
        return found

    def _by_engine(self) -> Trained:
        engine = self.engine
        run = engine.start(self.spec, self.split)
        begin = [v.numpy() for v in engine.model.trainable_variables]
        if isinstance(self.split, Split):
            result = run.epoch(np.full(self.split.steps_per_epoch(engine.batch_size), self.rate))
        else:
            result = run.steps(np.full(min(self.steps, self.split.steps), self.rate))
        weights = [v.numpy() for v in engine.model.trainable_variables]
        measured = dict(result.metrics)
        if self._validates_stream():
            measured |= run.validate()
        return Trained(result.losses, {k: v for k, v in measured.items() if k in _names(engine)}, begin, weights)

    def _validates_stream(self) -> bool:
        stream: Any = self.engine.data
        return (
            not isinstance(self.split, Split)
            and bool(self.engine.test_names)
            and 0 <= int(stream.validation.cardinality()) <= VALIDATION_BATCHES
        )

    def _by_keras(self, eagerly: bool) -> Trained:
        if eagerly not in self._kept:
            before = draws()
            self._kept[eagerly] = self._fit(eagerly)
            self._draws += draws() - before
        return self._kept[eagerly]

    def _fit(self, eagerly: bool) -> Trained:
        engine, seed = self.engine, self.split.seed
        with own_draws(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were heard when the engine traced the step
            model = engine.new_model(seed)
            model.run_eagerly = eagerly or model.run_eagerly
            engine.use(model, build_optimizer(self.spec, self.rate))
            recorder = _recorder(engine, model)
            engine.model.reset_metrics()  # a metric that models share has counted what the engine trained
            returned = _returned_by_test_step(model) if engine.own_test_step and eagerly else {}
            if isinstance(self.split, Split):
                size = engine.batch_size
                x, y, weight = _parts(engine, shuffle(self.split, 0))
                history = model.fit(
                    x, y, sample_weight=weight, batch_size=size, shuffle=False, verbose=0, callbacks=[recorder]
                ).history
                held = _parts(engine, self.split.validation)
            else:
                engine.source.start(self.split)
                stream: Any = engine.data
                few = stream.train.take(min(self.steps, self.split.steps))
                history = model.fit(few, verbose=0, callbacks=[recorder]).history
            metrics = {
                name: float(np.ravel(values[-1])[0]) for name, values in history.items() if np.size(values[-1]) == 1
            }
            if engine.own_train_step:  # `fit` may show metrics in place of what the step returns
                metrics |= {k: v for k, v in recorder.last.items() if k in metrics}
            metrics.pop(engine.loss_name, None)
            if isinstance(self.split, Split) and engine.test_names and self.split.sizes[1]:
                test = model.evaluate(
                    held[0], held[1], sample_weight=held[2], batch_size=size, verbose=0, return_dict=True
                )
                metrics |= {f"val_{name}": float(np.ravel(v)[0]) for name, v in test.items() if np.size(v) == 1}
            elif self._validates_stream():
                test = model.evaluate(stream.validation, verbose=0, return_dict=True)
                metrics |= {f"val_{name}": float(np.ravel(v)[0]) for name, v in test.items() if np.size(v) == 1}
            elif not isinstance(self.split, Split) and engine.test_names:
                model.evaluate(stream.validation.take(1), verbose=0)  # too many to compare: one batch is tried
        engine.keep_global_seed_generator()
        for name, value in returned.items():
            theirs = metrics.get(f"val_{name}")
            if theirs is not None and _share(value, theirs, 0.1) > TOLERANCE:
                self._shown = f"In val_{name} model.fit shows {theirs:.4g}, and test_step returns {value:.4g}"
                metrics[f"val_{name}"] = value
        return Trained(np.asarray(recorder.losses), metrics, [], [v.numpy() for v in model.trainable_variables])


def probe(split: Split, batch_size: int, steps: int = STEPS) -> Split:
    """Return whole batches of a fold and its partial one: so many steps of training, up to three of validation."""

    def some(index: np.ndarray, whole: int) -> np.ndarray:
        rest = len(index) % batch_size
        return index[: min(len(index), whole * batch_size + rest)]

    return Split(some(split.train, steps - 1), some(split.validation, 2), split.seed)


def _names(engine: Engine) -> set[str]:
    """Return the names of metrics that Keras reports too."""
    own = {*engine.train_names, *(f"val_{name}" for name in engine.test_names)}
    return own - {engine.loss_name}


def _parts(engine: Engine, index: np.ndarray) -> tuple[Any, Any, Any]:
    data = engine.data
    assert isinstance(data, Data)
    taken = data.take(index)
    return tuple(  # type: ignore[return-value]
        map_tree(lambda a: as_tensor(engine.tf, a), part) if part is not None else None
        for part in (taken.x, taken.y, taken.sample_weight)
    )


def _recorder(engine: Engine, model: Any) -> Any:
    """Return a callback that keeps the loss of every batch."""

    class Recorder(engine.keras.callbacks.Callback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []
            self.last: dict[str, float] = {}

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            for metric in engine.trackers_of(model):
                metric.reset_state()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.last = {k: float(np.ravel(v)[0]) for k, v in (logs or {}).items() if np.size(v) == 1}
            self.losses.append(self.last[engine.loss_name])

    return Recorder()


def _returned_by_test_step(model: Any) -> dict[str, float]:
    """Return a dict that will hold what the last call of a model's own `test_step` returned."""
    returned: dict[str, float] = {}
    step = model.test_step

    def noted(data: Any) -> Any:
        logs = step(data)
        returned.update({k: float(np.ravel(v)[0]) for k, v in logs.items() if np.size(v) == 1})
        return logs

    model.test_step = noted
    return returned


def _share(ours: float, theirs: float, scale: float = 0.0) -> float:
    if np.isnan(ours) and np.isnan(theirs):
        return 0.0
    if not (np.isfinite(ours) and np.isfinite(theirs)):
        return 0.0 if ours == theirs else np.inf
    return abs(ours - theirs) / max(abs(theirs), scale, 1e-3)


def _difference(ours: Trained, theirs: Trained) -> tuple[float, str]:
    """Return the largest difference in training, as a share, and what it is."""
    found: list[tuple[float, str]] = [(0.0, "nothing")]
    if len(ours.losses) != len(theirs.losses):
        return np.inf, f"{len(ours.losses)} steps, Keras {len(theirs.losses)}"
    scale = float(np.max(np.abs(theirs.losses), initial=0.0))
    for step, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        found.append((_share(float(a), float(b), scale), f"loss of step {step + 1}: {a:.6g}, Keras {b:.6g}"))
    for name in ours.metrics.keys() & theirs.metrics.keys():
        if not name.startswith("val_"):
            a, b = ours.metrics[name], theirs.metrics[name]
            found.append((_share(a, b, 0.1), f"{name}: {a:.6g}, Keras {b:.6g}"))
    apart, way, length = (
        np.sqrt(sum(float(np.square(a.astype(float) - b).sum()) for a, b in pairs))
        for pairs in (
            zip(ours.weights, theirs.weights, strict=True),
            zip(ours.weights, ours.begin, strict=True),
            ((w, np.zeros(())) for w in ours.weights),
        )
    )
    share = float(apart / max(way, 1e-4 * length, 1e-9))
    found.append((share * TOLERANCE / WEIGHTS_TOLERANCE, f"weights: apart by {share:.2g} of the way that they went"))
    return max(found, key=lambda pair: pair[0])


def _validation_difference(ours: Trained, theirs: Trained) -> tuple[float | None, str]:
    names = [name for name in ours.metrics.keys() & theirs.metrics.keys() if name.startswith("val_")]
    if not names:
        return None, ""
    found = [
        (_share(ours.metrics[n], theirs.metrics[n], 0.1), f"{n}: {ours.metrics[n]:.6g}, Keras {theirs.metrics[n]:.6g}")
        for n in names
    ]
    return max(found, key=lambda pair: pair[0])
