"""Seeds of a run, set so that other threads change no number and TensorFlow need not prepare its graphs anew."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.training.tensorflow_import import import_tensorflow

_set: list[int] = []
"""The last seed that lrtune has set itself."""

_drawn: list[int] = []
"""Holds one value from the moment on that operations are watched: how often one has asked for a seed of its own."""


def set_seed(seed: int) -> None:
    """Seed Python, NumPy, TensorFlow and Keras, as `keras.utils.set_random_seed` does."""
    _, keras = import_tensorflow()
    _set[:] = [seed % 2**32]
    keras.utils.set_random_seed(seed % 2**32)


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """While a model is built, let Keras draw its seeds from a generator that no other thread draws from.

    Keras takes them from Python's global generator, which a cluster's worker uses in other threads too; a draw of
    theirs in between would change every weight.  The numbers are those that `set_random_seed` leads to.
    """
    from keras.src.random import seed_generator

    shared = seed_generator.python_random
    seed_generator.python_random = random.Random(seed % 2**32)
    try:
        yield
    finally:
        seed_generator.python_random = shared


@contextmanager
def graphs_kept() -> Iterator[None]:
    """While this lasts, setting a seed throws prepared graphs away only where operations keep a state of their own.

    `tf.random.set_seed` empties TensorFlow's cache of prepared operations so that those that remember how much they
    have drawn (`tf.random.normal`, `tf.nn.dropout`) begin anew.  Every graph is then prepared again at its next
    call, which takes a second for a recurrent model, for every fold.  Keras's own random operations take their
    state as an input; as long as only they were used, nothing in the cache depends on a seed.
    """
    import_tensorflow()
    from tensorflow.python import pywrap_tfe

    first = not _drawn
    _watch_operations()
    clear = pywrap_tfe.TFE_ContextClearCaches

    def clear_if_drawn(handle: Any) -> None:
        if first or _drawn[0]:
            clear(handle)

    pywrap_tfe.TFE_ContextClearCaches = clear_if_drawn
    try:
        yield
    finally:
        pywrap_tfe.TFE_ContextClearCaches = clear


def draws() -> int:
    """Return how often an operation of this process has asked for a seed to keep, as `tf.random.normal` does."""
    return _drawn[0] if _drawn else 0


@contextmanager
def seeding_noticed(already: bool = False) -> Iterator[list[bool]]:
    """Notice while this lasts whether a program seeds TensorFlow; Keras and lrtune do not count.

    Args:
        already: whether a seed that was set before counts too, as in a notebook.

    Yields:
        A list that holds True once it has.
    """
    tf, keras = import_tensorflow()
    from tensorflow.python.eager import context

    noticed = [already and context.global_seed() not in (None, *_set)]
    places = ((keras.utils, "set_random_seed"), (tf.random, "set_seed"), (tf.compat.v1, "set_random_seed"))
    originals = [(module, name, getattr(module, name)) for module, name in places]

    def listening(original: Any) -> Any:
        @functools.wraps(original)
        def set_seed(*arguments: Any, **keywords: Any) -> Any:
            caller = str(sys._getframe(1).f_globals.get("__name__", ""))
            if caller.split(".")[0] not in ("keras", "tensorflow", "pipeline"):
                noticed[0] = True
            return original(*arguments, **keywords)

        return set_seed

    for module, name, original in originals:
        setattr(module, name, listening(original))
    try:
        yield noticed
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _watch_operations() -> None:
    """Notice from now on, in this process, whether an operation asks for a seed to keep."""
    from tensorflow.python.framework import random_seed

    if _drawn:
        return
    get_seed = random_seed.get_seed
    _drawn.append(0)

    def noticed(op_seed: Any) -> Any:
        _drawn[0] += 1
        return get_seed(op_seed)

    random_seed.get_seed = noticed
