"""lrtune: which learning rate, decay scheme and optimizer a Keras model should be trained with.

For notebooks: `from pipeline import tune, range_test, trials, LearningRateFinder` (see `pipeline.api`).
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the Python interface when it is first asked for: `lrtune --help` must not wait for it."""
    import importlib

    if name in ("tune", "range_test", "trials"):
        return getattr(importlib.import_module("pipeline.api"), name)
    if name == "LearningRateFinder":
        return importlib.import_module("pipeline.api").learning_rate_finder()
    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
