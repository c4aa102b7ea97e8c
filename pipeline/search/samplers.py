"""The samplers of a study file, made of Optuna's."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, QMCSampler, TPESampler

from pipeline.errors import require_package

if TYPE_CHECKING:
    from pipeline.search.space import Space

PACKAGES = {"cma-es": "cmaes", "gp": "torch"}
"""Packages that samplers need beside Optuna."""

STARTUP_TRIALS = 10
"""Trials before TPE begins to model; the baseline and the range tests' suggestions count."""


class JointTPESampler(TPESampler):
    """TPE over optimizer, decay and learning-rate position together, from the first trial on.

    Optuna infers the joint space from what all past trials have in common; a baseline outside
    the space would shrink it to nothing.  The space of a study is known, so it is given here.

    Args:
        joint: the parameters to model together.
        seed: seed of the sampler.
    """

    def __init__(self, joint: dict[str, BaseDistribution], seed: int) -> None:
        super().__init__(
            seed=seed,
            n_startup_trials=STARTUP_TRIALS,
            multivariate=True,
            constant_liar=False,
        )
        self._warn_independent_sampling = False  # the final fraction is sampled on its own: `constant` has none
        self._joint = {name: distribution for name, distribution in joint.items() if not distribution.single()}

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        """Return the given space."""
        return dict(self._joint)


class EndlessGridSampler(optuna.samplers.GridSampler):
    """A grid that leaves the end of the study to the study: Optuna's stops it when the grid is used up."""

    def after_trial(self, *_: Any) -> None:
        """Do nothing."""


def joint_space(space: Space) -> dict[str, BaseDistribution]:
    """Return the parameters that every trial of the space has."""
    joint: dict[str, BaseDistribution] = {
        "optimizer": CategoricalDistribution(space.optimizers),
        "decay": CategoricalDistribution(space.decays),
    }
    if space.learning_rates:
        joint["learning_rate"] = CategoricalDistribution(space.learning_rates)
    else:
        joint["lr_position"] = FloatDistribution(*space.positions)
    return joint


class JointQMCSampler(QMCSampler):
    """Quasi-random positions and final fractions; optimizer and decay are drawn at random.

    Args:
        space: what is searched.
        seed: seed of the sequence, the same for every trial of a study.
        own_seed: seed of what is drawn at random, another for every trial.
    """

    def __init__(self, space: Space, seed: int, own_seed: int) -> None:
        super().__init__(
            scramble=True,
            seed=seed,
            independent_sampler=optuna.samplers.RandomSampler(seed=own_seed),
            warn_independent_sampling=False,
            warn_asynchronous_seeding=False,
        )
        self._sequence: dict[str, BaseDistribution] = {}
        if not space.learning_rates:
            self._sequence["lr_position"] = FloatDistribution(0.0, 1.0)
        if space.final_fraction is not None and set(space.decays) - {"constant"}:
            self._sequence["final_fraction"] = FloatDistribution(*space.final_fraction, log=True)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        """Return the given space."""
        return dict(self._sequence)


def check_sampler(name: str) -> None:
    """Refuse a sampler whose package is not installed, before a study begins.

    Raises:
        KnownError: naming the package.
    """
    if name in PACKAGES:
        require_package(PACKAGES[name], f"sampler.name: '{name}'")


def make_sampler(name: str, study_seed: int, number: int, space: Space) -> BaseSampler:
    """Return the sampler of one trial.

    Args:
        name: a name in `SAMPLERS` of the study file.
        study_seed: seed of the study.
        number: number of the trial; it seeds what must differ between trials.
        space: what it samples.
    """
    seed = study_seed + number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of options that still work, experimental samplers
        if name == "tpe":
            return JointTPESampler(joint_space(space), seed)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "qmc":
            return JointQMCSampler(space, study_seed, seed)
        if name == "cma-es":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        return EndlessGridSampler(_grid(space), seed=0)


def _grid(space: Space) -> dict[str, list[Any]]:
    """Return the values of each parameter on a grid: nine positions, four final fractions."""
    import numpy as np

    grid: dict[str, list[Any]] = {"optimizer": list(space.optimizers), "decay": list(space.decays)}
    if space.learning_rates:
        grid["learning_rate"] = list(space.learning_rates)
    else:
        grid["lr_position"] = np.linspace(0.0, 1.0, 9).tolist()
    if set(space.decays) - {"constant"}:
        if space.final_fraction is None:
            grid["final_fraction"] = list(space.final_fractions)
        else:
            grid["final_fraction"] = np.geomspace(*space.final_fraction, 4).tolist()
    return {**grid, **{name: list(values) for name, values in space.settings.items()}}
