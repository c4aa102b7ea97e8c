"""What a study is: the facts that its trials' values depend on, and the refusal to mix different ones."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import optuna

from pipeline import __version__
from pipeline.errors import KnownError, StorageError
from pipeline.progress import Reporter
from pipeline.search.prepare import Prepared
from pipeline.storage import LAYOUT


def definition_of(prepared: Prepared) -> dict[str, Any]:
    """Return what a trial's value depends on, flat: keys of the study file, the data and the model."""
    objective = prepared.objective
    facts = {"data": objective.train.fingerprint(), "model": objective.model_digest}
    return {**prepared.study.definition(), **facts}


def about(prepared: Prepared) -> dict[str, Any]:
    """Return what the report says of how it was done."""
    import keras
    import tensorflow

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
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tensorflow.__version__,
            "keras": keras.__version__,
            "optuna": optuna.__version__,
            "numpy": np.__version__,
        },
    }


def check_same(prepared: Prepared, reporter: Reporter, study: optuna.Study) -> None:
    """Refuse to mix trials whose values mean different things."""
    path = prepared.study.path
    layout = study.user_attrs.get("layout")
    if layout != LAYOUT:
        raise StorageError(
            f"{path}: the study in storage has layout {layout}, this lrtune reads layout {LAYOUT}. "
            "Use the lrtune version that made it, or start anew with --fresh."
        )
    before, now = study.user_attrs["definition"], definition_of(prepared)
    names = {"data": "the data's hash", "model": "the model's hash"}
    changes = [
        f"  {names.get(key, key)}: was {before.get(key, 'not set')}, is now {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
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
    other = {k: v for k, v in about(prepared)["versions"].items() if versions.get(k) != v}
    if other:
        listed = ", ".join(f"{name} {versions.get(name)} -> {version}" for name, version in other.items())
        reporter.stage("versions", f"changed since the study began ({listed}); values may differ slightly")
