"""Everything that happens before a study has a storage: load, check, build, range tests.

Nothing here writes; every mistake that would keep a study from running is found here.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from pipeline.errors import KnownError, ObjectiveError, require_package
from pipeline.objective import Objective, check_sizes, load_objective
from pipeline.progress import Reporter
from pipeline.search.deadline import Deadline
from pipeline.search.range_test import DIVERGED_AT_START, RangeTest, analyse_ramp, odd_pairs, run_range_test
from pipeline.search.samplers import check_sampler
from pipeline.search.trial import Monitor, mode_of, split_seed
from pipeline.storage import sqlite_path
from pipeline.study_file import Study, ValidationSection
from pipeline.training.engine import Engine
from pipeline.training.sources import AnySplit
from pipeline.training.splits import Split, make_splits
from pipeline.training.stream import Stream, StreamSplit
from pipeline.user_code import describe_fault


@dataclass(frozen=True)
class Prepared:
    """A study file with its objective loaded and its engine built.

    Attributes:
        inline: whether the objective lives in this process alone.
    """

    study: Study
    objective: Objective
    engine: Engine
    splits: tuple[AnySplit, ...]
    monitor: Monitor
    inline: bool = False


def prepare(study: Study, reporter: Reporter, module: ModuleType | None = None) -> Prepared:
    """Load the objective and check it against the study file; write nothing.

    Args:
        study: the study.
        reporter: told what was loaded.
        module: the objective itself, where the study file names none.

    Raises:
        KnownError: for everything that would keep the study from running.
    """
    config = study.config
    check_sampler(config.sampler.name)
    if config.sampler.name == "cma-es" and sqlite_path(study.storage_url) is None:
        raise KnownError(
            f"{study.path}: sampler.name: 'cma-es' keeps pickled objects in the storage, through which anybody who can "
            "write to a shared database could run code here. Take another sampler, or a SQLite file of your own."
        )
    if config.tensorboard.logs:
        require_package("tensorboard", "tensorboard.logs")
    if config.mlflow.runs:
        require_package("mlflow", "mlflow.runs")
    if config.workers.threads != "auto":
        os.environ["TF_NUM_INTRAOP_THREADS"] = str(config.workers.threads)  # read when TensorFlow is imported
    objective = objective_of(study, limit=config.limit if config.limit is not None else config.fraction, module=module)
    if isinstance(objective.train, Stream):
        study = _held_out(study, objective.train)
    else:
        study = _checked_scheme(study, objective)
        if objective.fixed_batch is not None and "batch_size" not in study.config.model_fields_set:
            study = replace(study, config=study.config.model_copy(update={"batch_size": objective.fixed_batch}))
    config = study.config
    splits = splits_of(study, objective, repeat=0)
    if not isinstance(objective.train, Stream):
        for split in splits:
            parts = dict(zip(("the training samples of a fold", "its validation samples"), split.sizes, strict=True))
            check_sizes(objective.where, objective.fixed_batch, parts, (config.batch_size, *config.search.batch_sizes))
    try:
        engine = Engine(
            objective.build_model,
            objective.train,
            batch_size=config.batch_size,
            seed=splits[0].seed,  # a frozen body that is drawn at random then runs once for the first fold
            frozen_bytes=round(config.engine.frozen_memory * 2**20),
            loss_name=config.monitor,
        )
    except KnownError as error:
        raise ObjectiveError(f"{objective.where}: {error}") from error
    except Exception as error:  # whatever Keras raises when model and data do not fit
        raise ObjectiveError(
            f"{objective.where}: the model cannot be built on the data: {describe_fault(error, objective.path)}."
        ) from error
    study, monitor = find_monitor(study, engine)
    held = "" if objective.given is None else f"; the last {objective.train.samples - objective.given} validate"
    reporter.stage("data", f"{objective.train.describe()}{held}")
    if objective.groups is not None:
        count = len(np.unique(objective.groups))
        reporter.stage("validation", f"by the {count} groups of groups(): none is on both sides")
    if engine.frozen:
        reporter.stage("model", engine.frozen)
    elif engine.not_frozen:
        reporter.stage("model", f"{engine.not_frozen}; the whole model runs in every step")
    if objective.own_optimizer:
        reporter.stage("optimizer", f"the model's own, {objective.own_optimizer}, gives way to the search's")
    for note in objective.notes:
        reporter.stage("objective", note)
    return Prepared(study, objective, engine, splits, monitor, inline=module is not None)


def objective_of(study: Study, *, limit: int | float | None, module: ModuleType | None = None) -> Objective:
    """Load the objective that a study names.

    Args:
        study: the study.
        limit, module: see `load_objective`.
    """
    config = study.config
    return load_objective(
        config.objective.path,
        study.path.resolve().parent,
        kwargs=config.objective.kwargs,
        test_fraction=config.test_fraction,
        ordered=config.validation.scheme == "time-series",
        grouped=_grouped(config.validation),
        seed=config.seed,
        steps_per_epoch=config.steps_per_epoch,
        limit=limit,
        module=module,
    )


def _grouped(validation: ValidationSection) -> bool | None:
    """Return whether samples have groups: yes, no, or None where the objective decides by having `groups()`."""
    if validation.scheme == "group-k-fold":
        return True
    return False if "scheme" in validation.model_fields_set and validation.scheme != "hold-out" else None


def _checked_scheme(study: Study, objective: Objective) -> Study:
    """Return the study with the validation scheme that its data ask for.

    Raises:
        KnownError: when scheme and data do not fit.
    """
    config, scheme = study.config, study.config.validation.scheme
    if objective.given is not None and scheme != "given":
        if "scheme" in config.validation.model_fields_set:
            raise KnownError(
                f"{study.path}: validation.scheme: load_data() brings its own validation samples, so the scheme must "
                f"be 'given', got '{scheme}'. Change it, or return only training and test samples."
            )
        validation = config.validation.model_copy(update={"scheme": "given"})
        return replace(study, config=config.model_copy(update={"validation": validation}))
    if objective.groups is not None and "scheme" not in config.validation.model_fields_set:
        folds = min(config.validation.folds, len(np.unique(objective.groups)))
        validation = config.validation.model_copy(update={"scheme": "group-k-fold", "folds": folds})
        return replace(study, config=config.model_copy(update={"validation": validation}))
    if objective.given is None and scheme == "given":
        raise KnownError(
            f"{study.path}: validation.scheme: 'given' needs load_data() to return (x_train, y_train), "
            "(x_validation, y_validation), (x_test, y_test). Return these, or choose another scheme."
        )
    if scheme == "group-k-fold" and objective.groups is None:
        raise KnownError(
            f"{study.path}: validation.scheme: 'group-k-fold' needs a function groups() beside load_data() that "
            "returns one group per training sample. Add it, or choose another scheme."
        )
    return study


def _held_out(study: Study, stream: Stream) -> Study:
    """Return the study with what datasets decide by themselves: one hold-out, and the batches they make.

    Raises:
        KnownError: when the study file asks for something else.
    """
    config = study.config
    if "scheme" in config.validation.model_fields_set and config.validation.scheme != "hold-out":
        raise KnownError(
            f"{study.path}: validation.scheme: tf.data datasets bring their own validation dataset, so the scheme "
            f"must be 'hold-out', got '{config.validation.scheme}'. Change it, or return arrays from load_data()."
        )
    if "batch_size" in config.model_fields_set and config.batch_size != stream.batch_size:
        raise KnownError(
            f"{study.path}: batch_size: the training dataset makes batches of {stream.batch_size} samples, got "
            f"{config.batch_size}. Remove the key, or change .batch(...) in load_data()."
        )
    if config.search.batch_size is not None:
        raise KnownError(
            f"{study.path}: search.batch_size: the training dataset makes batches of {stream.batch_size} samples, so "
            "their size cannot be searched. Remove the key, or return arrays from load_data()."
        )
    validation = config.validation.model_copy(update={"scheme": "hold-out"})
    return replace(study, config=config.model_copy(update={"validation": validation, "batch_size": stream.batch_size}))


def splits_of(study: Study, objective: Objective, *, repeat: int) -> tuple[AnySplit, ...]:
    """Return the folds of the study (repeat 0) or of a repeat of its confirmation."""
    config, data = study.config, objective.train
    if isinstance(data, Stream):
        # The validation dataset stays as it is; weights and shuffles are fresh in every repeat.
        return (StreamSplit(split_seed(config.seed, repeat, 0), data.steps, data.sizes),)
    validation = config.validation
    if objective.given is not None:
        samples = np.arange(data.samples, dtype=np.int32)
        return (Split(samples[: objective.given], samples[objective.given :], split_seed(config.seed, repeat, 0)),)
    pairs = make_splits(
        data.samples,
        objective.labels if validation.stratify else None,
        folds=1 if validation.scheme == "hold-out" else validation.folds,
        fraction=validation.fraction,
        seed=split_seed(config.seed, repeat, 2**16),
        repeats=validation.repeats if validation.scheme == "repeated-k-fold" else 1,
        groups=objective.groups,
        ordered=validation.scheme == "time-series",
        gap=validation.gap,
    )
    return tuple(
        Split(train, validation, split_seed(config.seed, repeat, fold))
        for fold, (train, validation) in enumerate(pairs)
    )


def find_monitor(study: Study, engine: Engine) -> tuple[Study, Monitor]:
    """Return what to optimize, with the direction Keras would infer; and the study with that name in it.

    A validation metric; or a number that a training step returns, where the study names it or the model has no
    validation values at all.

    Raises:
        KnownError: when the model has no such metric, or its direction is unknown.
    """
    config, name = study.config, study.config.monitor
    if not engine.test_names and "monitor" not in config.model_fields_set and engine.loss_name in engine.train_names:
        name = engine.loss_name
        study = replace(study, config=config.model_copy(update={"monitor": name}))
    validation = [f"val_{each}" for each in engine.test_names]
    vectors = [m.name for m in engine.model.metrics if f"val_{m.name}" == name]
    if name not in (*validation, *engine.train_names):
        if vectors:
            raise KnownError(
                f"{study.path}: monitor: '{name}' must be a single number, got a metric with a value per class. Give "
                "it an average where the model is compiled, such as average='macro'; or choose one of "
                f"{', '.join(validation)}."
            )
        if not validation:
            why = f" ({engine.no_validation})" if engine.no_validation else ""
            raise KnownError(
                f"{study.path}: monitor: '{name}' is not measured: the model has a train_step, and its test_step "
                f"cannot be run{why}. Choose one of {', '.join(engine.train_names)}, measured on training data; or "
                "override test_step too, so that the validation samples have a value."
            )
        raise KnownError(
            f"{study.path}: monitor: '{name}' is not measured by the model; it has {', '.join(validation)}. Compile "
            "the model with that metric, or choose one of these."
        )
    if config.mode != "auto":
        return study, Monitor(name, config.mode)
    own = name.removeprefix("val_")
    metrics = [m for metric in engine.model.metrics for m in (metric, *getattr(metric, "metrics", ()))]
    direction = next((m._direction for m in metrics if m.name == own and getattr(m, "_direction", None)), None)
    if direction is not None:
        return study, Monitor(name, {"up": "max", "down": "min"}[direction])
    mode = mode_of(own)
    if mode is not None:
        return study, Monitor(name, mode)
    raise KnownError(f"{study.path}: mode: Keras knows no direction for '{name}'. Set mode to 'min' or 'max'.")


RANGE_TEST_SHARE = 1 / 3
"""Range tests take about this share of a study's time at most; optimizers that it does not reach are not tested."""


def range_tests(prepared: Prepared, reporter: Reporter, deadline: Deadline | None = None) -> dict[str, RangeTest]:
    """Run the range test of every optimizer, and once more, twice as fine, that of siblings far apart.

    Args:
        prepared: the study.
        reporter: told how far it is.
        deadline: the time of the study, or None.

    Raises:
        KnownError: when every optimizer diverges from the first step.
    """
    settings = prepared.study.config.range_test
    found: dict[str, RangeTest] = {}
    steps_per_epoch = prepared.splits[0].steps_per_epoch(prepared.engine.batch_size)

    def once(optimizer: str, longer: int = 1) -> RangeTest:
        try:
            return run_range_test(
                prepared.engine,
                optimizer,
                prepared.splits[0],
                low=settings.low,
                high=settings.high,
                steps=longer * settings.length(steps_per_epoch),
                total_steps=prepared.study.config.epochs * steps_per_epoch,
                window=settings.window,
            )
        except KnownError:
            raise
        except Exception as error:  # the first step of training: whatever the model's code raises
            raise training_failed(prepared, optimizer, error) from error

    def fits(optimizer: str) -> bool:
        """Return whether a ramp ends within its share of the study's time, by the seconds that a step takes."""
        if deadline is None or not math.isfinite(deadline.until):
            return True
        left = deadline.left - (1 - RANGE_TEST_SHARE) * deadline.seconds
        if left <= 0:
            return False
        began = time.perf_counter()
        prepared.engine.start(optimizer, prepared.splits[0]).steps([settings.low])  # traces
        between = time.perf_counter()
        prepared.engine.start(optimizer, prepared.splits[0]).steps([settings.low])
        step, traced = time.perf_counter() - between, between - began
        return step * settings.length(steps_per_epoch) + traced < left

    with reporter.bar("range test", len(prepared.study.config.search.optimizers)) as bar:
        for optimizer in prepared.study.config.search.optimizers:
            found[optimizer] = once(optimizer) if fits(optimizer) else analyse_ramp(optimizer, [], [])
            bar.update(len(found), optimizer)
        timed = deadline is not None and math.isfinite(deadline.until)
        for pair in () if timed else odd_pairs({name: test.suggested for name, test in found.items()}):
            again = {name: once(name, 2) for name in pair}
            if not odd_pairs({name: test.suggested for name, test in again.items()}):
                found |= again
    if all(test.status == DIVERGED_AT_START for test in found.values()):
        raise ObjectiveError(
            f"{prepared.objective.where}: every optimizer diverges from the first step, even at a learning rate of "
            f"{settings.low / 1e4:g}. Scale the inputs and targets to about unit size, and check the loss."
        )
    return found


def training_failed(prepared: Prepared, optimizer: str, error: Exception) -> ObjectiveError:
    """Return the message for an exception in the first steps of training."""
    fault = describe_fault(error, prepared.objective.path)
    return ObjectiveError(f"{prepared.objective.where}: training with {optimizer} failed: {fault}.")
