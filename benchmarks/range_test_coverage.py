"""Do the bounds of the range test hold the best learning rate, and how good is its suggestion?

For every task and optimizer whole runs at a constant rate on a fine grid, five rates per decade,
tell the best rate after 1, 5 and 20 epochs, on two splits.  Then our rule and those of fastai, Lightning,
pytorch-lr-finder and Smith judge ramps of the kind each of them runs, three shuffles each.  Our
constants may be fitted on the tasks in `FIT`; `HELD_OUT` judges them.

    python -m benchmarks.range_test_coverage measure FOLDER [task ...]    one file per task, about five minutes each
    python -m benchmarks.range_test_coverage report FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.objective import load_objective
from pipeline.search.range_test import OK, analyse_ramp, ramp, run_range_test
from pipeline.training.decays import rate_table
from pipeline.training.divergence import TRIAL_RULE
from pipeline.training.engine import Engine
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.splits import Split, make_splits

HERE = Path(__file__).resolve().parent
FIT = ("digits", "table", "autoencoder", "dropout")
HELD_OUT = ("text", "deep", "images", "series")
GRID = 10.0 ** np.arange(-6.0, 2.01, 0.2)
EPOCHS, BATCH_SIZE, REPEATS, RAMPS = 20, 32, 2, 3
BUDGETS = (1, 5, 20)
RAMP_OF = {"wide": (1e-7, 10.0, 100), "lightning": (1e-8, 1.0, 100)}


def objective_of(task: str) -> Path:
    own = HERE / "tasks" / f"{task}.py"
    return own if own.exists() else HERE.parent / "objectives" / f"{task}.py"


# -- measuring ------------------------------------------------------------------------------


def measure(task: str, folder: Path) -> None:
    """Record the runs of the grid and the ramps of a task; what its file holds already is kept."""
    objective = load_objective(str(objective_of(task)), HERE, test_fraction=0.2, seed=0)
    engine = Engine(objective.build_model, objective.train, batch_size=BATCH_SIZE)
    splits = []
    for repeat in range(RAMPS):
        ((train, validation),) = make_splits(
            objective.train.samples, objective.labels, folds=1, fraction=0.25, seed=repeat
        )
        splits.append(Split(train, validation, repeat))
    engine.calibrate("adam", splits[0], epochs=len(GRID) * EPOCHS * REPEATS, programs=1)
    engine.leave_plain(OPTIMIZERS, splits[0])
    path = folder / f"{task}.npz"
    found: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}
    steps = splits[0].steps_per_epoch(BATCH_SIZE)
    found["steps"] = np.array(steps)
    for optimizer in OPTIMIZERS:
        for decay, key in (("constant", "curves"), ("cosine", "cosine")):
            if f"{optimizer}/{key}" in found:
                continue
            curves = np.full((REPEATS, len(GRID), EPOCHS), np.inf)
            for repeat in range(REPEATS):
                for position, rate in enumerate(GRID):
                    run = engine.start(optimizer, splits[repeat])
                    rates = rate_table(decay, rate, 0.01, EPOCHS * steps).reshape(EPOCHS, steps)
                    for epoch in range(EPOCHS):
                        result = run.epoch(rates[epoch], TRIAL_RULE)
                        if result.reason is not None:
                            break
                        curves[repeat, position, epoch] = result.metrics["val_loss"]
            found[f"{optimizer}/{key}"] = curves
        for repeat in range(RAMPS):
            if f"{optimizer}/{repeat}/ours" in found:
                continue
            ours = run_range_test(engine, optimizer, splits[repeat])
            found[f"{optimizer}/{repeat}/ours"] = np.stack([ours.rates, ours.losses])
            for name, (low, high, steps) in RAMP_OF.items():
                rates = ramp(low, high, steps)
                losses = engine.start(optimizer, splits[repeat]).steps(rates).losses
                found[f"{optimizer}/{repeat}/{name}"] = np.stack([rates[: len(losses)], losses])
        print(task, optimizer, flush=True)
    np.savez_compressed(path, **found)


# -- the rules ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a rule says of a ramp: an interval, a rate to use, and the steps it took."""

    low: float
    high: float
    suggested: float
    steps: int


Rule = Callable[[str, np.ndarray, np.ndarray, int], Answer | None]
"""From optimizer, rates, losses and the steps of the runs to come; only our rule uses the last."""


def exponential_average(losses: np.ndarray, beta: float) -> np.ndarray:
    """Return the bias-corrected exponential moving average."""
    average, out = 0.0, []
    for step, loss in enumerate(losses):
        average = beta * average + (1 - beta) * loss
        out.append(average / (1 - beta ** (step + 1)))
    return np.array(out)


def stopped(smoothed: np.ndarray, factor: float) -> int:
    """Return the steps until the smoothed loss exceeds so many times its lowest value."""
    best = np.minimum.accumulate(smoothed)
    over = np.flatnonzero(~(smoothed <= factor * best))
    return int(over[0]) + 1 if len(over) else len(smoothed)


def around(rate: float, steps: int) -> Answer:
    """Return a point rule's answer: two decades around its rate, as wide as ours."""
    return Answer(rate / 10, rate * 10, rate, steps)


def fastai(which: str) -> Rule:
    """Return one of fastai's suggestions, over its trimmed record of 100 steps.

    minimum: a tenth of the rate of the lowest loss; steep: the steepest descent over the log rate; valley: a bit
    past the middle of the longest falling subsequence.  The interval of "steep" reaches to "minimum", as its
    documentation used both.
    """

    def rule(_: str, rates: np.ndarray, losses: np.ndarray, __: int) -> Answer | None:
        smoothed = exponential_average(losses, 0.98)
        steps = stopped(smoothed, 4.0)
        kept = slice(RAMP_OF["wide"][2] // 10, max(steps - 5, 0))
        rate, loss = rates[kept], smoothed[kept]
        if len(rate) < 3:
            return None
        lowest = rate[int(np.argmin(loss))] / 10
        steepest = rate[int(np.argmin(np.diff(loss) / np.diff(np.log(rate))))]
        if which == "minimum":
            return around(lowest, steps)
        if which == "steep":
            return Answer(min(steepest, lowest), max(steepest, lowest), steepest, steps)
        # Longest falling subsequence, with the place where each begins.
        length, before = np.ones(len(loss), int), np.arange(len(loss))
        for end in range(len(loss)):
            for start in range(end):
                if loss[end] < loss[start] and length[start] + 1 > length[end]:
                    length[end], before[end] = length[start] + 1, before[start]
        end = int(np.argmax(length))
        third = (end - before[end]) / 3
        return around(rate[min(before[end] + int(third) + int(third / 2), len(rate) - 1)], steps)

    return rule


def lightning(_: str, rates: np.ndarray, losses: np.ndarray, __: int) -> Answer | None:
    """Return Lightning's suggestion: the steepest descent per step of the averaged loss, without its first ten."""
    smoothed = exponential_average(losses, 0.98)
    steps = stopped(smoothed, 4.0)
    loss = smoothed[10 : steps - 1]
    loss = loss[np.isfinite(loss)]
    return around(rates[int(np.argmin(np.gradient(loss))) + 10], steps) if len(loss) >= 2 else None


def lr_finder(_: str, rates: np.ndarray, losses: np.ndarray, __: int) -> Answer | None:
    """Return pytorch-lr-finder's suggestion: the same with its own smoothing, 5%, and its own cuts."""
    smoothed = losses.copy()
    for step in range(1, len(losses)):
        smoothed[step] = 0.05 * losses[step] + 0.95 * smoothed[step - 1]
    steps = stopped(smoothed, 5.0)
    loss = smoothed[10 : max(steps - 5, 0)]
    return around(rates[int(np.argmin(np.gradient(loss))) + 10], steps) if len(loss) >= 2 else None


def smith(_: str, rates: np.ndarray, losses: np.ndarray, __: int) -> Answer | None:
    """Return Smith's rule: the highest rate before the loss rises, and a quarter of it."""
    steps = stopped(exponential_average(losses, 0.9), 4.0)
    window = np.ones(5) / 5
    if steps < 10:
        return None
    smoothed = np.convolve(losses[:steps], window, "valid")
    top = rates[int(np.nanargmin(np.where(np.isfinite(smoothed), smoothed, np.inf))) + 2]
    return Answer(top / 4, top, top / 2, steps)


def ours(optimizer: str, rates: np.ndarray, losses: np.ndarray, steps: int) -> Answer:
    """Return what lrtune's range test says."""
    found = analyse_ramp(optimizer, rates, losses, total_steps=steps)
    return Answer(found.low, found.high, found.suggested, len(rates))


def earlier(optimizer: str, rates: np.ndarray, losses: np.ndarray, _: int) -> Answer:
    """Return lrtune's earlier rule: [a / 30, min(5 a, 1.5 d)] with a at the smoothed minimum, suggestion a / 3."""
    found = analyse_ramp(optimizer, rates, losses)
    if found.status != OK:
        return Answer(found.low, found.high, found.suggested, len(rates))
    lowest = int(np.argmin(found.smoothed[np.isfinite(losses)]))
    initial = float(losses[: max(5, len(losses) // 10)].mean())
    above = np.flatnonzero(found.smoothed[lowest:] > initial)
    d = float(rates[lowest + above[0]]) if len(above) else np.inf
    a = float(rates[lowest])
    return Answer(a / 30, min(5 * a, 1.5 * d), a / (10 if optimizer == "lion" else 3), len(rates))


def fallback(optimizer: str, rates: np.ndarray, losses: np.ndarray, _: int) -> Answer:
    """Return no range test at all: the authors' default rate, and two decades around it."""
    return around(OPTIMIZERS[optimizer].default_learning_rate, 0)


RULES: dict[str, tuple[str, Rule]] = {
    "lrtune": ("ours", ours),
    "lrtune, earlier rule": ("ours", earlier),
    "Smith": ("wide", smith),
    "fastai minimum": ("wide", fastai("minimum")),
    "fastai steep to minimum": ("wide", fastai("steep")),
    "fastai valley": ("wide", fastai("valley")),
    "Lightning": ("lightning", lightning),
    "pytorch-lr-finder": ("wide", lr_finder),
    "default rate": ("ours", fallback),
}


# -- judging --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One task, optimizer and budget: the result at every rate of the grid, lower is better."""

    task: str
    optimizer: str
    epochs: int
    values: np.ndarray
    cosine: np.ndarray | None
    steps: int
    ramps: dict[str, list[np.ndarray]]

    @property
    def best_rate(self) -> float:
        """Return the rate of the grid with the best result."""
        return float(GRID[int(np.argmin(self.values))])

    def loss_over_best(self, rate: float, values: np.ndarray | None = None) -> float:
        """Return the result at a rate over the best at a constant rate; infinite where it diverged.

        Args:
            rate: between the rates of the grid the result is interpolated.
            values: results over the grid, instead of those at a constant rate.
        """
        values = self.values if values is None else values
        position = np.interp(np.log(rate), np.log(GRID), np.arange(len(GRID)))
        low, high = int(np.floor(position)), int(np.ceil(position))
        share = position - low
        value = values[low] if share == 0 else (1 - share) * values[low] + share * values[high]
        return float(value / self.values.min())

    @property
    def learns(self) -> bool:
        """Whether any rate is clearly better than the lowest, at which nothing is learned."""
        return bool(self.values.min() < 0.98 * self.values[0])


def cases(folder: Path, tasks: tuple[str, ...]) -> Iterator[Case]:
    """Return the recorded cases."""
    for task in tasks:
        path = folder / f"{task}.npz"
        if not path.exists():
            continue
        found = np.load(path)
        for optimizer in OPTIMIZERS:
            curves = found[f"{optimizer}/curves"]
            curves = np.where(np.isfinite(curves), curves, np.inf)
            ramps = {
                name: [found[f"{optimizer}/{repeat}/{name}"] for repeat in range(RAMPS)] for name in ("ours", *RAMP_OF)
            }
            for epochs in BUDGETS:
                values = value_of(curves[:, :, :epochs])
                decayed = found.get(f"{optimizer}/cosine") if epochs == EPOCHS else None
                cosine = None if decayed is None else value_of(np.where(np.isfinite(decayed), decayed, np.inf))
                case = Case(task, optimizer, epochs, values, cosine, epochs * int(found["steps"]), ramps)
                if case.learns:
                    yield case


def value_of(curves: np.ndarray) -> np.ndarray:
    """Return the best epoch of the mean over the splits, as a trial is judged."""
    return np.asarray(curves.mean(axis=0).min(axis=-1))


def held(case: Case, answer: Answer) -> bool:
    """Return whether the interval holds the best rate, to within half a step of the grid."""
    half = 10.0**0.1
    return answer.low / half <= case.best_rate <= answer.high * half


def holds_good(case: Case, answer: Answer) -> bool:
    """Return whether the interval holds a rate whose result is within 1% of the best."""
    inside = (answer.low <= GRID) & (answer.high >= GRID)
    return bool((case.values[inside] <= 1.01 * case.values.min()).any())


def report(folder: Path) -> None:
    """Print the tables."""
    for title, tasks in (("fitted on", FIT), ("left out", HELD_OUT)):
        chosen = list(cases(folder, tasks))
        print(f"{title}: {', '.join(tasks)}; {len(chosen)} cases of task, optimizer and budget")
        print(
            f"  {'rule':<26}{'holds best':>11}{'holds good':>11}{'decades':>9}{'within 5%':>11}{'error':>7}{'steps':>7}"
        )
        for name, (kind, rule) in RULES.items():
            rows = []
            for case in chosen:
                for rates, losses in case.ramps[kind]:
                    answer = rule(case.optimizer, rates, losses, case.steps)
                    rows.append(
                        (
                            held(case, answer),
                            holds_good(case, answer),
                            np.log10(answer.high / answer.low),
                            case.loss_over_best(answer.suggested) <= 1.05,
                            abs(np.log10(answer.suggested / case.best_rate)),
                            answer.steps,
                        )
                        if answer
                        else (False, False, np.nan, False, np.nan, len(rates))
                    )
            table = np.array(rows, dtype=float)
            print(
                f"  {name:<26}{table[:, 0].mean():>11.0%}{table[:, 1].mean():>11.0%}{np.nanmean(table[:, 2]):>9.2f}"
                f"{table[:, 3].mean():>11.0%}{np.nanmedian(table[:, 4]):>7.2f}{np.nanmean(table[:, 5]):>7.0f}"
            )
        by_budget = []
        for epochs in BUDGETS:
            some = [case for case in chosen if case.epochs == epochs]
            answers = [
                (case, ours(case.optimizer, *curve, case.steps)) for case in some for curve in case.ramps["ours"]
            ]
            by_budget.append(f"{epochs} epochs {np.mean([held(*pair) for pair in answers]):.0%}")
        print(f"  lrtune holds the best rate by budget: {', '.join(by_budget)}")
        good = [analyse_ramp(c.optimizer, *curve).status == OK for c in chosen for curve in c.ramps["ours"]]
        print(f"  lrtune's ramps with a result of their own: {np.mean(good):.0%}")


def main() -> None:
    """Measure or report."""
    if len(sys.argv) < 3 or sys.argv[1] not in ("measure", "report"):
        raise SystemExit(__doc__)
    folder = Path(sys.argv[2])
    if sys.argv[1] == "report":
        report(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for task in sys.argv[3:] or (*FIT, *HELD_OUT):
        measure(task, folder)


if __name__ == "__main__":
    main()
