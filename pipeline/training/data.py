"""Training data in memory: one array, or a dict, tuple or list of arrays, of samples along axis 0."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import ObjectiveError

Tree = Any
"""An array, or a dict, tuple or list of trees; None stands for "not given"."""


@dataclass(frozen=True)
class Data:
    """Samples with their targets and weights.

    Attributes:
        x: inputs; every array has shape (samples, ...).
        y: targets in the same form, or None for a model that makes its own.
        sample_weight: weights in the form Keras takes them, or None.
        samples: number of samples.
        holes: what is said of values that are NaN or infinite; empty for none.
    """

    x: Tree
    y: Tree
    sample_weight: Tree
    samples: int
    holes: str = ""

    def parts(self) -> tuple[Tree, ...]:
        """Return (x,), (x, y) or (x, y, sample_weight), as `train_step` unpacks them."""
        if self.sample_weight is not None:
            return (self.x, self.y, self.sample_weight)
        return (self.x,) if self.y is None else (self.x, self.y)

    def take(self, index: np.ndarray) -> Data:
        """Return the samples at `index`, shape (n,)."""
        x, y, weight = (map_tree(lambda a: a[index], part) for part in (self.x, self.y, self.sample_weight))
        return Data(x, y, weight, len(index), self.holes)

    def samples_with_holes(self) -> np.ndarray:
        """Return the indices of samples with a NaN or infinite value."""
        bad = np.zeros(self.samples, bool)
        for _, array in leaves(self.parts()):
            if isinstance(array, np.ndarray) and array.dtype.kind in "fc":
                bad |= ~np.isfinite(array).reshape(self.samples, -1).all(axis=1)
        return np.flatnonzero(bad)

    def fingerprint(self) -> str:
        """Return a short hash of every value, dtype, shape and name."""
        digest = hashlib.blake2b(digest_size=8)
        for path, array in leaves(self.parts()):
            digest.update(f"{path}:{array.dtype}:{array.shape};".encode())
            if isinstance(array, Ragged):
                digest.update(array.lengths.tobytes() + np.ascontiguousarray(array.values).tobytes())
            elif array.dtype == object:
                digest.update(repr(array.tolist()).encode())
            else:
                digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
        return digest.hexdigest()

    @property
    def counted(self) -> str:
        """Return how many samples there are, for people."""
        return f"{self.samples} samples"

    def describe(self) -> str:
        """Return a line for people: number of samples, then shape and dtype of each input and target."""

        def line(part: Tree) -> str:
            return ", ".join(
                f"{path + ' ' if path else ''}{'×'.join(str(n or 'any') for n in array.shape[1:]) or 'scalar'} "
                f"{'text' if array.dtype.kind == 'U' else array.dtype}"
                for path, array in leaves(part)
            )

        target = f" -> {line(self.y)}" if self.y is not None else ""
        weighted = ", weighted" if self.sample_weight is not None else ""
        return f"{self.counted}, {line(self.x)}{target}{weighted}"


@dataclass(frozen=True)
class Ragged:
    """Samples of different lengths, as a ragged tensor holds them.

    Attributes:
        values: the values of all samples, one after the other, shape (values, ...).
        lengths: how many of them each sample has, shape (samples,).
    """

    values: np.ndarray
    lengths: np.ndarray

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Return (samples, None, ...)."""
        return (len(self.lengths), None, *self.values.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """Return the number of axes, the ragged one included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of values."""
        return int(self.values.size)

    @property
    def nbytes(self) -> int:
        """Return the bytes that the values take."""
        return int(self.values.nbytes)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Ragged:
        chosen = np.arange(len(self))[index]
        ends = np.cumsum(self.lengths)
        parts = [self.values[ends[i] - self.lengths[i] : ends[i]] for i in chosen]
        return Ragged(np.concatenate(parts) if parts else self.values[:0], self.lengths[chosen])


def as_tensor(tf: Any, leaf: Any) -> Any:
    """Return an array as a tensor, samples of different lengths as a ragged one."""
    if isinstance(leaf, Ragged):
        return tf.RaggedTensor.from_row_lengths(leaf.values, leaf.lengths)
    return tf.constant(leaf)


def map_tree(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply `function` to every leaf that is not None and keep the form."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(map_tree(function, value) for value in tree)
    return function(tree)


def map_trees(function: Callable[..., Any], *trees: Tree) -> Tree:
    """Apply `function` to the leaves of trees of the same form, those of one place together."""
    first = trees[0]
    if any(tree is None for tree in trees):
        return None
    if isinstance(first, Mapping):
        return {key: map_trees(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(map_trees(function, *parts) for parts in zip(*trees, strict=True))
    return function(*trees)


def joined(first: Data, second: Data) -> Data:
    """Return the samples of both, one after the other; where only one part has weights, the other's are 1."""
    weights = first.sample_weight, second.sample_weight
    if weights[1] is None:
        weights = weights[0], map_tree(lambda a: np.ones((second.samples, *a.shape[1:]), a.dtype), weights[0])
    elif weights[0] is None:
        weights = map_tree(lambda a: np.ones((first.samples, *a.shape[1:]), a.dtype), weights[1]), weights[1]
    x, y, weight = (
        map_trees(_concatenated, one, other) for one, other in ((first.x, second.x), (first.y, second.y), weights)
    )
    return Data(x, y, weight, first.samples + second.samples, first.holes or second.holes)


def _concatenated(one: Any, other: Any) -> Any:
    if isinstance(one, Ragged):
        return Ragged(np.concatenate([one.values, other.values]), np.concatenate([one.lengths, other.lengths]))
    return np.concatenate([one, other])


def leaves(tree: Tree, path: str = "") -> list[tuple[str, Any]]:
    """Return (path, leaf) of every leaf that is not None, in order.

    >>> leaves({"a": 1, "b": (2, 3)})
    [('a', 1), ('b[0]', 2), ('b[1]', 3)]
    """
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        found = (leaves(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items())
    elif isinstance(tree, tuple | list):
        found = (leaves(value, f"{path}[{i}]") for i, value in enumerate(tree))
    else:
        return [(path, tree)]
    return [leaf for group in found for leaf in group]


MOST_INPUTS = 64
"""A list of more arrays than this holds samples, not the inputs of a model."""


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "to_numpy") or _is_sparse(value) or _is_ragged(value)


def _is_sparse(value: Any) -> bool:
    """Return whether a value is a SciPy sparse matrix or a sparse tensor."""
    return hasattr(value, "toarray") or type(value).__name__ in ("SparseTensor", "SparseTensorValue")


def _is_ragged(value: Any) -> bool:
    return hasattr(value, "row_lengths") and hasattr(value, "flat_values")


def _ragged(where: str, value: Any) -> Ragged:
    """Return a ragged tensor as arrays.

    Raises:
        ObjectiveError: where more than its second axis is ragged.
    """
    if value.ragged_rank != 1:
        raise ObjectiveError(
            f"{where} must be ragged along its second axis alone, got a ragged tensor with {value.ragged_rank} ragged "
            "axes. Call to_tensor() on it, which pads with zeros."
        )
    return Ragged(value.values.numpy(), value.row_lengths().numpy())


def _dense(where: str, value: Any) -> Any:
    """Return a sparse matrix or tensor with its zeros, as Keras's layers take it too.

    Raises:
        ObjectiveError: where that would not fit into memory.
    """
    shape = tuple(int(n) for n in value.shape)
    needed, limit = int(np.prod(shape, dtype=float)) * 4, memory_limit()
    if needed > limit:
        raise ObjectiveError(
            f"{where} must fit into {limit / 2**30:.1f} GiB, half of this machine's memory, with its zeros, got a "
            f"sparse matrix of {' x '.join(map(str, shape))}, which needs {needed / 2**30:.1f} GiB. Return tf.data "
            "datasets whose batches are sparse, or fewer columns."
        )
    if hasattr(value, "toarray"):
        return value.toarray()
    import tensorflow as tf

    return tf.sparse.to_dense(tf.sparse.reorder(value)).numpy()


MEMORY_SHARE = 0.5
"""How much of the machine's memory the samples of one dataset may take at most, as a share."""


def memory_limit() -> float:
    """Return how many bytes one dataset may take."""
    return MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _is_series(value: Any) -> bool:
    return "pandas" in sys.modules and isinstance(value, sys.modules["pandas"].Series)


def _to_array(value: Any, float_type: str) -> np.ndarray:
    """Turn what Keras users pass as data into an array of the dtype `model.fit` would use."""
    array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
    if array.ndim == 1 and _is_series(value):
        array = array[:, np.newaxis]  # as `model.fit` does, for losses and layers that look at the shape
    if array.dtype.kind == "f" and array.dtype.itemsize > 2:
        return array.astype(float_type, copy=False)
    if array.dtype == object:
        if all(isinstance(item, str) for item in array.ravel()[:1000]):
            return array.astype(str)
        try:
            return array.astype(float_type)
        except (TypeError, ValueError):
            return array
    return array


def make_data(where: str, x: Tree, y: Tree = None, sample_weight: Tree = None, float_type: str = "float32") -> Data:
    """Check the parts of a dataset against each other and bring them into arrays.

    Args:
        where: what the parts are called in messages, such as "objectives/a.py: load_data(): train".
        x, y, sample_weight: arrays, pandas frames, or dicts, tuples or lists of those.
        float_type: dtype of floating-point values.

    Returns:
        The data.

    Raises:
        ObjectiveError: for parts without samples or of different length.
    """
    parts: dict[str, Tree] = {}
    lengths: dict[str, int] = {}
    holes = ""
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        parts[name] = _convert(f"{where}: {name}", part, float_type)
        for path, array in leaves(parts[name], name):
            if array.ndim == 0:
                raise ObjectiveError(f"{where}: {path} must be an array of samples, got the single value {array!r}.")
            if array.dtype.kind in "mM":
                raise ObjectiveError(
                    f"{where}: {path} must hold numbers or strings, got dates or times. Convert them to numbers."
                )
            if array.dtype == object:
                kind = type(array.ravel()[0]).__name__ if array.size else "nothing"
                if array.ndim == 1 and array.size and all(hasattr(item, "__len__") for item in array[:3]):
                    raise _unequal(f"{where}: {path}", array)
                raise ObjectiveError(
                    f"{where}: {path} must hold numbers or strings, got Python objects ({kind}). "
                    "Convert them, or pad sequences to one length."
                )
            if isinstance(array, np.ndarray) and array.dtype.kind in "fc" and not holes:
                bad = int(array.size - np.isfinite(array).sum())
                if bad:
                    row = int(np.argwhere(~np.isfinite(array))[0][0])
                    holes = f"{path} has {bad} NaN or infinite values, the first in sample {row}"
            lengths[path] = len(array)
    if not lengths or "x" not in {path[0] for path in lengths}:
        raise ObjectiveError(f"{where}: x must hold at least one array, got {type(x).__name__}.")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{path} {length}" for path, length in lengths.items())
        raise ObjectiveError(f"{where}: all parts must have the same number of samples, got {listed}.")
    samples = next(iter(lengths.values()))
    if samples == 0:
        raise ObjectiveError(f"{where}: there must be at least one sample, got none.")
    return Data(parts["x"], parts["y"], parts["sample_weight"], samples, holes)


def _unequal(where: str, samples: Any) -> ObjectiveError:
    """Return what to say of samples of different lengths, with three examples."""
    listed = [len(item) for item in samples]
    shown = list(dict.fromkeys(listed))[:3]
    said = " and ".join(filter(None, (", ".join(map(str, shown[:-1])), str(shown[-1]))))
    return ObjectiveError(
        f"{where} must hold samples of one length, got some of {said} values. Pad them, "
        "keras.utils.pad_sequences(x, padding='post'), and let the model mask what is padded, "
        "keras.layers.Embedding(..., mask_zero=True); or return tf.ragged.constant(x) for an Input(..., ragged=True)."
    )


def _columns_told(where: str, frame: Any) -> ObjectiveError:
    """Return what to say of a frame that no array of numbers or text can hold."""
    other = [str(name) for name, kind in zip(frame.columns, frame.dtypes, strict=True) if _is_other(kind)]
    if not other:
        return ObjectiveError(
            f"{where} must hold numbers alone or text alone, got missing values among them. Fill or drop them in "
            "load_data()."
        )
    listed = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
    return ObjectiveError(
        f"{where} must hold numbers alone or text alone, got columns of something else: {listed}. Encode them, as "
        "pandas.get_dummies does; or return a dict of columns for a model with an input for each."
    )


def _is_other(kind: Any) -> bool:
    """Return whether a column's type is no number, as text, dates, categories and mixtures are."""
    known = getattr(kind, "kind", None)
    return (
        known not in tuple("biufc") if known is not None else not str(kind).lower().startswith(("int", "uint", "float"))
    )


def _convert(where: str, part: Tree, float_type: str) -> Tree:
    """Turn every leaf of `part` into an array; plain lists of numbers count as one array."""
    if part is None:
        return None
    if _is_ragged(part):
        return _ragged(where, part)
    if _is_sparse(part):
        part = _dense(where, part)
    if _is_array(part):
        array = _to_array(part, float_type)
        if array.dtype.kind in "OmM" and hasattr(part, "columns") and hasattr(part, "dtypes"):
            raise _columns_told(where, part)
        return array
    if isinstance(part, Mapping):
        return {key: _convert(where, value, float_type) for key, value in part.items()}
    if isinstance(part, tuple | list):
        if len(part) > MOST_INPUTS and all(hasattr(item, "__len__") for item in part[:3]):
            if len({len(item) for item in part}) > 1:
                raise _unequal(where, part)
            part = np.asarray(part)  # a list of samples, not of inputs
            return _to_array(part, float_type)
        if part and all(_is_array(item) or isinstance(item, Mapping) for item in part):
            return type(part)(_convert(where, item, float_type) for item in part)
        try:
            return _to_array(np.asarray(part), float_type)
        except ValueError as error:
            if all(hasattr(item, "__len__") for item in part):
                raise _unequal(where, part) from error
            raise ObjectiveError(f"{where} must hold samples of one form ({error}). Make arrays of it.") from error
    raise ObjectiveError(
        f"{where} must be an array, a pandas frame, or a dict, tuple or list of those, got {type(part).__name__}. "
        "Convert it with numpy.asarray."
    )
