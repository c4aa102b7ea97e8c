"""Train the recommended configuration on all training data, and look at the test set once."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline.errors import KnownError, plain_text
from pipeline.objective import Objective, check_sizes
from pipeline.search.space import Configuration
from pipeline.search.trial import split_seed
from pipeline.training.data import Data, joined
from pipeline.training.divergence import TRIAL_RULE
from pipeline.training.engine import Engine
from pipeline.training.optimizers import build_optimizer
from pipeline.training.sources import AnySplit
from pipeline.training.splits import Split
from pipeline.training.stream import Stream, StreamSplit
from pipeline.words import cut


@dataclass(frozen=True)
class Fitted:
    """A trained model and its only look at the test set.

    Attributes:
        path: the saved model; its weights alone, where Keras cannot save the model; None where neither.
        saved: what was saved, and how it is loaded.
        test: metrics on the test set by name; empty without a test set.
        train: metrics of the last epoch.
        note: what keeps the two from being compared; empty for nothing.
    """

    path: Path | None
    saved: str
    test: dict[str, float]
    train: dict[str, float]
    note: str = ""


def fit_recommended(
    objective: Objective,
    configuration: Configuration,
    folder: Path,
    *,
    epochs: int,
    decay_epochs: int,
    batch_size: int,
    frozen_bytes: int,
    seed: int,
    monitor: str,
    plateau_rates: Sequence[float] | None = None,
    way: Mapping[str, Any] = MappingProxyType({}),
    on_epoch: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Train, evaluate once, and save `model.keras`.

    Args:
        objective: model and data.
        configuration: the recommendation.
        folder: where the model is saved.
        epochs: epochs to train.
        decay_epochs: epochs over which the decay is laid out.
        batch_size: samples per step.
        frozen_bytes: memory for the outputs of a frozen body.
        seed: seed of initial weights and shuffles.
        monitor: what the study optimized.
        plateau_rates: rate of each epoch, shape (epochs,), for a scheme that reacted to validation in the study.
        way: how the study's engine trained, see `Engine.way`; one run does not pay for XLA.
        on_epoch: called with (epochs done, training loss).

    Raises:
        KnownError: when the run diverges or the model cannot be saved.
    """
    everything, split, tested = _all_of(objective, split_seed(seed, 0, 0))
    if isinstance(split, Split):
        parts = {"all the training samples": split.sizes[0], "the test set": split.sizes[1]}
        check_sizes(objective.where, objective.fixed_batch, parts, (batch_size,))
    engine = Engine(
        objective.build_model,
        everything,
        batch_size=batch_size,
        seed=split.seed,
        frozen_bytes=frozen_bytes,
        loss_name=monitor,
    )
    engine.go_on({**way, "xla": False})
    steps = split.steps_per_epoch(engine.batch_size)
    table = configuration.rates(decay_epochs * steps).reshape(decay_epochs, steps)
    if plateau_rates is not None:
        table = np.repeat(np.asarray(plateau_rates)[:, None], steps, axis=1)
    run = engine.start(configuration.spec, split)
    metrics: dict[str, float] = {}
    for epoch in range(epochs):
        result = run.epoch(table[epoch], TRIAL_RULE, validate=epoch + 1 == epochs)
        if result.reason is not None:
            raise KnownError(
                f"{objective.where}: the run on all training data diverged in epoch {epoch + 1} ({result.reason}). "
                "Run 'lrtune tune' with more trials, or lower search.learning_rate."
            )
        metrics = result.metrics
        if on_epoch is not None:
            on_epoch(epoch + 1, metrics["loss"])
    held = {name.removeprefix("val_"): value for name, value in metrics.items() if name.startswith("val_")}
    path, saved = _save(engine, engine.trained_model(split), configuration, folder)
    weighted = objective.weighted[0] and objective.test is not None and not objective.test_weighted
    return Fitted(
        path,
        saved,
        held if tested else {},
        {name: value for name, value in metrics.items() if not name.startswith("val_")},
        "The training samples have weights and the test samples have none: their losses measure different things."
        if weighted
        else "",
    )


def _all_of(objective: Objective, seed: int) -> tuple[Data | Stream, AnySplit, bool]:
    """Return the data to train and test on, the split between the two, and whether there is a test set."""
    train, test = objective.train, objective.test
    if isinstance(train, Stream):
        stream = train.on_test()
        return stream, StreamSplit(seed, stream.steps, stream.sizes), train.test is not None
    everything = train if test is None else joined(train, test)
    samples = np.arange(everything.samples, dtype=np.int32)
    return everything, Split(samples[: train.samples], samples[train.samples :], seed), test is not None


def _save(engine: Engine, model: Any, configuration: Configuration, folder: Path) -> tuple[Path | None, str]:
    """Save the model, compiled with an optimizer that loads again; where it cannot be loaded, its weights too.

    Returns:
        The file, and how it is loaded.
    """
    try:
        compiled = model.get_compile_config()
        fresh = build_optimizer(configuration.spec, configuration.learning_rate)
        compiled["optimizer"] = engine.keras.optimizers.serialize(fresh)
        model.compile_from_config(compiled)
    except Exception:  # a loss or metric of the user's own that Keras cannot rebuild: the model is saved as it is
        model.optimizer = build_optimizer(configuration.spec, configuration.learning_rate)
    model.built = True  # it was trained; one of the user's own class may not know
    whole, weights = folder / "model.keras", folder / "model.weights.h5"
    fault = _write(model.save, whole)
    own = _own_objects(whole) if fault is None else []
    loads = fault is None and _loads(engine.keras, whole)
    if loads:
        first = f" after importing what defines {', '.join(own)}" if own else ""
        weights.unlink(missing_ok=True)
        return whole, f'Saved {whole}; load it{first} with keras.models.load_model("{whole}")'
    failed = _write(model.save_weights, weights)
    if failed is not None:
        return None, f"Keras can save neither the model nor its weights: {failed}."
    load = f'Saved {weights}; load it with model = build_model(), built, and model.load_weights("{weights}")'
    if fault is not None:
        return weights, f"Keras cannot save the whole model: {fault}.\n{load}"
    named = f": it needs custom_objects for {', '.join(own)}" if own else ""
    return whole, f"Saved {whole}, which Keras cannot load by itself{named}.\n{load}"


def _write(save: Callable[[str], None], path: Path) -> str | None:
    """Write a file aside and move it into place.

    Returns:
        Why Keras cannot write it, or None.

    Raises:
        KnownError: when the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix="".join(path.suffixes))
        os.close(handle)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save(aside)
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise KnownError(f"{path}: the model cannot be saved ({error.strerror or error}).") from error
    except Exception as error:  # whatever a get_config of the user's own raises
        path.unlink(missing_ok=True)
        return _first_sentence(error)
    return None


def _own_objects(path: Path) -> list[str]:
    """Return the names of classes and functions in a saved model that are not Keras's."""
    found: dict[str, None] = {}

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            module, name = value.get("module"), value.get("class_name")
            if name == "function":  # its own name stands in its configuration
                name = value.get("config")
            if isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins") and isinstance(name, str):
                found[name] = None
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            look(item)

    with zipfile.ZipFile(path) as archive:
        look(json.loads(archive.read("config.json")))
    return list(found)


def _loads(keras: Any, path: Path) -> bool:
    """Return whether Keras can load a saved model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keras.models.load_model(path)
    except Exception:
        return False
    return True


def _first_sentence(error: Exception) -> str:
    """Return what an error says; Keras's go on for pages."""
    said = " ".join(plain_text(str(error)).split()).partition(" Full object config")[0].partition(" Example: ")[0]
    return cut(said, 300).rstrip(".:") or type(error).__name__
