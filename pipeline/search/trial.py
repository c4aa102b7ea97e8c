"""One trial: train a configuration fold after fold, and say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.search.checkpoint import Checkpoint, Position
from pipeline.search.deadline import TimeUp
from pipeline.search.pruning import FoldPruner
from pipeline.search.space import Configuration
from pipeline.training.decays import Plateau
from pipeline.training.divergence import TRIAL_RULE, VALIDATION_NOT_FINITE
from pipeline.training.overfitting import analyse_fit

if TYPE_CHECKING:
    from pipeline.training.engine import Engine
    from pipeline.training.sources import AnySplit

Curves = dict[str, list[list[float]]]
"""Value per metric, fold and epoch; validation metrics have "val_" before the name."""


RATE = "learning_rate"
"""Name of a curve that holds the rate at each epoch's first step, for schemes that react to the run."""


@dataclass(frozen=True)
class Monitor:
    """What a study optimizes.

    Attributes:
        name: a validation metric, such as "val_loss", or a metric of training.
        mode: "min" or "max".
    """

    name: str
    mode: str

    @property
    def on_validation(self) -> bool:
        """Return whether it is measured on validation samples."""
        return self.name.startswith("val_")

    @property
    def label(self) -> str:
        """Return its name as people read it: what is measured on training data is called so."""
        return self.name if self.on_validation else f"{self.name} on training data"

    def cost(self, values: Any) -> Any:
        """Return the values with lower always better; what is not finite is worst, in either mode."""
        costs = np.asarray(values, dtype=float) * (1.0 if self.mode == "min" else -1.0)
        return np.where(np.isfinite(costs), costs, np.inf)


LOWER_IS_BETTER = {"error", "mse", "mae", "mape", "msle", "rmse", "crossentropy", "divergence"}
HIGHER_IS_BETTER = {"acc", "accuracy", "auc", "precision", "recall", "f1", "fbeta", "r2", "iou"}


def mode_of(metric: str) -> str | None:
    """Return "min" or "max" for a metric whose name tells, else None.

    >>> mode_of("val_accuracy"), mode_of("val_loss"), mode_of("speed")
    ('max', 'min', None)
    """
    words = set(metric.split("_"))
    if "loss" in words or words & LOWER_IS_BETTER:
        return "min"
    return "max" if words & HIGHER_IS_BETTER else None


@dataclass
class Outcome:
    """How a trial went.

    Attributes:
        curves: every metric's value per fold and epoch.
        pruned: whether it ended before its last fold's last epoch, for whatever reason.
        diverged_at: {"fold", "epoch", "step", "reason"}, fold, epoch and step counted from 1, or None.
        value: the monitored value at the best epoch of the mean over folds; None when pruned.
        value_std: standard deviation over folds at that epoch; None when pruned or with one fold.
        best_epoch: that epoch, counted from 1; None when pruned.
    """

    curves: Curves = field(default_factory=dict)
    pruned: bool = False
    diverged_at: dict[str, Any] | None = None
    value: float | None = None
    value_std: float | None = None
    best_epoch: int | None = None

    @property
    def epochs_run(self) -> int:
        """Return the epochs trained, all folds together."""
        return sum(len(curve) for curve in self.curves.get("loss", []))

    def diagnosis(self) -> dict[str, Any]:
        """Return verdict and overfitting epoch of the mean curves over the folds that ended."""
        if self.diverged_at is not None:
            return {"verdict": "diverged", "overfit_epoch": None}
        train, validation = self.curves.get("loss", []), self.curves.get("val_loss", [])
        length = len(train[0]) if train else 0
        whole = [i for i, curve in enumerate(train) if len(curve) == length]
        if not length or not validation or (self.pruned and len(train) == 1):
            return {"verdict": None, "overfit_epoch": None}
        analysis = analyse_fit(
            np.mean([train[i] for i in whole], axis=0), np.mean([validation[i] for i in whole], axis=0)
        )
        return {"verdict": analysis.verdict, "overfit_epoch": analysis.overfit_epoch}


def run_trial(
    engine: Engine,
    configuration: Configuration,
    splits: Sequence[AnySplit],
    *,
    epochs: int,
    monitor: Monitor,
    pruner: FoldPruner | None = None,
    on_epoch: Callable[[int, int, float], None] | None = None,
    on_fold: Callable[[int, float], None] | None = None,
    run_epochs: int | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Train a configuration on every fold.

    Args:
        engine: the engine.
        configuration: optimizer, rate and decay.
        splits: one per fold.
        epochs: length of the decay in epochs.
        monitor: what to optimize.
        pruner: ends the trial early; None runs all of it.
        on_epoch: called with (fold, epoch, value) after each epoch, both counted from 0; where it raises
            `TimeUp`, the run is kept where it is, and the exception carries the curves so far.
        on_fold: called with (fold, score over the folds so far) after each fold.
        run_epochs: stop after this many epochs; the decay stays as long as it is.
        checkpoint: keeps how far the trial has come, and tells where it goes on.

    Returns:
        The outcome; a diverged trial has one too.
    """
    at = checkpoint.load() if checkpoint is not None else Position()
    outcome = Outcome(curves=at.curves)
    known = outcome.curves.get(monitor.name, [])
    costs = [[float(monitor.cost(value)) for value in curve] for curve in known[: at.fold]]
    for fold, split in enumerate(splits):
        if fold < at.fold:
            continue
        steps = split.steps_per_epoch(configuration.batch_size or engine.batch_size)
        table = configuration.rates(epochs * steps).reshape(epochs, steps)
        plateau = Plateau(configuration.final_fraction, epochs) if configuration.decay == "plateau" else None
        run = engine.start(configuration.spec, split, configuration.batch_size)
        costs.append([])
        begin = 0
        if fold == at.fold and at.epoch:
            run.restore(at.state)
            begin = at.epoch
            costs[fold] = [float(monitor.cost(value)) for value in known[fold]]
            if plateau is not None:
                plateau.restore(at.plateau)
        for epoch in range(begin, run_epochs or epochs):
            share = plateau.share if plateau is not None else 1.0
            result = run.epoch(table[epoch] * share, TRIAL_RULE)
            reason = result.reason
            step = result.diverged_step
            if reason is None and not np.isfinite(result.metrics.get("val_loss", 0.0)):
                reason, step = VALIDATION_NOT_FINITE, steps - 1
            if reason is not None:
                outcome.diverged_at = {"fold": fold + 1, "epoch": epoch + 1, "step": (step or 0) + 1, "reason": reason}
                outcome.pruned = True
                return outcome
            measured = dict(result.metrics)
            if plateau is not None:  # its rates cannot be told from the configuration alone
                measured[RATE] = float(table[epoch, 0] * share)
                plateau.after_epoch(float(monitor.cost(result.metrics[monitor.name])))
            for name, value in measured.items():
                per_fold = outcome.curves.setdefault(name, [])
                if len(per_fold) <= fold:
                    per_fold.append([])
                per_fold[fold].append(value)
            costs[fold].append(float(monitor.cost(result.metrics[monitor.name])))

            def here() -> Position:
                place, kept = (fold, epoch + 1), {} if plateau is None else plateau.state()  # noqa: B023
                return Position(*place, outcome.curves, kept, state=run.state())  # noqa: B023

            if on_epoch is not None:
                try:
                    on_epoch(fold, epoch, result.metrics[monitor.name])
                except TimeUp as up:
                    if checkpoint is not None and epoch + 1 < (run_epochs or epochs):
                        checkpoint.at_once(here)
                    up.args = (outcome.curves,)
                    raise
            if pruner is not None and pruner.inside_fold(costs[fold]):
                outcome.pruned = True
                return outcome
            if checkpoint is not None and epoch + 1 < (run_epochs or epochs):
                checkpoint.after_epoch(here)
        if on_fold is not None:
            mean = np.mean(costs, axis=0)
            on_fold(fold, float(np.min(mean) if monitor.mode == "min" else -np.min(mean)))
        if pruner is not None and fold + 1 < len(splits) and pruner.after_fold(costs):
            outcome.pruned = True
            return outcome
        if checkpoint is not None and fold + 1 < len(splits):
            checkpoint.after_fold(Position(fold + 1, 0, outcome.curves))
    mean = np.mean(costs, axis=0)
    best = int(np.argmin(mean))
    if not np.isfinite(mean[best]):
        last = {"fold": len(splits), "epoch": len(mean), "step": steps}
        outcome.diverged_at = {**last, "reason": f"{monitor.name} finite in no epoch of every fold"}
        outcome.pruned = True
        return outcome
    outcome.best_epoch = best + 1
    outcome.value = float(mean[best] if monitor.mode == "min" else -mean[best])
    if len(splits) > 1:
        outcome.value_std = float(np.std(np.asarray(costs)[:, best], ddof=1))
    return outcome


def split_seed(seed: int, repeat: int, fold: int) -> int:
    """Return the seed of everything random in one fold; repeat 0 is the study, later ones the confirmation."""
    return int(np.random.SeedSequence([seed, repeat, fold]).generate_state(1)[0])
