"""Read back what a trial stored about itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from optuna.trial import FrozenTrial

from pipeline.search.pruning import PastTrial
from pipeline.search.space import BASELINE, Configuration, tidy
from pipeline.search.trial import Monitor
from pipeline.words import FURTHER

SIGNIFICANT_DIGITS = 6
"""Digits kept of the curves in the storage."""


def configuration_of(trial: FrozenTrial) -> Configuration:
    """Return the configuration that a stored trial trained with."""
    if trial.user_attrs.get("baseline"):
        return BASELINE
    return Configuration(
        optimizer=trial.params["optimizer"],
        learning_rate=float(trial.user_attrs["learning_rate"]),
        decay=trial.params["decay"],
        final_fraction=min(tidy(trial.params.get("final_fraction", 1.0)), 1.0),
        **{name: trial.params.get(name) for name in FURTHER},
    )


def past_trial(trial: FrozenTrial, monitor: Monitor) -> PastTrial:
    """Return what pruning needs of a stored trial."""
    curves = trial.user_attrs.get("curves", {}).get(monitor.name, [])
    return PastTrial(tuple(monitor.cost(curve) for curve in curves))


def best_epoch_of(curves: Mapping[str, list[list[float]]], monitor: Monitor) -> int:
    """Return the best epoch, counted from 1, of the mean over folds."""
    return int(np.argmin(np.mean([monitor.cost(curve) for curve in curves[monitor.name]], axis=0))) + 1
