"""The optimizers that a study can choose from: their Keras class, settings and default rate.

The names are what people write in a study file and see in the dashboard.  Keras itself is only
imported when an optimizer is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pipeline.errors import SettingError, did_you_mean


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer as a study names it.

    Attributes:
        name: the name in study files.
        keras_class: class name in `keras.optimizers`.
        default_learning_rate: the rate Keras uses when none is given, or where that hardly learns the
            authors' (adagrad, adadelta, lion) or one that did in the benchmark (adafactor, ftrl).
        settings: further constructor arguments.
        from_ramp: decades from what a range test's ramp shows to the middle of the rates that were best in
            whole runs, fitted on several tasks (`benchmarks/range_test_coverage.py`); None where the ramp
            shows nothing of whole runs.
        settles: whether the best rate of longer runs is lower.
        rests_at_zero: whether a step at rate 0 leaves the weights alone.
        sibling: an optimizer so much alike that the best rates of the two lie close together.
    """

    name: str
    keras_class: str
    default_learning_rate: float
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    from_ramp: float | None = -0.75
    settles: bool = True
    rests_at_zero: bool = True
    sibling: str | None = None

    def code(self, learning_rate: str) -> str:
        """Return the Keras constructor call as Python source.

        Args:
            learning_rate: Python source of the `learning_rate` argument.

        >>> OPTIMIZERS["momentum"].code("0.1")
        'keras.optimizers.SGD(learning_rate=0.1, momentum=0.9)'
        """
        settings = "".join(f", {key}={value!r}" for key, value in self.settings.items())
        return f"keras.optimizers.{self.keras_class}(learning_rate={learning_rate}{settings})"


def _settings(**settings: Any) -> Mapping[str, Any]:
    return MappingProxyType(settings)


OPTIMIZERS: Mapping[str, OptimizerSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            OptimizerSpec("sgd", "SGD", 0.01, from_ramp=-0.55, settles=False),
            OptimizerSpec("momentum", "SGD", 0.01, _settings(momentum=0.9), from_ramp=-0.85, settles=False),
            OptimizerSpec(
                "nesterov",
                "SGD",
                0.01,
                _settings(momentum=0.9, nesterov=True),
                from_ramp=-0.65,
                settles=False,
                sibling="momentum",
            ),
            OptimizerSpec("rmsprop", "RMSprop", 0.001, from_ramp=-0.65),
            OptimizerSpec("adam", "Adam", 0.001, from_ramp=-0.65),
            OptimizerSpec("adamw", "AdamW", 0.001, _settings(weight_decay=0.004), from_ramp=-0.65, sibling="adam"),
            OptimizerSpec("nadam", "Nadam", 0.001, from_ramp=-0.65),  # Dozat 2016
            OptimizerSpec("adamax", "Adamax", 0.001, from_ramp=-0.85),  # Kingma and Ba 2015
            OptimizerSpec("adagrad", "Adagrad", 0.01, from_ramp=-0.6, settles=False),  # Duchi et al. 2011
            # Zeiler 2012: the method needs no rate
            OptimizerSpec("adadelta", "Adadelta", 1.0, from_ramp=-0.3, settles=False),
            # Chen et al. 2023: a rate 3 to 10 times smaller than AdamW's, a decay as much larger.
            OptimizerSpec("lion", "Lion", 0.0001, _settings(weight_decay=0.04), from_ramp=-0.85),
            # Shazeer and Stern 2018; without its own relative steps, so that the rate is the one that is given.
            # It clips its updates, so that a ramp never blows up.
            OptimizerSpec("adafactor", "Adafactor", 0.05, _settings(relative_step=False), from_ramp=None),
            OptimizerSpec("lamb", "Lamb", 0.001, _settings(weight_decay=0.01), from_ramp=-1.0),  # You et al. 2020
            # McMahan et al. 2013; its first step forgets the initial weights at any rate, which hides the ramp.
            OptimizerSpec("ftrl", "Ftrl", 0.5, from_ramp=None, rests_at_zero=False),
            # Jordan et al. 2024; Keras trains all but matrices with AdamW
            OptimizerSpec("muon", "Muon", 0.001, from_ramp=-1.1),
            # Defazio et al. 2024
            OptimizerSpec(
                "schedule-free-adamw",
                "ScheduleFreeAdamW",
                0.0025,
                _settings(weight_decay=0.004),
                from_ramp=-1.25,
                rests_at_zero=False,
            ),
        )
    }
)

DEFAULT_OPTIMIZERS = ("sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw")
"""What a study searches when its file names no optimizers."""

BASELINE_OPTIMIZER = "adam"
"""What people use who tune nothing: Adam at Keras's default rate, kept constant."""


def find_optimizer(optimizer: str | OptimizerSpec) -> OptimizerSpec:
    """Return the specification of an optimizer given by name.

    Raises:
        SettingError: for an unknown name.
    """
    if isinstance(optimizer, OptimizerSpec):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise SettingError(f"'{optimizer}' is not an optimizer{did_you_mean(optimizer, OPTIMIZERS)}")
    return OPTIMIZERS[optimizer]


def build_optimizer(optimizer: str | OptimizerSpec, learning_rate: float | Callable[[], Any]) -> Any:
    """Return a new Keras optimizer.

    Args:
        optimizer: a name in `OPTIMIZERS`, or a specification of one's own.
        learning_rate: a rate, or a function without arguments that returns it (a tensor will do).

    Returns:
        A `keras.optimizers.Optimizer`.

    Raises:
        SettingError: for an unknown name.
    """
    import keras

    spec = find_optimizer(optimizer)
    return getattr(keras.optimizers, spec.keras_class)(learning_rate=learning_rate, **spec.settings)
