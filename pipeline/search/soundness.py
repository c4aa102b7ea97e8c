"""A study proves itself sound before its first training, on the user's own model and data.

Runs must not depend on one another, the optimizer that is searched must be the one that trains, the
engine must train as `model.fit` does, and the loss must be what a step lowers and belong to the
outputs that it is given.  What makes every answer worthless refuses the study; what may be meant is
a doubt, said before anything else.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.core.copies import copies
from pipeline.core.heads import BINARY, NEVER_NEGATIVE, Head, contradiction, mismatch
from pipeline.errors import ObjectiveError, plain_text
from pipeline.objective import loss_names
from pipeline.search.prepare import Prepared, training_failed
from pipeline.training.building import further_optimizers, name_of
from pipeline.training.data import Data, as_tensor, leaves, map_tree
from pipeline.training.engine import Engine, Run
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.outputs import ends_in
from pipeline.training.parity import Reference
from pipeline.training.seeds import draws
from pipeline.training.sources import AnySplit
from pipeline.training.splits import Split

LOWERING_STEPS = 10
"""Steps on one batch after which its loss must be lower."""

LOWERING_SECONDS = 2.0
"""About how long those steps may take, in seconds; fewer are taken where they are slow."""

LOWERING_RATES = (1.0, 0.1, 10.0, 0.01, 1e-3, 1e-5)
"""Rates that are tried one after the other, as multiples of the optimizer's usual one, until the loss falls."""

LOGARITHMIC = ("poisson", "meansquaredlogarithmicerror", "msle", "kldivergence")
"""Losses with a logarithm of the outputs."""

MOST_TARGETS = 1 << 23
"""About so many values of the targets are looked at."""

COPIED = 0.01
"""From this share of validation samples on, copies among the training samples are told."""

SEEDED = (
    "The program seeds TensorFlow, and model.fit then trains on one order of samples, repeated in every epoch, while "
    "lrtune shuffles anew: the pasted code may end above these values. Do not seed, or train on a "
    "tf.data.Dataset with .shuffle(...), which shuffles anew under a seed too."
)
"""What is said to a program that calls `keras.utils.set_random_seed` or `tf.random.set_seed`."""

ROUNDED = 1e-5
"""Weights that moved by less than this share of the largest have not been trained: SAM goes up and down again."""

ACCUMULATED = 32
"""Over so many batches a step may sum gradients before it asks the optimizer."""

STEP = ("keras/src/backend/", "keras/src/optimizers/", "keras/src/losses/", "keras/src/trainers/trainer.py")
"""Where in Keras the code of a training step stands, whose warnings are shown."""

SAME = 1e-4
"""Losses of two runs of the same seed may differ by this share, as parallel sums do."""


@dataclass(frozen=True)
class Proof:
    """What a study has shown of itself.

    Attributes:
        first_loss: loss of the first batch.
        doubts: what may be wrong and may be meant, a sentence or two each, the gravest first.
        notes: what could not be compared, and what is done about it.
        way: how the engine trains, see `Engine.way`.
        reference: the steps of Keras that the engine was compared with.
    """

    first_loss: float
    doubts: tuple[str, ...]
    notes: tuple[str, ...]
    way: Mapping[str, Any]
    reference: Reference

    def as_dict(self) -> dict[str, Any]:
        """Return it as it is stored."""
        return {"doubts": list(self.doubts), "notes": list(self.notes), "way": dict(self.way)}


def prove(prepared: Prepared) -> Proof:
    """Test a study on its own model and data; trains a few steps, and changes nothing.

    Args:
        prepared: the study; its engine goes on in a slower way where the fastest differs from Keras.

    Raises:
        ObjectiveError: for what makes every answer worthless: where, the rule, what was found, the remedy.
    """
    engine, split, where = prepared.engine, prepared.splits[0], prepared.objective.where
    optimizer = chosen(prepared.study.config.search.optimizers)
    doubts: list[str] = []
    with _heard() as warned:
        loss = _first_loss(prepared, optimizer)
    try:
        found, fatal = _heads(prepared, warned)
        doubts += found
        if fatal is not None:
            raise ObjectiveError(f"{where}: {fatal}")
        doubts += _metrics_of_scores(prepared)
        doubts += _optimizer_trains(engine, optimizer, split, where)
        reference = Reference(engine, optimizer, split, OPTIMIZERS[optimizer].default_learning_rate)
        notes, differing = _independent(engine, optimizer, split, where)
        notes = notes if notes or differing else agree(prepared, reference)
        doubts += differing
        doubts += _shown_otherwise(reference)
        doubts = [*_loss_falls(prepared, optimizer), *doubts]
    except ObjectiveError:
        raise
    except Exception as error:  # whatever the model's own code raises in a step
        raise training_failed(prepared, optimizer, error) from error
    doubts += data_doubts(prepared)
    told = any("from_logits=True" in doubt for doubt in doubts)
    doubts += [
        f"Keras warns about the training step: {text}" for text in warned if not (told and "from_logits=True" in text)
    ]
    return Proof(loss, tuple(doubts), tuple(notes), engine.way, reference)


def chosen(optimizers: Sequence[str]) -> str:
    """Return the optimizer of a study to test with: the last that stays where it is at rate 0."""
    return next((name for name in reversed(optimizers) if OPTIMIZERS[name].rests_at_zero), optimizers[-1])


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what Keras warns of while a training step is traced, a line each."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield heard
        finally:
            for warning in caught:
                if any(place in str(warning.filename) for place in STEP) and issubclass(warning.category, UserWarning):
                    text = " ".join(plain_text(str(warning.message)).replace("```", " ").split()).strip("\"' ")
                    if text not in heard:
                        heard.append(text)


def _first_loss(prepared: Prepared, optimizer: str) -> float:
    """Return the loss of the first batch.

    Raises:
        ObjectiveError: when the step fails or a loss is not finite.
    """
    try:
        return first_loss(prepared.engine, optimizer, prepared.splits[0], prepared.objective.where)
    except ObjectiveError:
        raise
    except Exception as error:  # the first step of training: whatever the model's code raises
        raise training_failed(prepared, optimizer, error) from error


def first_loss(engine: Engine, optimizer: str, split: AnySplit, where: str) -> float:
    """Return the loss of the first batch; where the data have NaN, that of samples with them is finite too.

    Raises:
        ObjectiveError: when a loss is not finite.
    """
    data = engine.data if isinstance(engine.data, Data) else engine.data.first
    holes = data.holes if data is not None else ""
    remedy = "Impute or drop these values in load_data(), or let the loss leave them out."
    result = engine.start(optimizer, split).steps([1e-6])
    if result.reason is not None:
        name = (loss_names(engine.whole.loss) or [""])[0] if engine.whole.loss is not None else ""
        other = (
            f"The loss '{name}' takes the logarithm of the outputs, which must be above 0: end the model in softplus "
            "or exponential."
            if name in LOGARITHMIC
            else "Check the targets and the loss, and scale the inputs to about unit size."
        )
        raise ObjectiveError(
            f"{where}: the first batch must have a finite loss, got {result.losses[0]:g}. "
            + (f"load_data(): {holes}. {remedy}" if holes else other)
        )
    if holes and data is engine.data and isinstance(split, Split):
        holed = np.intersect1d(split.train, data.samples_with_holes())[: engine.batch_size]
        if len(holed) and not engine.source.fixed:
            some = Split(holed.astype(np.int32), split.validation[:0], split.seed)
            loss = float(engine.start(optimizer, some).steps([1e-6]).losses[0])
            if not np.isfinite(loss):
                raise ObjectiveError(
                    f"{where}: load_data(): {holes}, and a batch of such samples must have a finite loss, got "
                    f"{loss:g}. {remedy}"
                )
    return float(result.losses[0])


# -- the data ----------------------------------------------------------------------------------


def data_doubts(prepared: Prepared) -> list[str]:
    """Return what of the data makes validation say something else than one takes it for."""
    objective, split, found = prepared.objective, prepared.splits[0], []
    trained, held = objective.weighted
    if held is not None and trained != held:
        weighted, other = ("training", "validation") if trained else ("validation", "training")
        found.append(
            f"The {weighted} samples have weights and the {other} samples have none, so that the two losses measure "
            f"different things, and {prepared.monitor.label} may get worse while the model does what it is trained "
            "for. Give both weights, or neither; or monitor a metric that does not depend on them."
        )
    if not prepared.monitor.on_validation:
        found.append(
            f"The study optimizes {prepared.monitor.label}: nothing tells whether the answer holds for samples that "
            "the model has not seen."
        )
    if isinstance(objective.train, Data) and isinstance(split, Split) and len(split.validation):
        arrays = [leaf for _, leaf in leaves((objective.train.x, objective.train.y))]
        plain = all(isinstance(leaf, np.ndarray) for leaf in arrays)
        count = copies(arrays, split.train, split.validation) if plain else 0
        share = count / len(split.validation)
        if count > 1 and share >= COPIED:
            found.append(
                f"{count} of {len(split.validation)} validation samples stand among the training samples as exact "
                "copies, as oversampling before the split makes them: validation rewards what remembers them. Copy "
                "samples after the split only, drop the copies, or give groups() that keep them on one side."
            )
    if objective.stateful:
        found.append(
            "A layer has stateful=True, and training shuffles its batches, as model.fit does by default: the state "
            "that it carries from batch to batch is that of other samples. Remove stateful=True, or make one sample "
            "of what belongs together."
        )
    if objective.seeded:
        found.append(SEEDED)
    return found


# -- loss and outputs ------------------------------------------------------------------------


def heads_of(engine: Engine, split: AnySplit, warned: Sequence[str]) -> list[Head]:
    """Return the outputs of a model with their losses, on the first batch; none where they cannot be paired."""
    model, tf = engine.whole, engine.tf
    if engine.own_test_step or model.loss is None:
        return []
    x, y = _first_batch(engine, split)
    if y is None:
        return []
    try:
        outputs = model(x, training=False)
        names = [path for path, _ in leaves(_as_tree(outputs))]
        flat, targets = tf.nest.flatten(outputs), tf.nest.flatten(y)
        losses = _paired_losses(engine.keras, model.loss, _as_tree(outputs))
        ends = ends_in(tf, engine.keras, model, x)
    except Exception:  # whatever a model of the user's own makes of it; training has its own say
        return []
    everything = _all_targets(engine.data, y)
    if not len(flat) == len(targets) == len(losses) == len(ends) == len(everything):
        return []
    about = " ".join(warned)
    found = []
    for name, output, loss, end, target in zip(names, flat, losses, ends, everything, strict=True):
        if loss is None:
            continue
        kind, from_logits = loss
        values = output.numpy()
        if values.dtype.kind == "f":
            shown = name if len(names) > 1 else ""
            found.append(Head(shown, kind, from_logits, end, values, target, "from_logits=True" in about))
    return found


def _first_batch(engine: Engine, split: AnySplit) -> tuple[Any, Any]:
    """Return x and y of the first batch as tensors; y is None where there is none."""
    data = engine.data
    if isinstance(data, Data):
        assert isinstance(split, Split)
        taken = data.take(split.train[: engine.batch_size])
        x, y, _ = (*taken.parts(), None, None)[:3]
        return map_tree(lambda a: as_tensor(engine.tf, a), x), map_tree(lambda a: as_tensor(engine.tf, a), y)
    x, y, _ = engine.keras.utils.unpack_x_y_sample_weight(next(iter(data.train)))
    return x, y


def _all_targets(data: Any, y: Any) -> list[np.ndarray]:
    """Return the targets of all samples, evenly spaced ones where they are very many; of a dataset, one batch's."""
    if isinstance(data, Data):
        return [np.asarray(leaf[:: 1 + leaf.size // MOST_TARGETS]) for _, leaf in leaves(data.y)]
    return [np.asarray(leaf.numpy()) for _, leaf in leaves(_as_tree(y))]


def _as_tree(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _paired_losses(keras: Any, loss: Any, outputs: Any) -> list[tuple[str, bool] | None]:
    """Return (name, from_logits) of the loss of every output, in their order."""
    if isinstance(loss, Mapping):
        given = [loss.get(key) for key in outputs] if isinstance(outputs, Mapping) else list(loss.values())
    elif isinstance(loss, list | tuple):
        given = list(loss)
    else:
        given = [loss] * len(leaves(outputs))
    found: list[tuple[str, bool] | None] = []
    for one in given:
        if one is None:
            found.append(None)
            continue
        resolved = keras.losses.get(one) if isinstance(one, str) else one
        config: dict[str, Any] = getattr(resolved, "get_config", dict)()
        found.append((loss_names(one)[0], bool(config.get("from_logits", False))))
    return found


def _heads(prepared: Prepared, warned: Sequence[str]) -> tuple[list[str], str | None]:
    """Return doubts about loss and outputs, and what refuses the study, or None."""
    doubts: list[str] = []
    for head in heads_of(prepared.engine, prepared.splits[0], warned):
        found = mismatch(head)
        if found is not None and found.refused:
            return doubts, found.text
        if found is not None:
            doubts.append(f"{found.text[0].upper()}{found.text[1:]}")
    return doubts, None


def _metrics_of_scores(prepared: Prepared) -> list[str]:
    """Return the doubt that metrics of a binary classifier take its raw scores for probabilities."""
    engine = prepared.engine
    heads = heads_of(engine, prepared.splits[0], ())
    if len(heads) != 1 or heads[0].loss not in BINARY or not heads[0].from_logits:
        return []
    remedies = []
    for metric in (m for each in engine.model.metrics for m in getattr(each, "metrics", None) or [each]):
        kind, threshold = type(metric).__name__, getattr(metric, "threshold", getattr(metric, "_threshold", None))
        if kind == "BinaryAccuracy" and threshold != 0:
            remedies.append(f"{metric.name}: keras.metrics.BinaryAccuracy(threshold=0.0)")
        elif kind == "AUC" and not getattr(metric, "_from_logits", False):
            remedies.append(f"{metric.name}: keras.metrics.AUC(from_logits=True)")
        elif kind in ("Precision", "Recall") and getattr(metric, "init_thresholds", None) is None:
            remedies.append(f"{metric.name}: keras.metrics.{kind}(thresholds=0.0)")
    if not remedies:
        return []
    return [
        "The loss knows that the model's outputs are scores (from_logits=True), and metrics take them for "
        f"probabilities at 0.5, so that their values are wrong. Compile {'; '.join(remedies)}."
    ]


# -- the optimizer that trains -----------------------------------------------------------------


def _weights(engine: Engine) -> list[np.ndarray]:
    return [v.numpy() for v in engine.model.trainable_variables]


def _moved(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> list[int]:
    """Return which weights went further than adding and taking away again rounds."""

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        scale = float(np.max(np.abs(a), initial=0.0))
        return bool(np.allclose(a, b, rtol=0, atol=ROUNDED * scale, equal_nan=True))

    return [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not same(a.astype(float), b.astype(float))]


def _count(run: Run) -> int:
    """Return how often a run's optimizer has been asked for a step."""
    optimizer = run.program.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    scaled = getattr(optimizer, "step_counter", None)
    return int(inner.iterations.numpy()) + (int(scaled.numpy()) if scaled is not None else 0)


def _optimizer_trains(engine: Engine, optimizer: str, split: AnySplit, where: str) -> list[str]:
    """Return doubts about who trains.

    Raises:
        ObjectiveError: when the searched optimizer does not train, or another trains too.
    """
    if not engine.model.trainable_variables:
        raise ObjectiveError(
            f"{where}: build_model() must return a model with weights to train, got none that is trainable. Unfreeze "
            "a layer, or add one."
        )
    rate = OPTIMIZERS[optimizer].default_learning_rate
    run = engine.start(optimizer, split)
    begin, counted = _weights(engine), _count(run)
    scale = getattr(run.program.optimizer, "dynamic_scale", None)
    scaled = None if scale is None else float(scale.numpy())
    run.steps([0.0])
    at_zero = _moved(begin, _weights(engine))
    resting = _weights(engine)
    run.steps([rate])
    trained = _moved(resting, _weights(engine))

    def is_used() -> bool:
        return _count(run) > counted or (scale is not None and float(scale.numpy()) != scaled)

    for _ in range(ACCUMULATED):  # gradients may be summed over several batches
        if is_used():
            break
        run.steps([rate])
    used = is_used()
    others = _others(engine, optimizer, split, rate) if at_zero or not used else []
    named = f"; its step uses {', '.join(others)}" if others else ""
    if not used:
        raise ObjectiveError(
            f"{where}: the training step must use the optimizer that the model is compiled with, which is the one "
            f"that is searched, got a step that never does{named}. Let train_step call self.optimizer."
            "apply_gradients(...), and leave the rates of other optimizers alone."
        )
    if others:
        raise ObjectiveError(
            f"{where}: only the optimizer that the model is compiled with may train it, since only that one is "
            f"searched{named} beside it. Train everything with self.optimizer, or freeze what the others train."
        )
    free = [i for i in at_zero if engine.model.trainable_variables[i].constraint is None] if at_zero else []
    if free and OPTIMIZERS[optimizer].rests_at_zero:
        free = [i for i in free if i not in _moved_by_layers(engine, split)]
    if free and OPTIMIZERS[optimizer].rests_at_zero:
        listed = ", ".join(name_of(engine.model.trainable_variables[i]) for i in free[:3])
        if set(free) & set(trained):
            return [
                f"The training step moves weights by itself, at a learning rate of 0 too ({listed}): what it does "
                "there is not searched. If it trains them, let self.optimizer do it."
            ]
    return []


def _moved_by_layers(engine: Engine, split: AnySplit) -> list[int]:
    """Return which trainable weights a forward pass moves, as spectral normalization does."""
    before = _weights(engine)
    try:
        engine.model(engine.source.sample_inputs(), training=True)
    except Exception:  # a model that cannot be called so
        return []
    return _moved(before, _weights(engine))


def _others(engine: Engine, optimizer: str, split: AnySplit, rate: float) -> list[str]:
    """Return the optimizers, other than the searched one, that a training step uses, in words."""
    keras = engine.keras
    known = {id(one): name for name, one in further_optimizers(keras, engine.model).items()}
    run = engine.start(optimizer, split)
    ours = {id(run.program.optimizer), id(getattr(run.program.optimizer, "inner_optimizer", None))}
    found = [one for one in gc.get_objects() if isinstance(one, keras.optimizers.Optimizer) and id(one) not in ours]
    before = [_iterations(one) for one in found]
    run.steps([rate])
    moved = [one for one, count in zip(found, before, strict=True) if _iterations(one) != count]
    return [f"'{known[id(one)]}' ({type(one).__name__})" if id(one) in known else type(one).__name__ for one in moved]


def _iterations(optimizer: Any) -> int:
    try:
        return int(optimizer.iterations.numpy())
    except Exception:  # one that is not built, or belongs to a graph
        return -1


# -- the engine beside Keras -------------------------------------------------------------------


def agree(prepared: Prepared, reference: Reference) -> list[str]:
    """Let the engine go on in the fastest way that trains as `model.fit` does.

    Args:
        prepared: the study.
        reference: a few steps by Keras.

    Returns:
        What could not be compared, and what is done more slowly and why, a line each.

    Raises:
        ObjectiveError: when even the slowest way differs.
    """
    engine, where = prepared.engine, prepared.objective.where
    notes: list[str] = []
    while True:
        found = reference.compare()
        if found.why_not is not None:
            return [*notes, f"the engine cannot be compared with model.fit here: {found.why_not}"]
        if found.agrees:
            return notes
        worst = found.worst
        instead = engine.slower(validation=found.training <= found.allowed)
        if instead is None:
            raise ObjectiveError(
                f"{where}: a few steps of lrtune's engine must agree with model.fit on the same batches, got another "
                f"{worst}. This is a fault of lrtune: please report it with the model."
            )
        engine.fallback = f"{instead}, for the fastest way gave other numbers than model.fit ({worst})"
        notes.append(f"trains by {engine.fallback}")


def _shown_otherwise(reference: Reference) -> list[str]:
    """Return the doubt that Keras shows other numbers than the model's own steps return."""
    shown = reference.compare().shown
    if not shown:
        return []
    return [
        f"{shown}: Keras shows its own metric of that name, which the step does not update. The "
        "study goes by what the step returns. Update the metric in the step, or return the value under another name."
    ]


# -- runs, one after the other -----------------------------------------------------------------


def _independent(engine: Engine, optimizer: str, split: AnySplit, where: str) -> tuple[list[str], list[str]]:
    """Return a note where runs differ by known random numbers, and a doubt where they differ by something else.

    Raises:
        ObjectiveError: when a run depends on what ran before it.
    """
    rate = OPTIMIZERS[optimizer].default_learning_rate

    def losses() -> np.ndarray:
        return engine.start(optimizer, split).steps(np.full(2, rate)).losses

    before = draws()
    first = losses()
    drawn = engine.drawn_anew(split.seed)
    second = losses()
    if drawn is not None:
        raise ObjectiveError(
            f"{where}: build_model() must return the same initial weights whenever it is called under the same seed, "
            f"got others for '{drawn}' after a run had trained. Make every layer inside build_model(), and draw its "
            "weights by Keras's initializers."
        )
    if np.allclose(first, second, rtol=SAME, atol=1e-7, equal_nan=True):
        return [], []
    differ = f"two runs of the same seed differ ({first[-1]:.6g}, then {second[-1]:.6g})"
    if draws() > before or engine.draws_by_tensorflow:
        said = f"the engine cannot be compared with model.fit here: {differ}, since a step draws by tf.random"
        return [said], []
    return [], [
        f"{differ[0].upper()}{differ[1:]}: Python code in the training step draws random numbers of its own, or "
        "remembers earlier steps, so that trials are not independent of one another. Draw by keras.random with a "
        "SeedGenerator, and keep state in variables that build_model() makes."
    ]


# -- the loss ----------------------------------------------------------------------------------


def _loss_falls(prepared: Prepared, optimizer: str) -> list[str]:
    """Return the doubt that the loss is not what a step lowers."""
    engine, split = prepared.engine, prepared.splits[0]
    name = loss_names(engine.whole.loss)[0] if engine.whole.loss is not None else ""
    doubts: list[str] = []
    measured = engine.start(optimizer, split).steps([0.0]).metrics
    if engine.own_train_step and name in NEVER_NEGATIVE:
        why = contradiction(name, measured["loss"], measured)
        if why is not None:
            doubts.append(
                f"What train_step calls its loss is not the loss of the model: {why}. The study would optimize a "
                "number that means nothing. Return loss from compute_loss(...), and update metrics of your own only."
            )
    if not isinstance(split, Split) or engine.loss_name != "loss":
        return doubts  # a number that the study names by itself need not be what the gradients lower
    batch = replace(split, train=split.train[: engine.batch_size], validation=split.validation[:0])
    usual = OPTIMIZERS[optimizer].default_learning_rate
    began = time.perf_counter()
    resting = engine.start(optimizer, batch).steps([0.0]).losses
    seconds = max(time.perf_counter() - began, 1e-4)
    steps = int(np.clip(LOWERING_SECONDS / len(LOWERING_RATES) / seconds, 4, LOWERING_STEPS))
    # The same random draws in both runs: what differs is what the steps have done.
    resting = engine.start(optimizer, batch).steps(np.zeros(steps)).losses
    scale = float(np.mean(np.abs(resting)))
    for factor in LOWERING_RATES:
        lowered = engine.start(optimizer, batch).steps(np.full(steps, factor * usual)).losses
        late = (lowered - resting[: len(lowered)])[steps // 2 :]
        if len(lowered) == steps and np.isfinite(late).all() and float(np.mean(late)) < -1e-7 * max(scale, 1e-6):
            return doubts
    doubts.insert(
        0,
        f"The loss does not fall: {steps} small steps of {optimizer} on one batch did not lower it at any of "
        f"{len(LOWERING_RATES)} rates ({scale:.4g} before). What the training step calls its loss is not what its "
        "gradients lower, or no gradient reaches the weights.",
    )
    return doubts
