"""The search space: one learning-rate coordinate for all optimizers, and decay schemes over it.

`lr_position` in [0, 1] maps to each optimizer's own log-scale bounds.  One name with one range
keeps the learning rate inside the sampler's joint space and survives a range test run again; the
true rate is a user attribute of the trial.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.training.decays import rate_table
from pipeline.training.optimizers import BASELINE_OPTIMIZER, OPTIMIZERS, OptimizerSpec
from pipeline.words import describe_configuration

if TYPE_CHECKING:
    from pipeline.study_file import SearchSection, StudyConfig


class Drawing(Protocol):
    """What draws parameters: a trial of Optuna's, or one that is not stored yet."""

    @property
    def user_attrs(self) -> dict[str, Any]:
        """What is known of the trial."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Draw one of the choices."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""


DIGITS = 4
"""Significant digits of a drawn number: trials train with numbers that people can read and paste."""


def tidy(value: float) -> float:
    """Return a number with four significant digits.

    >>> tidy(0.0107224045426)
    0.01072
    """
    return float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Configuration:
    """What one trial trains with.

    Attributes:
        optimizer: a name in `OPTIMIZERS`.
        learning_rate: rate at the first step.
        decay: a name in `DECAYS`.
        final_fraction: rate at the last step over rate at the first (1cycle: over the highest).
        warmup_fraction: share of the run in which the rate rises linearly before the decay begins.
        momentum, weight_decay, clipnorm: settings of the optimizer; None leaves them as they are.
        batch_size: samples per step; None is the study's.
    """

    optimizer: str
    learning_rate: float
    decay: str
    final_fraction: float = 1.0
    warmup_fraction: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    clipnorm: float | None = None
    batch_size: int | None = None

    def rates(self, total_steps: int) -> NDArray[np.float64]:
        """Return the learning rate of every step of a run, shape (total_steps,); `plateau` lowers it as it goes."""
        return rate_table(self.decay, self.learning_rate, self.final_fraction, total_steps, self.warmup_fraction or 0.0)

    @property
    def spec(self) -> OptimizerSpec:
        """Return the optimizer with the settings that were searched."""
        spec = OPTIMIZERS[self.optimizer]
        given = {"momentum": self.momentum, "weight_decay": self.weight_decay, "clipnorm": self.clipnorm}
        searched = {key: value for key, value in given.items() if value is not None}
        return replace(spec, settings={**spec.settings, **searched}) if searched else spec

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dict(vars(self))

    def describe(self) -> str:
        """Return one line for people."""
        return describe_configuration(**self.as_dict())


BASELINE = Configuration(BASELINE_OPTIMIZER, OPTIMIZERS[BASELINE_OPTIMIZER].default_learning_rate, "constant")
"""The Keras default, trial 0 of every study."""


EDGE = 0.1
"""The best trial lies at an edge when it is in this outer share of the range of positions."""

SETTLED_TRIALS = 12
"""Trials between two looks at where the best one lies."""

WIDER = 0.25
"""A side is widened by this share of the first range, half a decade for bounds of two ..."""

WIDEST = 1.0
"""... and in all by no more than this."""


def widened(history: Iterable[tuple[float | None, float]]) -> tuple[float, float]:
    """Return the range of `lr_position` after these trials: wider where the best keeps lying at an edge.

    Args:
        history: position, or None, and cost (lower is better, infinite for a trial that did not run
            through) of each trial, in the order of their numbers.

    >>> widened([(0.5, 1.0)] * 12), widened([(0.95, 1.0)] * 12)
    ((0.0, 1.0), (0.0, 1.25))
    """
    low, high, since = 0.0, 1.0, 0
    best: tuple[float, float | None] = (math.inf, None)
    for position, cost in history:
        since += 1
        if cost < best[0]:
            best = (cost, position)
        if since < SETTLED_TRIALS or best[1] is None:
            continue
        edge = EDGE * (high - low)
        if best[1] > high - edge and high < 1.0 + WIDEST:
            high, since = high + WIDER, 0
        elif best[1] < low + edge and low > -WIDEST:
            low, since = low - WIDER, 0
    return low, high


def widening_note(positions: tuple[float, float]) -> str | None:
    """Return what is said of a search that was widened, or None."""
    sides = [name for name, beyond in (("lower", positions[0] < 0), ("upper", positions[1] > 1)) if beyond]
    if not sides:
        return None
    return (
        f"the best trial lay at the {' and then the '.join(sides)} edge of the learning rates of the range test; "
        "the search was widened there"
    )


@dataclass(frozen=True)
class Space:
    """What a study samples from.

    Attributes:
        optimizers: names to choose from.
        decays: names to choose from.
        bounds: lowest and highest learning rate of each optimizer; empty for a sweep.
        final_fraction: lowest and highest final fraction, or None where `final_fractions` holds choices.
        final_fractions: final fractions to choose from.
        learning_rates: learning rates of a sweep; empty where `bounds` are searched.
        settings: values to choose from of every further dimension, by its name in `Configuration`.
        positions: lowest and highest `lr_position`, beyond [0, 1] where the search was widened.
        bounds_batch_size: samples per step for which the bounds were measured; None takes them as they
            are for every batch size.
    """

    optimizers: tuple[str, ...]
    decays: tuple[str, ...]
    bounds: Mapping[str, tuple[float, float]]
    final_fraction: tuple[float, float] | None
    final_fractions: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    settings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    positions: tuple[float, float] = (0.0, 1.0)
    bounds_batch_size: int | None = None

    def settings_of(self, optimizer: str, decay: str) -> dict[str, tuple[float, ...]]:
        """Return the further dimensions of an optimizer under a decay.

        `plateau` has no warm-up: Keras's callback cannot lower the rate of a schedule.
        """
        own = OPTIMIZERS[optimizer].settings
        return {
            name: values
            for name, values in self.settings.items()
            if name in own or name in ("clipnorm", "batch_size") or (name == "warmup_fraction" and decay != "plateau")
        }

    def rate_at(self, optimizer: str, position: float, batch_size: int | None = None) -> float:
        """Return the learning rate at a position of an optimizer's bounds.

        Bounds that were measured move with the square root of the batch size, as the noise of the
        gradient does (Krizhevsky 2014; Malladi et al. 2022 for adaptive optimizers).

        >>> Space(("sgd",), ("constant",), {"sgd": (0.01, 1.0)}, (0.001, 1.0)).rate_at("sgd", 0.5)
        0.1
        """
        low, high = self.bounds[optimizer]
        scale = math.sqrt(batch_size / self.bounds_batch_size) if batch_size and self.bounds_batch_size else 1.0
        return tidy(scale * low * (high / low) ** position)

    def position_of(self, optimizer: str, learning_rate: float) -> float:
        """Return the position of a learning rate, outside [0, 1] where the rate is outside the bounds."""
        low, high = self.bounds[optimizer]
        return math.log(learning_rate / low) / math.log(high / low) if high > low else 0.0

    def suggest(self, trial: Drawing) -> Configuration:
        """Draw a configuration for a trial; the baseline keeps its own true rate."""
        if trial.user_attrs.get("baseline"):
            return self._suggest_baseline(trial)
        optimizer = trial.suggest_categorical("optimizer", self.optimizers)
        decay = trial.suggest_categorical("decay", self.decays)
        if self.learning_rates:
            rate = trial.suggest_categorical("learning_rate", self.learning_rates)
        else:
            position = trial.suggest_float("lr_position", *self.positions)
        fraction = self._final_fraction(trial, decay)
        further: dict[str, Any] = {
            name: trial.suggest_categorical(name, values) for name, values in self.settings_of(optimizer, decay).items()
        }
        if not self.learning_rates:
            rate = self.rate_at(optimizer, position, further.get("batch_size"))
        return Configuration(optimizer, rate, decay, fraction, **further)

    def _final_fraction(self, trial: Drawing, decay: str) -> float:
        if decay == "constant":
            return 1.0
        if self.final_fraction is None:
            return float(trial.suggest_categorical("final_fraction", self.final_fractions))
        low, high = self.final_fraction
        return min(tidy(trial.suggest_float("final_fraction", low, high, log=True)), 1.0)

    def _suggest_baseline(self, trial: Drawing) -> Configuration:
        """Name the baseline's parameters in the dashboard, as far as the space has them."""
        if BASELINE.optimizer in self.optimizers and BASELINE.decay in self.decays:
            trial.suggest_categorical("optimizer", self.optimizers)
            trial.suggest_categorical("decay", self.decays)
            if not self.learning_rates:
                trial.suggest_float("lr_position", *self.positions)
            elif BASELINE.learning_rate in self.learning_rates:
                trial.suggest_categorical("learning_rate", self.learning_rates)
        return BASELINE

    def baseline_parameters(self) -> dict[str, Any]:
        """Return the parameters that enqueue the baseline; its position may lie outside [0, 1].

        A position outside is kept as it is: the sampler then sees the baseline's value beyond the
        edge where it was measured, not on it.
        """
        if BASELINE.optimizer not in self.optimizers or BASELINE.decay not in self.decays:
            return {}
        parameters: dict[str, Any] = {"optimizer": BASELINE.optimizer, "decay": BASELINE.decay}
        if not self.learning_rates:
            parameters["lr_position"] = self.position_of(BASELINE.optimizer, BASELINE.learning_rate)
        elif BASELINE.learning_rate in self.learning_rates:
            parameters["learning_rate"] = BASELINE.learning_rate
        return parameters

    def own_parameters(self, optimizer: str, learning_rate: float) -> dict[str, Any] | None:
        """Return the parameters that enqueue a model's own optimizer; None where that is no choice here.

        Args:
            optimizer, learning_rate: what the model was compiled with; its rate may lie outside the bounds.
        """
        if optimizer not in self.optimizers or "constant" not in self.decays or self.learning_rates or self.settings:
            return None
        position = self.position_of(optimizer, learning_rate)
        return {"optimizer": optimizer, "decay": "constant", "lr_position": position}

    def sweep(self) -> list[dict[str, Any]]:
        """Return the parameters of every configuration of a sweep but the baseline's, rate by rate."""
        points = []
        for rate, optimizer, decay in itertools.product(self.learning_rates, self.optimizers, self.decays):
            point = {"optimizer": optimizer, "decay": decay, "learning_rate": rate}
            further = self.settings_of(optimizer, decay)
            if not further and point == self.baseline_parameters():
                continue
            if decay != "constant" and self.final_fractions:
                further = {"final_fraction": self.final_fractions, **further}
            points += [
                {**point, **dict(zip(further, values, strict=True))} for values in itertools.product(*further.values())
            ]
        return points

    @property
    def size(self) -> float:
        """Number of configurations, the baseline included; infinite unless everything is a choice."""
        if not self.learning_rates or (set(self.decays) - {"constant"} and not self.final_fractions):
            return math.inf
        return len(self.sweep()) + 1

    def suggestion_parameters(self, optimizer: str, learning_rate: float) -> dict[str, Any]:
        """Return the parameters that enqueue a range test's suggestion.

        It runs with a decay that ends low where the space has one: the rate at which the loss
        still falls fast is too high to settle at.
        """
        decay = next((name for name in ("cosine", "linear", "exponential") if name in self.decays), self.decays[0])
        parameters: dict[str, Any] = {
            "optimizer": optimizer,
            "decay": decay,
            "lr_position": min(max(self.position_of(optimizer, learning_rate), 0.0), 1.0),
        }
        if decay != "constant":
            if self.final_fraction is None:
                parameters["final_fraction"] = min(self.final_fractions)
            else:
                low, high = self.final_fraction
                parameters["final_fraction"] = min(max(0.01, low), high)
        if self.bounds_batch_size in self.settings.get("batch_size", ()):
            parameters["batch_size"] = self.bounds_batch_size
        return parameters


def space_of(config: StudyConfig, tests: Mapping[str, Any]) -> Space:
    """Return the search space of a study, with the bounds that its range tests found.

    Args:
        config: the study file's keys.
        tests: range tests as they are stored, by optimizer.
    """
    search = config.search
    choice, fraction = search.learning_rate, search.final_fraction
    if choice is None:
        bounds = {name: (float(tests[name]["low"]), float(tests[name]["high"])) for name in search.optimizers}
    elif choice.low is not None and choice.high is not None:
        bounds = dict.fromkeys(search.optimizers, (choice.low, choice.high))
    else:
        bounds = {}
    return Space(
        optimizers=search.optimizers,
        decays=search.decays,
        bounds=bounds,
        final_fraction=(fraction.low, fraction.high)
        if fraction.low is not None and fraction.high is not None
        else None,
        final_fractions=fraction.values or (),
        learning_rates=(choice.values or ()) if choice is not None else (),
        settings=search.settings(),
        bounds_batch_size=config.batch_size if choice is None else None,
    )


def space_size(search: SearchSection) -> float:
    """Return how many configurations a search has, the baseline included; infinite unless everything is a choice."""
    choice = search.learning_rate
    if choice is None or choice.values is None:
        return math.inf
    return Space(
        optimizers=search.optimizers,
        decays=search.decays,
        bounds={},
        final_fraction=None if search.final_fraction.values else (0.1, 1.0),
        final_fractions=search.final_fraction.values or (),
        learning_rates=choice.values,
        settings=search.settings(),
    ).size
