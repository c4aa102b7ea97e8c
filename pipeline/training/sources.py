"""Where the batches of the training loop come from: tensors in memory, or a `tf.data` pipeline.

A source has two sides.  Outside the graph a cursor follows one run through its epochs and hands
out feeds.  Inside the graph the source turns a feed into batches, and runs over the validation
samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.training.data import Data, as_tensor, leaves, map_tree
from pipeline.training.splits import Split
from pipeline.training.stream import Stream, StreamSplit

AnySplit = Split | StreamSplit
"""The samples of one fold in memory, or a place on a stream."""

EVALUATION_VALUES = 1 << 18
"""Where their size changes no number, validation batches hold about this many input values, at most 1,024 samples."""


class Cursor(Protocol):
    """One run's way through its data, in feeds."""

    def epoch(self, limit: int | None = None) -> tuple[Any, int]:
        """Return the next epoch's feed and its samples; with a limit only its first so many steps."""

    def steps(self, count: int) -> tuple[Any, int]:
        """Return a feed of the next `count` steps, over as many passes as that takes, and its samples."""

    def position(self) -> list[Any]:
        """Return where the cursor is after a whole epoch, as numbers and arrays."""

    def go_to(self, position: list[Any]) -> None:
        """Go on from a position."""


class Source(Protocol):
    """What the engine and its traced loop need of the data."""

    batch_size: int
    """Samples per step."""

    fixed: bool
    """Whether the model takes batches of this size alone."""

    @property
    def sample(self) -> Any:
        """Return a small batch of real samples, for building a model."""

    def sample_inputs(self) -> Any:
        """Return the inputs of that batch alone."""

    def start(self, split: Any) -> Cursor:
        """Return a cursor at the beginning of a run."""

    def held(self, split: Any) -> Any:
        """Return what `evaluate` runs over: the validation samples of a split, or nothing for None."""

    def feed_signature(self, room: int | None) -> Any:
        """Return the form of a feed; `room` is the fixed number of steps that XLA wants, else None."""

    def held_signature(self) -> Any:
        """Return the form of what `evaluate` runs over."""

    def token_signature(self) -> Any:
        """Return the form of a token."""

    def arguments(self, feed: Any, room: int | None) -> Any:
        """Return a feed as tensors in the form of `feed_signature`."""

    def token(self, feed: Any, i: Any) -> Any:
        """Inside the graph: return what step `i` of a feed trains on."""

    def batch(self, token: Any, feed: Any) -> Any:
        """Inside the graph: return a token's samples as `train_step` takes them."""

    def evaluate(self, held: Any, feed: Any, test: Callable[[Any], Any], width: int) -> Any:
        """Inside the graph: call `test` with the token of every validation batch; return the last result."""


@dataclass
class _Memory:
    """The samples of all sources that differ only in their batch size."""

    parts: tuple[Any, ...] = ()
    sample: Any = ()
    large_batch: int = 1
    any_batch: bool = False
    study_batch: int = 1


class ArraySource:
    """Samples in memory, gathered by index.

    Args:
        tf: TensorFlow.
        data: the samples.
        batch_size: samples per step, and per validation batch.
        fixed: whether the model takes batches of this size alone.
    """

    def __init__(self, tf: Any, data: Data, batch_size: int, fixed: bool = False) -> None:
        self.tf, self.batch_size, self.samples, self.fixed = tf, batch_size, data.samples, fixed
        self._memory = _Memory(study_batch=batch_size)
        self.hold(data)

    def resized(self, batch_size: int) -> ArraySource:
        """Return a source of the same samples, in the same memory, with another batch size."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    @property
    def parts(self) -> tuple[Any, ...]:
        """Return inputs, targets and weights as tensors."""
        return self._memory.parts

    @property
    def sample(self) -> Any:
        """Return the first two samples; a whole batch for a model that takes no other."""
        return self._memory.sample

    def sample_inputs(self) -> Any:
        """Return the inputs of that batch alone."""
        return self.sample[0] if isinstance(self.sample, tuple) else self.sample

    @property
    def any_batch(self) -> bool:
        """Return whether validation may take batches of any size, for every batch size of training."""
        return self._memory.any_batch

    @any_batch.setter
    def any_batch(self, allowed: bool) -> None:
        self._memory.any_batch = allowed

    @property
    def evaluation_batch(self) -> int:
        """Return the samples that are evaluated at once: the study's batch size, or more where it is no matter."""
        return self._memory.large_batch if self.any_batch and not self.fixed else self._memory.study_batch

    def hold(self, data: Data) -> None:
        """Put other values of the same samples in place, for every batch size."""
        memory = self._memory
        memory.parts = tuple(map_tree(lambda a: as_tensor(self.tf, a), part) for part in data.parts())
        first = np.arange(memory.study_batch if self.fixed else 2) % data.samples
        memory.sample = unpacked(tuple(map_tree(lambda a: as_tensor(self.tf, a[first]), part) for part in data.parts()))
        values = max(1, sum(leaf.size // max(1, len(leaf)) for _, leaf in leaves(data.x)))
        memory.large_batch = max(min(EVALUATION_VALUES // values, 1024), min(memory.study_batch, 1024))

    def start(self, split: Split) -> ArrayCursor:
        """Return a cursor on the split's training samples."""
        return ArrayCursor(split, self.batch_size)

    def held(self, split: Split | None) -> Any:
        """Return the indices of the validation samples."""
        return self.tf.constant([] if split is None else split.validation, self.tf.int32)

    def feed_signature(self, room: int | None) -> Any:
        """Return (indices, parts)."""
        tf = self.tf
        order = tf.TensorSpec([room * self.batch_size if room else None], tf.int32)
        return order, tf.nest.map_structure(tf.type_spec_from_value, self.parts)

    def held_signature(self) -> Any:
        """Return the form of indices."""
        return self.tf.TensorSpec([None], self.tf.int32)

    def token_signature(self) -> Any:
        """Return the form of indices."""
        return self.tf.TensorSpec([None], self.tf.int32)

    def arguments(self, feed: Any, room: int | None) -> Any:
        """Return the order, filled up to its fixed length, and the samples."""
        order = feed if room is None else np.pad(feed, (0, room * self.batch_size - len(feed)))
        return self.tf.constant(order, self.tf.int32), self.parts

    def token(self, feed: Any, i: Any) -> Any:
        """Return the indices of step `i`."""
        return feed[0][i * self.batch_size : (i + 1) * self.batch_size]

    def whole_token(self, feed: Any, i: Any) -> Any:
        """Return the indices of a step known to be whole, in a form whose length XLA can see."""
        return self.tf.slice(feed[0], [i * self.batch_size], [self.batch_size])

    def batch(self, token: Any, feed: Any) -> Any:
        """Gather the samples."""

        def gathered(array: Any) -> Any:
            rows = self.tf.gather(array, token)
            return self.tf.ensure_shape(rows, [self._memory.study_batch, *array.shape[1:]]) if self.fixed else rows

        return unpacked(tuple(map_tree(gathered, part) for part in feed[1]))

    def evaluate(self, held: Any, feed: Any, test: Callable[[Any], Any], width: int) -> Any:
        """Run over the indices in batches of `evaluation_batch`, a last partial one included."""
        tf, size = self.tf, self.evaluation_batch

        def body(start: Any, _: Any) -> tuple[Any, Any]:
            return start + size, test(held[start : start + size])

        _, logs = tf.while_loop(lambda start, _: start < tf.size(held), body, (0, tf.zeros([width])))
        return logs


class ArrayCursor:
    """Follows one run through its shuffles."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split, self.batch_size, self.passes = split, batch_size, 0
        self._left = np.empty(0, np.int32)

    def epoch(self, limit: int | None = None) -> tuple[Any, int]:
        """Return the next shuffle."""
        order = self._shuffle()[: None if limit is None else limit * self.batch_size]
        return order, len(order)

    def steps(self, count: int) -> tuple[Any, int]:
        """Return the next whole batches, what is left of a shuffle first; a batch has no sample twice."""
        samples = count * min(self.batch_size, len(self.split.train))
        while len(self._left) < samples:
            self._left = np.concatenate([self._left, self._shuffle()])
        order, self._left = self._left[:samples], self._left[samples:]
        return order, samples

    def position(self) -> list[Any]:
        """Return the passes begun; only between whole epochs."""
        return [self.passes]

    def go_to(self, position: list[Any]) -> None:
        """Go on from a position."""
        self.passes = int(position[0])

    def _shuffle(self) -> NDArray[np.int32]:
        self.passes += 1
        return shuffle(self.split, self.passes - 1)


def shuffle(split: Split, epoch: int) -> NDArray[np.int32]:
    """Return the split's training indices in the order of an epoch, the same for every configuration."""
    return np.random.default_rng([split.seed, epoch]).permutation(split.train).astype(np.int32)


class StreamSource:
    """Batches of a `tf.data` pipeline, pulled inside the graph.

    Args:
        tf: TensorFlow.
        stream: the datasets.
    """

    def __init__(self, tf: Any, stream: Stream) -> None:
        self.tf, self.stream, self.batch_size, self.fixed = tf, stream, stream.batch_size, False
        self.sample = next(iter(stream.train))

    def sample_inputs(self) -> Any:
        """Return the inputs of the first batch alone."""
        return self.sample[0] if isinstance(self.sample, tuple) else self.sample

    def start(self, split: StreamSplit) -> StreamCursor:
        """Start the shuffles over under the split's seed."""
        self.stream.restart(split.seed)
        return StreamCursor(self.stream)

    def held(self, split: StreamSplit | None) -> Any:
        """Return whether to run over the validation dataset."""
        return self.tf.constant(split is not None)

    def feed_signature(self, room: int | None) -> Any:
        """Return the form of an iterator over batches."""
        return self.tf.data.IteratorSpec(self.stream.train.element_spec)

    def held_signature(self) -> Any:
        """Return the form of a truth value."""
        return self.tf.TensorSpec([], self.tf.bool)

    def token_signature(self) -> Any:
        """Return the form of a batch."""
        return self.stream.train.element_spec

    def arguments(self, feed: Any, room: int | None) -> Any:
        """Return the iterator."""
        return feed

    def token(self, feed: Any, i: Any) -> Any:
        """Return the next batch."""
        return next(feed)

    def batch(self, token: Any, feed: Any) -> Any:
        """Return the token, which is the batch."""
        return token

    def evaluate(self, held: Any, feed: Any, test: Callable[[Any], Any], width: int) -> Any:
        """Run over the validation dataset from its beginning."""
        tf = self.tf

        def run() -> Any:
            batches = iter(self.stream.validation)

            def body(batch: Any, _: Any) -> tuple[Any, Any]:
                logs = test(batch.get_value())
                return batches.get_next_as_optional(), logs

            start = (batches.get_next_as_optional(), tf.zeros([width]))
            return tf.while_loop(lambda batch, _: batch.has_value(), body, start)[1]

        return tf.cond(held, run, lambda: tf.zeros([width]))


class StreamCursor:
    """Follows one run through the passes over a training dataset."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.taken = stream, 0
        self._endless: Any = None

    def epoch(self, limit: int | None = None) -> tuple[Any, int]:
        """Return the next pass, or the next steps of the endless one."""
        if self.stream.whole:
            return iter(self.stream.train), self.stream.samples
        return self.steps(limit or self.stream.steps)

    def steps(self, count: int) -> tuple[Any, int]:
        """Return the endless pass, which remembers where it is."""
        if self._endless is None:
            self._endless = iter(self.stream.train.repeat())
        self.taken += count
        return self._endless, count * self.stream.batch_size

    def position(self) -> list[Any]:
        """Return the batches taken from the endless pass, and where every shuffle stands."""
        return [self.taken, *(state.numpy() for state in self.stream.shuffles)]

    def go_to(self, position: list[Any]) -> None:
        """Go on from a position; an endless pass is run through up to it."""
        if int(position[0]):
            endless, _ = self.steps(int(position[0]))
            for _ in range(self.taken):
                next(endless)
        for state, value in zip(self.stream.shuffles, position[1:], strict=True):
            # What the endless pass has begun anew it counts itself, and tf.data reads ahead of what was taken.
            if not int(state.numpy()[2]):
                state.assign(value)


def unpacked(parts: tuple[Any, ...]) -> Any:
    """Return (x, y, ...) as `model.fit` hands it to a step: x alone, where it is one tensor or a dict, stands bare."""
    return parts if len(parts) > 1 or isinstance(parts[0], tuple | list) else parts[0]


def make_source(tf: Any, data: Data | Stream, batch_size: int, fixed: bool = False) -> ArraySource | StreamSource:
    """Return the source of data; see `ArraySource` for the arguments."""
    return StreamSource(tf, data) if isinstance(data, Stream) else ArraySource(tf, data, batch_size, fixed)
