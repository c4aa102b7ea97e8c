"""What a study is: the facts that its trials' values depend on, and the refusal to mix different ones."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from pipeline import __version__
from pipeline.errors import KnownError, did_you_mean
from pipeline.progress import Reporter
from pipeline.search.prepare import Prepared
from pipeline.storage import check_layout, open_storage, storage_errors, without_password
from pipeline.study_file import Study, default_of, study_of
from pipeline.training.building import overrides
from pipeline.training.constant import MOST_VALUES, constant_loss
from pipeline.training.data import Data, as_tensor, leaves, map_tree
from pipeline.training.engine import Engine
from pipeline.training.no_skill import no_skill
from pipeline.training.outputs import ends_in
from pipeline.training.splits import Split
from pipeline.training.stream import Stream

VALIDATION_BYTES = 1 << 26
"""Targets of a validation dataset are kept up to this size, in bytes, to know what a constant answer reaches."""


def definition_of(prepared: Prepared) -> dict[str, Any]:
    """Return what a trial's value depends on, flat: keys of the study file, the data and the model."""
    objective = prepared.objective
    facts = {"data": objective.train.fingerprint(), "model": objective.model_digest}
    if objective.groups is not None and prepared.study.config.validation.scheme == "hold-out":
        facts["groups held out whole"] = str(len(np.unique(objective.groups)))
    if prepared.engine.batches_matter and isinstance(objective.train, Data):
        # Version 0.1.0 validated in large batches; values of the two ways would not compare.
        facts["validation in batches of"] = str(prepared.engine.batch_size)
    return {**prepared.study.definition(), **facts}


def stored_study(name: str, overrides: Mapping[str, Any]) -> Study:
    """Return a study as its storage keeps it, for a machine without the study file.

    Args:
        name: the study's name.
        overrides: values by dotted key, the storage's URL among them.

    Raises:
        KnownError: when the storage is not given, or holds no such study.
    """
    path = Path(f"{name}.toml")
    if "storage.url" not in overrides and "storage" not in overrides:
        raise KnownError(
            f"{path}: does not exist. Give the study file; or the study's name, and with --storage the URL of the "
            "database that holds it."
        )
    url = study_of(path, {"objective": "unknown"}, overrides).storage_url
    storage = open_storage(url, create=False)
    with storage_errors(url):
        names = optuna.get_all_study_names(storage)
        if name not in names:
            raise KnownError(
                f"{name}: the storage {without_password(url)} holds no such study{did_you_mean(name, names)}"
            )
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
    if "definition" not in attributes:
        raise KnownError(f"{name}: the study in storage is not set up yet. Run 'lrtune tune' first.")
    return study_of(path, dict(attributes["study_file"]), overrides)


def about(prepared: Prepared) -> dict[str, Any]:
    """Return what the report says of how it was done."""
    config = prepared.study.config
    return {
        "lrtune": __version__,
        "objective": config.objective.path,
        "study_file": str(prepared.study.path),
        "data": prepared.objective.train.describe(),
        "samples": prepared.objective.train.samples,
        "fold_sizes": [list(split.sizes) for split in prepared.splits],
        "batch_size": prepared.engine.batch_size,
        "epochs": config.epochs,
        "monitor": prepared.monitor.name,
        "mode": prepared.monitor.mode,
        "seed": config.seed,
        "pruner": config.pruning.pruner,
        "sampler": config.sampler.name,
        "parameters": prepared.engine.parameters,
        "options": list(prepared.study.options),
        "no_skill": _no_skill(prepared),
        "own_optimizer": prepared.objective.own_optimizer,
        "own": list(prepared.objective.own) if prepared.objective.own is not None else None,
        "weighted": isinstance(prepared.objective.train, Data) and prepared.objective.train.sample_weight is not None,
        "seeded": prepared.objective.seeded,
        "dataset": isinstance(prepared.objective.train, Stream),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import keras
    import tensorflow

    return {
        "python": platform.python_version(),
        "tensorflow": tensorflow.__version__,
        "keras": keras.__version__,
        "optuna": optuna.__version__,
        "numpy": np.__version__,
    }


def _no_skill(prepared: Prepared) -> dict[str, float]:
    """Return the mean over folds of what the best constant answer reaches on the validation samples, by metric.

    By a formula where the loss has one, else by minimizing the model's own loss over one answer to every sample.
    """
    folds = []
    for part in _held_out(prepared):
        found = {}
        if prepared.objective.only_loss is not None:
            weights = part.sample_weight if prepared.objective.weighted[1] is not False else None
            found = no_skill(part.y, prepared.objective.only_loss, weights)
        folds.append(found or _measured(prepared.engine, part))
    names = set.intersection(*(set(fold) for fold in folds)) if folds else set()
    return {name: float(np.mean([fold[name] for fold in folds])) for name in sorted(names)}


def _held_out(prepared: Prepared) -> Iterator[Data]:
    """Yield the validation samples of every fold; of a dataset, as many as fit into a little memory."""
    data = prepared.objective.train
    if isinstance(data, Data):
        for split in prepared.splits:
            if isinstance(split, Split) and len(split.validation):
                yield Data(None, data.y, data.sample_weight, data.samples).take(split.validation)
        return
    held = data.validation_targets(VALIDATION_BYTES)
    if held is not None:
        yield held


def _measured(engine: Engine, part: Data) -> dict[str, float]:
    """Return the loss of the best constant answer, by the model's own loss; empty where that is not known."""
    model, tf = engine.whole, engine.tf
    own = any(overrides(engine.keras, model, name) for name in ("train_step", "test_step", "compute_loss"))
    if part.y is None or own or model.losses or model.loss is None:
        return {}
    try:
        x = engine.source.sample_inputs()
        every = max(1, sum(leaf.size for _, leaf in leaves(part.y)) // MOST_VALUES)
        some = part.take(np.arange(0, part.samples, every)) if every > 1 else part
        y, weight = (map_tree(lambda a: as_tensor(tf, a), tree) for tree in (some.y, some.sample_weight))
        outputs, ends = model(x, training=False), ends_in(tf, engine.keras, model, x)
        loss = constant_loss(tf, model, outputs, ends, y, weight, engine.batch_size)
    except Exception:  # a loss that takes no such answer has no bar
        return {}
    return {"loss": loss} if np.isfinite(loss) else {}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a definition that differ, with what they were.

    A key of the study file that an earlier version did not know meant the default with which it came.

    >>> changed({"epochs": 3}, {"epochs": 3, "pruning.pruner": "median"})
    {}
    >>> changed({"epochs": 3}, {"epochs": 4, "pruning.pruner": "none"})
    {'epochs': 3, 'pruning.pruner': 'median'}
    """
    found = {}
    for key in sorted(before.keys() | now.keys()):
        was = before[key] if key in before else default_of(key) if key in now else None
        if was != now.get(key):
            found[key] = "not set" if was is None else was
    return found


def check_same(prepared: Prepared, reporter: Reporter, study: optuna.Study) -> None:
    """Refuse to mix trials whose values mean different things."""
    path = prepared.study.path
    check_layout(path, study.user_attrs.get("layout"))
    before, now = dict(study.user_attrs["definition"]), definition_of(prepared)
    for facts in (before, now):  # where the code lies is no matter: the hashes below tell what it does
        facts.pop("objective", None)
    names = {"data": "the data's hash", "model": "the model's hash"}
    changes = [
        f"  {names.get(key, key)}: was {was}, is now {now.get(key, 'not set')}"
        for key, was in changed(before, now).items()
    ]
    if changes:
        raise KnownError(
            f"{path}: the study in storage was begun under another definition, and its "
            f"{len(study.trials)} trials would not compare with new ones:\n"
            + "\n".join(changes)
            + "\nUndo these changes to resume; or copy the study file under a new name, which is a new study; "
            "or throw the old trials away with --fresh."
        )
    versions = study.user_attrs["about"]["versions"]
    other = {k: v for k, v in _versions().items() if versions.get(k) != v}
    if other:
        listed = ", ".join(f"{name} {versions.get(name)} -> {version}" for name, version in other.items())
        reporter.stage("versions", f"changed since the study began ({listed}); values may differ slightly")
