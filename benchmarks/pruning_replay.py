"""Pruning rules replayed on recorded studies in which nothing was pruned.

First whole studies run without pruning; then every rule goes through the recorded trials as if
they came one by one, in the order of the study and in shuffled ones (what was enqueued stays in
front).  Reported per task, validation and rule: the share of the epochs that would be trained, the
share of studies whose winner would be pruned, and the loss of the best trial that is left over the
winner's, on average and at worst.  A hold-out is replayed on the first fold alone.

    python -m benchmarks.pruning_replay [seeds] [orders]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.search import TASKS, VARIANTS, prepared_task, recorded
from pipeline.search.pruning import FoldPruner, PastTrial, make_pruner, running_score
from pipeline.search.queue import DISTANCE

ENQUEUED = 7


class MiddleOfFold(FoldPruner):
    """The rule that was given up: judges inside every fold too, against all schemes, from a quarter of the epochs."""

    def inside_fold(self, curve: object) -> bool:
        """Return whether the best value so far is worse than nine tenths of the others'."""
        values = np.asarray(curve, dtype=float)
        if not 0.25 * self.epochs <= len(values) < self.epochs:
            return False
        others = self._best_so_far(len(values))
        return len(others) >= 5 and float(values.min()) > float(np.quantile(others, 0.9, method="higher"))


def rule(name: str) -> Callable[[int, int, int], FoldPruner]:
    """Return a maker of the study file's pruner of that name, from epochs, folds and the trial's number."""
    return lambda epochs, folds, number: make_pruner(name, 25.0, epochs=epochs, folds=folds, number=number)


RULES: dict[str, Callable[[int, int, int], FoldPruner]] = {
    **{name: rule(name) for name in ("median", "percentile", "successive-halving", "hyperband")},
    "inside folds, lenient": lambda epochs, folds, _: MiddleOfFold(0.5, epochs, folds),
}

Trial = list[np.ndarray]
"""The monitored value per epoch, one array per fold; empty for a trial that diverged."""


@dataclass(frozen=True)
class Replay:
    """What became of a study.

    Attributes:
        share: epochs trained over epochs recorded.
        lost: whether the winner was pruned.
        regret: value of the best trial that ran through over the winner's, minus 1.
    """

    share: float
    lost: bool
    regret: float


def replay(trials: list[Trial], epochs: int, make: Callable[[int, int, int], FoldPruner]) -> Replay:
    """Send recorded trials through a rule, one after the other."""
    folds = max(len(trial) for trial in trials)
    values = [running_score(trial) if len(trial) == folds else np.inf for trial in trials]
    seen: list[PastTrial] = []
    trained, through = 0, []
    for number, trial in enumerate(trials):
        pruner = make(epochs, folds, number)
        for past in seen[: max(0, number - DISTANCE + 1)]:
            pruner.record(past)
        done: list[np.ndarray] = []
        pruned = False
        for fold, curve in enumerate(trial):
            ended = number > 0 and next((e for e in range(1, len(curve)) if pruner.inside_fold(curve[:e])), None)
            done.append(curve[:ended] if ended else curve)
            pruned = bool(ended) or (number > 0 and fold + 1 < folds and pruner.after_fold(done))
            if pruned:
                break
        trained += sum(len(curve) for curve in done)
        seen.append(PastTrial(tuple(done)))
        if not pruned:
            through.append(values[number])
    winner = min(values)
    return Replay(
        trained / sum(len(curve) for trial in trials for curve in trial),
        min(through) > winner,
        min(through) / winner - 1,
    )


def main() -> None:
    """Record, replay, and print the table."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    orders = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    print(f"{'task':<8}{'validation':<12}{'rule':<24}{'trained':>8}{'winner lost':>13}{'regret':>9}{'at worst':>10}")
    for task in ("digits", "table"):
        epochs = TASKS[task]
        studies = []
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepared_task(folder, task)
            for seed in range(seeds):
                record = recorded(prepared, VARIANTS["no pruning"], seed)
                studies.append([[np.asarray(c) for c in trial.curves.get("val_loss", [])] for trial in record.trials])
        for validation, folds in (("5 folds", 5), ("hold-out", 1)):
            for name, make in RULES.items():
                found = []
                for trials in studies:
                    cut = [trial[:folds] for trial in trials]
                    rng = np.random.default_rng(0)
                    for order in range(orders):
                        late = rng.permutation(len(cut) - ENQUEUED) + ENQUEUED if order else range(ENQUEUED, len(cut))
                        found.append(replay(cut[:ENQUEUED] + [cut[i] for i in late], epochs, make))
                regrets = [r.regret for r in found]
                print(
                    f"{task:<8}{validation:<12}{name:<24}{np.mean([r.share for r in found]):>8.0%}"
                    f"{np.mean([r.lost for r in found]):>13.1%}{np.mean(regrets):>9.4f}{max(regrets):>10.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
