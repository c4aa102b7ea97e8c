"""Models built anew for every run, and what outlives them.

A program may make layers once, at the top of its file, and use them in every model that
`build_model()` returns; or return the same model twice.  Such variables keep what an earlier run
has trained.  They are noticed here, and start every run at the values they had at first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pipeline.errors import ObjectiveError


class Builder:
    """Calls `build_model()`; what a later model shares with an earlier one starts over.

    Args:
        function: function without arguments that returns a compiled Keras model.

    Attributes:
        trained: whether a run has begun, so that values seen from now on may be trained ones.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.trained = False
        self._models = 0
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._kept: dict[int, tuple[Any, np.ndarray]] = {}

    def __call__(self) -> Any:
        """Return a model whose shared variables hold their first values."""
        self.restore()
        model = self.function()
        self._models += 1
        self.look(model)
        return model

    def outliving(self, but: frozenset[int] = frozenset()) -> list[Any]:
        """Return the variables that outlive a model, in the order in which they were noticed.

        Args:
            but: ids of variables to leave out.
        """
        return [variable for key, (variable, _) in self._kept.items() if key not in but]

    def look(self, model: Any) -> None:
        """Notice which variables of the latest model an earlier one had too.

        Args:
            model: what the last call returned; again once variables of it have been made since.

        Raises:
            ObjectiveError: for one whose first value is not known any more, since it has been trained.
        """
        self._seen = {key: seen for key, seen in self._seen.items() if seen[0]() is not None}
        for variable in variables_of(model):
            before, number = self._seen.get(id(variable), (None, self._models))
            if before is not None and number < self._models and id(variable) not in self._kept:
                if self.trained:
                    raise ObjectiveError(
                        "build_model() must return models that do not depend on earlier runs; its variable "
                        f"'{name_of(variable)}' belongs to an earlier model too, and has been trained since. Make "
                        "every layer inside build_model()."
                    )
                self.keep([variable])
            self._seen.setdefault(id(variable), (weakref.ref(variable), self._models))

    def keep(self, variables: Iterable[Any]) -> None:
        """Start variables over at their present values from now on."""
        for variable in variables:
            if id(variable) not in self._kept:
                self._kept[id(variable)] = variable, np.array(variable.numpy())

    def restore(self, but: frozenset[int] = frozenset()) -> None:
        """Put first values back.

        Args:
            but: ids of variables to leave as they are.
        """
        for key, (variable, value) in self._kept.items():
            if key not in but:
                variable.assign(value)


def variables_of(model: Any) -> list[Any]:
    """Return the TensorFlow variables of a model, optimizers and metrics left out."""
    metrics = {id(plain(v)) for v in model.metrics_variables}
    return [v for v in map(plain, model.variables) if id(v) not in metrics]


def plain(variable: Any) -> Any:
    """Return the TensorFlow variable behind one of Keras's."""
    return getattr(variable, "value", variable) if hasattr(variable, "regularizer") else variable


def name_of(variable: Any) -> str:
    """Return what people call a variable."""
    return str(getattr(variable, "path", None) or getattr(variable, "name", "variable")).partition(":")[0]


def further_optimizers(keras: Any, model: Any) -> dict[str, Any]:
    """Return the optimizers among the attributes of a model and its layers, by the attribute's name."""
    found: dict[str, Any] = {}
    for owner in model._flatten_layers():
        for name, value in vars(owner).items():
            for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
                if isinstance(item, keras.optimizers.Optimizer) and item is not model.optimizer:
                    found.setdefault(name.lstrip("_"), item)
    return found


def other_state(tf: Any, keras: Any, model: Any) -> list[Any]:
    """Return the variables that a model keeps beside Keras's own: plain tf.Variables, further optimizers.

    They are looked for among the attributes of the model and its layers, in lists and dicts too.
    """
    known = {id(plain(v)) for v in (*model.variables, *model.metrics_variables)}
    if model.optimizer is not None:
        known |= {id(plain(v)) for v in model.optimizer.variables}
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, keras.optimizers.Optimizer):
            for variable in value.variables if value is not model.optimizer else ():
                look(variable)
        elif isinstance(value, tf.Variable | keras.Variable):
            if id(plain(value)) not in known:
                known.add(id(plain(value)))
                found.append(plain(value))
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)
        elif isinstance(value, dict):
            for item in value.values():
                look(item)

    for owner in model._flatten_layers():
        for name, value in vars(owner).items():
            if not name.startswith("_"):
                look(value)
    return found


def overrides(keras: Any, model: Any, name: str) -> bool:
    """Return whether the model's class brings its own method `name`."""
    return getattr(type(model), name) is not getattr(keras.Model, name)


def fixed_batch(model: Any) -> int | None:
    """Return the batch size that a model's inputs fix, or None."""
    try:
        sizes = {tensor.shape[0] for tensor in model.inputs or ()}
    except (AttributeError, ValueError):
        return None
    return sizes.pop() if len(sizes) == 1 else None


def uses(graph: Any, tensor: Any, variables: Iterable[Any]) -> list[Any]:
    """Return which of some variables a tensor of a graph is computed from.

    Args:
        graph: the graph of a traced function.
        tensor: one of its tensors.
        variables: TensorFlow variables.
    """
    by_handle = {id(inside): outside for outside, inside in graph.captures}
    handles = {id(v.handle): v for v in variables}
    found, seen, queue = [], set(), [tensor]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        outside = by_handle.get(id(item))
        if outside is not None and id(outside) in handles:
            found.append(handles[id(outside)])
        elif getattr(item, "op", None) is not None:
            queue.extend(item.op.inputs)
    return found
