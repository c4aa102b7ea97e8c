"""Training data that stays outside memory: `tf.data.Dataset`s, for a hold-out that the user made.

A pipeline that shuffles draws other orders in every pass and remembers how many it has drawn, so
that two trials would see different orders, and a resumed study others than an uninterrupted one.
Datasets are therefore made under `repeatable_shuffles`, which ties every shuffle to a seed that
the engine sets at the start of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.errors import ObjectiveError, plain_text
from pipeline.training.data import Data, leaves, make_data, map_tree, map_trees
from pipeline.training.tensorflow_import import import_tensorflow
from pipeline.words import cut


@dataclass(frozen=True)
class Stream:
    """Batches from `tf.data` pipelines.

    Attributes:
        train, validation: datasets of batches, as `model.fit` takes them.
        test: the test dataset, or None.
        steps: steps of an epoch.
        whole: whether an epoch is one pass over `train`; else epochs follow each other on one endless pass.
        batch_size: samples of the first training batch.
        first: the first training batch as arrays, or None where it has no dense form.
        shuffles: state of every shuffle, to be set at the start of a run.
        held: samples of the validation dataset.
        weighted: whether training and validation samples have weights.
    """

    train: Any
    validation: Any
    test: Any
    steps: int
    whole: bool
    batch_size: int
    first: Data | None
    shuffles: tuple[Any, ...]
    held: int
    weighted: tuple[bool, bool] = (False, False)

    @property
    def samples(self) -> int:
        """Return the training samples of an epoch, a last partial batch counted as a whole one."""
        return self.steps * self.batch_size

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the training samples, a last partial batch counted as a whole one, and the validation samples."""
        return self.samples, self.held

    def fingerprint(self) -> str:
        """Return a short hash of the form and size of every dataset; the values are not read."""
        form = [(str(d.element_spec), int(d.cardinality())) for d in (self.train, self.validation, self.test) if d]
        return hashlib.blake2b(repr((form, self.steps)).encode(), digest_size=8).hexdigest()

    @property
    def counted(self) -> str:
        """Return how many samples an epoch has, as far as the batches say it."""
        return f"{self.steps} batches of up to {self.batch_size} samples"

    def describe(self) -> str:
        """Return a line for people."""
        form = f", {self.first.describe().partition(', ')[2]}" if self.first else ""
        return f"{self.counted} per epoch from tf.data{form}"

    def restart(self, seed: int) -> None:
        """Make the next passes shuffle as they did whenever a run of this seed began."""
        for number, state in enumerate(self.shuffles):
            state.assign([seed, number, 0])

    def validation_targets(self, limit: int) -> Data | None:
        """Return the targets and weights of validation samples as data without inputs, up to a size in bytes.

        None where they have no dense form.
        """
        tf, keras = import_tensorflow()
        kept: list[Any] = []
        size = 0
        for batch in self.validation:
            _, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
            tensors = tf.nest.flatten((y, weight))
            if y is None or not all(t is None or isinstance(t, tf.Tensor) for t in tensors):
                return None
            kept.append(map_tree(lambda t: t.numpy(), (y, weight)))
            size += sum(array.nbytes for _, array in leaves(kept[-1]))
            if size > limit:
                break
        if not kept:
            return None
        y, weight = map_trees(lambda *parts: np.concatenate(parts), *kept)
        return Data(None, y, weight, len(leaves(y)[0][1]))

    def on_test(self) -> Stream:
        """Return the stream with the test dataset in place of the validation dataset."""
        return replace(self, validation=self.test if self.test is not None else self.validation)


@dataclass(frozen=True)
class StreamSplit:
    """One run's place on a stream.

    Attributes:
        seed: seed of initial weights, shuffles and layer randomness.
        steps: steps of an epoch.
        sizes: training and validation samples, as far as they are known.
    """

    seed: int
    steps: int
    sizes: tuple[int, int]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the steps of an epoch; the pipeline has made its batches already."""
        return self.steps


@contextmanager
def repeatable_shuffles() -> Iterator[list[Any]]:
    """While this lasts, every `Dataset.shuffle` that draws anew in each pass can be started over.

    Yields:
        The states of the shuffles made so far: variables of (seed, number of the shuffle, passes begun).
    """
    tf, _ = import_tensorflow()
    dataset_class = tf.data.Dataset
    original = dataset_class.shuffle
    states: list[Any] = []

    def shuffle(
        self: Any, buffer_size: Any, seed: Any = None, reshuffle_each_iteration: Any = None, name: Any = None
    ) -> Any:
        if reshuffle_each_iteration is False or not tf.executing_eagerly():
            return original(self, buffer_size, seed, reshuffle_each_iteration, name)
        with tf.device("CPU"):
            state = tf.Variable([0, len(states), 0], dtype=tf.int64, trainable=False)
        states.append(state)

        def begin(_: Any) -> Any:
            drawn = state.assign_add([0, 0, 1])
            return tf.random.stateless_uniform(
                [], seed=tf.stack([drawn[0], drawn[1] * 2**32 + drawn[2]]), minval=1, maxval=2**62, dtype=tf.int64
            )

        def shuffled(drawn: Any) -> Any:
            tf.random.set_seed(1)  # of this function's graph only; 0 would be compared with `drawn` as a number
            return original(self, buffer_size, seed=drawn, reshuffle_each_iteration=False)

        result = dataset_class.from_tensors(0).map(begin).flat_map(shuffled)
        size = int(self.cardinality())
        return result if size == tf.data.UNKNOWN_CARDINALITY else result.apply(_of_size(size))

    def _of_size(size: int) -> Any:
        return tf.data.experimental.assert_cardinality(size)

    dataset_class.shuffle = shuffle
    try:
        yield states
    finally:
        dataset_class.shuffle = original


def is_dataset(value: Any) -> bool:
    """Return whether a value is a `tf.data.Dataset`."""
    tf, _ = import_tensorflow()
    return isinstance(value, tf.data.Dataset)


def make_stream(where: str, datasets: Any, shuffles: list[Any], *, steps_per_epoch: int | None) -> Stream:
    """Check the datasets that `load_data` returned and look at their first batches.

    Args:
        where: what they are called in messages.
        datasets: (train, validation) or (train, validation, test).
        shuffles: states of their shuffles, see `repeatable_shuffles`.
        steps_per_epoch: steps of an epoch; None for one pass over the training dataset.

    Returns:
        The stream.

    Raises:
        ObjectiveError: for datasets of another number, without an end, without batches, or of different form.
    """
    tf, keras = import_tensorflow()
    parts = tuple(datasets) if isinstance(datasets, tuple | list) else (datasets,)
    if len(parts) not in (2, 3) or not all(is_dataset(part) for part in parts):
        got = ", ".join(type(part).__name__ for part in parts) if len(parts) > 1 else "one dataset"
        raise ObjectiveError(
            f"{where} must return tf.data datasets as (train, validation) or (train, validation, test), got {got}. "
            "Split it with .take(n) and .skip(n), counted in batches."
        )
    train, validation, test = (*parts, None)[:3]
    size = int(train.cardinality())
    if steps_per_epoch is None and size < 0:
        endless = size == tf.data.INFINITE_CARDINALITY
        kind = "endless, so an epoch has no end" if endless else "of unknown size, so no decay can be laid out over it"
        way = ".take(n)" if endless else ".apply(tf.data.experimental.assert_cardinality(n))"
        raise ObjectiveError(
            f"{where}: the training dataset is {kind}. Set steps_per_epoch in the study file (batches of an "
            f"epoch), or give the dataset its number of batches with {way}."
        )
    for name, part in (("validation", validation), ("test", test)):
        if part is not None and int(part.cardinality()) == tf.data.INFINITE_CARDINALITY:
            raise ObjectiveError(f"{where}: the {name} dataset must have an end. Add .take(n), counted in batches.")
    batch = next(iter(train.take(1)), None)
    held = next(iter(validation.take(1)), None)
    for name, element in (("training", batch), ("validation", held)):
        if element is None:
            raise ObjectiveError(f"{where}: the {name} dataset must hold at least one batch, got none.")
    specs = [_parts(part.element_spec) for part in (train, validation)]
    forms = [_form(tf, spec[:2]) for spec in specs]
    if forms[0] != forms[1]:
        raise ObjectiveError(
            f"{where}: training and validation batches must have the same form, got {forms[0]} and {forms[1]}."
        )
    flat = tf.nest.flatten(batch)
    if any(len(item.shape) == 0 for item in flat):
        raise ObjectiveError(f"{where}: the datasets must hold batches, as model.fit takes them. Add .batch(32).")
    return Stream(
        train.prefetch(tf.data.AUTOTUNE),
        validation.prefetch(tf.data.AUTOTUNE),
        test,
        steps_per_epoch if steps_per_epoch is not None else size,
        steps_per_epoch is None,
        int(flat[0].shape[0] or len(flat[0])),
        _first(f"{where}: the first training batch", tf, keras, batch),
        tuple(shuffles),
        _count(tf, where, validation),
        (len(specs[0]) > 2, len(specs[1]) > 2),
    )


def _parts(spec: Any) -> tuple[Any, ...]:
    """Return (x,), (x, y) or (x, y, sample_weight) of what a dataset yields."""
    return spec if isinstance(spec, tuple) else (spec,)


def _count(tf: Any, where: str, dataset: Any) -> int:
    """Return the samples of a validation dataset, by one pass over it."""

    def rows(batch: Any) -> Any:
        first = tf.nest.flatten(batch)[0]
        return first.dense_shape[0] if isinstance(first, tf.SparseTensor) else tf.shape(first, tf.int64)[0]

    try:
        return int(dataset.reduce(np.int64(0), lambda n, batch: n + tf.cast(rows(batch), tf.int64)))
    except Exception as error:  # whatever the pipeline's own code raises
        said = cut(" ".join(plain_text(str(error)).split()), 300)
        raise ObjectiveError(f"{where}: the validation dataset cannot be read: {said}.") from error


def _form(tf: Any, spec: Any) -> str:
    """Return dtypes and shapes per sample of a dataset's elements, as text."""
    items = tf.nest.flatten(spec, expand_composites=False)
    described = [
        f"{item.dtype.name} {tuple(item.shape[1:])}"
        if isinstance(item, tf.TensorSpec) and item.shape.rank
        else str(type(item).__name__)
        for item in items
    ]
    return f"{len(items)} × " + ", ".join(described) if len(set(described)) == 1 else ", ".join(described)


def _first(where: str, tf: Any, keras: Any, batch: Any) -> Data | None:
    """Return a batch as data, checked like arrays are, or None where it is ragged or sparse."""
    if not all(isinstance(item, tf.Tensor) for item in tf.nest.flatten(batch)):
        return None
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)

    def plain(tensor: Any) -> Any:
        array = tensor.numpy()
        return np.char.decode(array.astype(bytes), "utf-8", "replace") if array.dtype == object else array

    parts = [map_tree(plain, part) for part in (x, y, weight)]
    if not leaves(parts[0]):
        return None
    return make_data(where, parts[0], parts[1], parts[2], float_type=keras.config.floatx())
