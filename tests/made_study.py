"""A study made without training: plausible curves of any number of trials, written straight into the storage.

For what reads a finished study: report, comparison, dashboard, status.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from pipeline.storage import LAYOUT, open_storage
from pipeline.study_file import Study, given_keys, read_study
from pipeline.training.overfitting import analyse_fit

OPTIMIZERS = {"sgd": (0.01, 1.0), "adam": (1e-4, 1e-2)}
DECAYS = ["constant", "linear", "cosine"]
BEGAN = datetime(2026, 1, 1, 12)


def make_study(
    folder: Path,
    name: str = "made",
    *,
    trials: int = 40,
    folds: int = 3,
    epochs: int = 12,
    seed: int = 0,
    best: float = 0.3,
    metric: str = "accuracy",
    running: int = 0,
) -> Study:
    """Write a study of `trials` trials: trial 0 is the Keras default, some are pruned, diverge or fail.

    Args:
        folder: where the study file and the storage go.
        name: name of the study.
        trials: trials that have ended.
        folds, epochs: of each trial.
        seed: of everything random.
        best: lowest validation loss that a trial can reach.
        metric: name of the metric beside the loss.
        running: trials that still run.
    """
    path = folder / f"{name}.toml"
    path.write_text(
        f'objective = "my_model.py"\nepochs = {epochs}\ntrials = {trials + running}\n[validation]\nfolds = {folds}\n'
        '[search]\noptimizers = ["sgd", "adam"]\ndecays = ["constant", "linear", "cosine"]\n'
    )
    study = read_study(path)
    rng = np.random.default_rng(seed)
    storage = open_storage(study.storage_url, create=True)
    stored = optuna.create_study(study_name=name, storage=storage)
    about = {
        "lrtune": "0", "objective": "my_model.py", "study_file": str(path), "data": "900 samples", "samples": 900,
        "fold_sizes": [[600, 300]] * folds, "batch_size": 32, "epochs": epochs, "monitor": "val_loss", "mode": "min",
        "seed": seed, "pruner": "median", "sampler": "tpe", "parameters": 1234, "versions": {"keras": "3"},
    }  # fmt: skip
    definition = {
        **study.definition(),
        "data": "d" * 16,
        "model": "m" * 16,
    }
    made = [_trial(rng, number, folds, epochs, best, metric) for number in range(trials)]
    stored.add_trials(made)
    for _ in range(running):
        stored.ask()
    complete = sorted((t.value, i) for i, t in enumerate(made) if t.state == TrialState.COMPLETE and i)
    chosen = [0, *(i for _, i in complete[:2])]
    noise = rng.normal(0, 0.01, (2, folds))
    confirm = {
        "values": {
            str(i): [[made[i].value + e + 0.002 * k for k, e in enumerate(row)] for row in noise.tolist()]
            for i in chosen
        },
        "candidates": chosen,
        "repeats": 2,
    }
    for key, value in {
        "layout": LAYOUT, "about": about, "range_test": _tests(rng), "engine": "plain graph", "xla": False,
        "plain": [], "metric": "val_loss", "widens": True, "distance": 4, "confirm": confirm,
        "study_file": given_keys(study.config), "definition": definition,
    }.items():  # fmt: skip
        stored.set_user_attr(key, value)
    return study


def _tests(rng: np.random.Generator) -> dict[str, Any]:
    rates = np.geomspace(1e-6, 10, 60)
    found = {}
    for name, (low, high) in OPTIMIZERS.items():
        smooth = 2.3 - 1.3 / (1 + (np.log10(rates / (low * high) ** 0.5)) ** 2) + (rates / high) ** 2
        losses = smooth + rng.normal(0, 0.03, 60)
        found[name] = {
            "low": low, "suggested": (low * high) ** 0.5, "high": high, "status": "ok", "extended": False,
            "rates": rates.tolist(), "losses": losses.tolist(), "smoothed": smooth.tolist(),
        }  # fmt: skip
    return found


def _trial(rng: np.random.Generator, number: int, folds: int, epochs: int, best: float, metric: str) -> Any:
    start = BEGAN + timedelta(seconds=2 * number)
    times = {"datetime_start": start, "datetime_complete": start + timedelta(seconds=1.5)}
    optimizer = "adam" if number == 0 else str(rng.choice(list(OPTIMIZERS)))
    decay = "constant" if number == 0 else str(rng.choice(DECAYS))
    position = 0.5 if number == 0 else float(rng.random())
    fraction = float(10 ** -(3 * rng.random()))
    low, high = OPTIMIZERS[optimizer]
    rate = 0.001 if number == 0 else float(f"{low * (high / low) ** position:.4g}")
    params: dict[str, Any] = {"optimizer": optimizer, "decay": decay, "lr_position": position}
    distributions: dict[str, Any] = {
        "optimizer": CategoricalDistribution(list(OPTIMIZERS)),
        "decay": CategoricalDistribution(DECAYS),
        "lr_position": FloatDistribution(0, 1),
    }
    if decay != "constant":
        params["final_fraction"] = fraction
        distributions["final_fraction"] = FloatDistribution(0.001, 1.0, log=True)
    attributes: dict[str, Any] = {"learning_rate": rate}
    if number == 0:
        attributes["baseline"] = True
    level = best + 1.5 * (position - 0.6) ** 2 + 0.05 * (decay == "constant") + 0.02 * rng.random()
    turn = max(2.0, epochs * (1.1 - position))
    steps = np.arange(1, epochs + 1)
    curves: dict[str, list[list[float]]] = {"loss": [], metric: [], "val_loss": [], f"val_{metric}": []}
    kind = (
        "complete"
        if number == 0
        else str(rng.choice(["complete", "pruned", "diverged", "failed"], p=(0.5, 0.4, 0.07, 0.03)))
    )
    ran = {"complete": folds, "pruned": max(1, folds // 2), "diverged": 1, "failed": 0}[kind]
    for _ in range(ran):
        loss = 2.0 * np.exp(-steps / 3) + 0.5 * level + rng.normal(0, 0.005, epochs)
        held = 2.0 * np.exp(-steps / 3) + level + 0.02 * np.maximum(0, steps - turn) + rng.normal(0, 0.01, epochs)
        for key, curve in (("loss", loss), ("val_loss", held), (metric, 1 - loss / 4), (f"val_{metric}", 1 - held / 4)):
            curves[key].append([float(f"{v:.6g}") for v in (curve[:2] if kind == "diverged" else curve)])
    if kind == "failed":
        return create_trial(
            state=TrialState.FAIL, params=params, distributions=distributions,
            user_attrs={**attributes, "error": "ValueError: <b>no</b>"},
        )  # fmt: skip
    mean, train = np.mean(curves["val_loss"], axis=0), np.mean(curves["loss"], axis=0)
    analysis = analyse_fit(train, mean, diverged=kind == "diverged")
    at = {"fold": 1, "epoch": 2, "step": 7, "reason": "loss not finite"} if kind == "diverged" else None
    made = create_trial(
        state=TrialState.COMPLETE if kind == "complete" else TrialState.PRUNED,
        value=float(mean.min()) if kind == "complete" else None,
        params=params,
        distributions=distributions,
        user_attrs={
            **attributes, "curves": curves, "diverged_at": at, "verdict": analysis.verdict,
            "overfit_epoch": analysis.overfit_epoch,
        },
        intermediate_values={epoch: float(v) for epoch, v in enumerate(curves["val_loss"][0])},
    )  # fmt: skip
    made.datetime_start, made.datetime_complete = times["datetime_start"], times["datetime_complete"]
    return made
