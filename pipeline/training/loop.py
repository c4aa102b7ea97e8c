"""The training loop as a graph: one epoch of steps, then the validation samples, in one call.

The loop calls the model's own `train_step` on every batch, with the learning rate out of a table,
records each step's loss, and stops at the step where the divergence rule says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import KnownError
from pipeline.training.divergence import CODE_WEIGHTS, SOUND, judge
from pipeline.training.sources import StreamSource
from pipeline.training.strided_convolution import sliced_first
from pipeline.training.xla_random import philox


@dataclass
class TracedEpoch:
    """An epoch as a function, with slower forms of it for models that the fastest cannot run.

    It takes a feed of the source; rate and loss ceiling of each step, shape (steps, 2); the
    samples of the feed; the last two losses before it; and what to validate on.  It returns the
    loss of each step, with its number of samples where the source knows them only in the graph;
    the steps done; the divergence code; the last two losses; training metrics; validation metrics.

    Attributes:
        source: where its batches come from.
        forms: (what it is called, the function), fastest first.
        rows: rows that the table must have, where XLA wants them static, else None.
        on_fallback: told the name of the form that took over, and the error that made it.
        proven: whether the first form has run, so that later errors are real ones.
        on_trace: told the graph of a form before it runs for the first time.
    """

    source: Any
    forms: list[tuple[str, Callable[..., Any]]]
    rows: int | None
    on_fallback: Callable[[str, Exception], None]
    proven: bool = False
    on_trace: Callable[[Any], None] = lambda graph: None

    def __call__(self, *arguments: Any) -> Any:
        """Run the fastest form that works."""
        while True:
            try:
                function = self.forms[0][1]
                if not self.proven and hasattr(function, "get_concrete_function"):
                    self.on_trace(function.get_concrete_function().graph)
                result = function(*arguments)
            except KnownError:
                raise
            except Exception as error:  # whatever tracing somebody's train_step may raise
                if self.proven or len(self.forms) == 1:
                    raise
                self.forms.pop(0)
                self.on_fallback(self.forms[0][0], error)
            else:
                self.proven = True
                return result

    def operations(self) -> int:
        """Return the operations of the traced graph, those of the loops' bodies included."""
        return _operations(self.forms[0][1].get_concrete_function().graph)  # type: ignore[attr-defined]


def _operations(graph: Any) -> int:
    inner = (function.graph for function in graph._functions.values() if hasattr(function, "graph"))
    return len(graph.get_operations()) + sum(_operations(each) for each in inner)


@dataclass(frozen=True)
class Loop:
    """What the epochs of all optimizers have in common.

    Attributes:
        tf: TensorFlow.
        model: the compiled model.
        source: where batches come from, a `Source`; XLA wants an `ArraySource`.
        train_names, test_names: metrics that `train_step` and `test_step` return.
        loss_name: the one of `train_names` that a step is judged by.
        trackers: metrics to reset before each step, so that what it returns under that name is the batch's own.
        own_train_step, own_test_step: whether the model's class brings its own.
        capacity: steps of the longest epoch, where XLA wants a static number.
        set_rate: told the learning rate of the step that is traced next.
        before_trace: called when the tracing of an epoch begins.
        on_fallback, on_trace: see `TracedEpoch`.
    """

    tf: Any
    model: Any
    source: Any
    train_names: list[str]
    test_names: list[str]
    loss_name: str
    trackers: list[Any]
    own_train_step: bool
    own_test_step: bool
    capacity: int
    set_rate: Callable[[Any], None]
    before_trace: Callable[[], None]
    on_fallback: Callable[[str, Exception], None]
    on_trace: Callable[[Any], None]

    def resized(self, batch_size: int) -> Loop:
        """Return the loop over the same samples in memory with another batch size."""
        return replace(self, source=self.source.resized(batch_size), capacity=-(-self.source.samples // batch_size))

    def trace(self, optimizer: Any, *, xla: bool, without: int = 0) -> TracedEpoch:
        """Return the epoch for one optimizer, still untraced; its first call traces it.

        Args:
            optimizer: the Keras optimizer, built for the model.
            xla: compile the loop of whole batches with XLA; validation and a last partial batch
                stay in the plain graph, whose shapes may vary.
            without: how many of the faster forms to leave out.
        """
        tf, model, source = self.tf, self.model, self.source
        sized, on_gpu = isinstance(source, StreamSource), bool(tf.config.list_physical_devices("GPU"))

        def one_step(token: Any, feed: Any, row: Any) -> tuple[Any, Any]:
            model.optimizer = optimizer
            self.set_rate(row[0])
            for metric in self.trackers:
                metric.reset_state()
            with nullcontext() if on_gpu else sliced_first():
                logs = scalars(model.train_step(source.batch(token, feed)))
            loss = tf.cast(logs[self.loss_name], tf.float32)
            carried = self.train_names if self.own_train_step else []
            return loss, tf.stack([tf.cast(logs[name], tf.float32) for name in carried]) if carried else tf.zeros([0])

        def one_test(token: Any, feed: Any) -> Any:
            logs = scalars(model.test_step(source.batch(token, feed)))
            carried = [tf.cast(logs[name], tf.float32) for name in self.test_names if self.own_test_step]
            return tf.stack(carried) if carried else tf.zeros([0])

        form: dict[str, Callable[..., Any]] = {"train": one_step, "test": one_test}

        def record(loss: Any, token: Any) -> Any:
            return tf.stack([loss, tf.cast(tf.shape(tf.nest.flatten(token)[0])[0], tf.float32)]) if sized else loss

        def steps(count: Any, token_of: Callable[[Any], Any], feed: Any, table: Any, recent: Any, size: Any) -> Any:
            """Run `count` steps; stop where the divergence rule says so."""
            losses = tf.TensorArray(tf.float32, size=size, element_shape=(2,) if sized else ())
            width = len(self.train_names) if self.own_train_step else 0

            def body(i: Any, code: Any, before: Any, latest: Any, logs: Any, losses: Any) -> tuple[Any, ...]:
                row, token = table[i], token_of(i)
                loss, logs = form["train"](token, feed, row)
                kept = losses.write(i, record(loss, token))
                return i + 1, judge(tf, (before, latest), loss, row[1]), latest, loss, logs, kept

            start = (0, 0, recent[0], recent[1], tf.zeros([width]), losses)
            done, code, before, latest, logs, losses = tf.while_loop(
                lambda i, code, *_: (i < count) & (code == SOUND), body, start
            )
            return done, code, tf.stack([before, latest]), logs, losses.stack()

        def loop_in_xla(feed: Any, table: Any, full: Any, recent: Any) -> Any:
            with philox():
                return steps(full, lambda i: source.whole_token(feed, i), feed, table, recent, table.shape[0])

        compiled_loop = tf.function(loop_in_xla, jit_compile=True, autograph=False)

        def full_then_partial(feed: Any, table: Any, samples: Any, recent: Any) -> tuple[Any, ...]:
            # XLA wants static shapes, so the last partial batch is a step of the plain graph.
            full = samples // source.batch_size
            done, code, recent, logs, losses = compiled_loop(feed, table, full, recent)

            def partial() -> tuple[Any, ...]:
                loss, logs = one_step(feed[0][full * source.batch_size : samples], feed, table[full])
                updated = tf.tensor_scatter_nd_update(losses, [[full]], [loss])
                code = judge(tf, (recent[0], recent[1]), loss, table[full, 1])
                return full + 1, code, tf.stack([recent[1], loss]), logs, updated

            more = (code == SOUND) & (samples > full * source.batch_size)
            result: tuple[Any, ...] = tf.cond(more, partial, lambda: (done, code, recent, logs, losses))
            return result

        def evaluate(held: Any, feed: Any) -> Any:
            if not self.test_names:
                return tf.zeros([0])
            model.reset_metrics()
            width = len(self.test_names) if self.own_test_step else 0
            logs = source.evaluate(held, feed, lambda token: form["test"](token, feed), width)
            return logs if width else self._metric_results(self.test_names)

        def epoch(feed: Any, table: Any, samples: Any, recent: Any, held: Any) -> tuple[Any, ...]:
            self.before_trace()
            model.reset_metrics()
            if xla:
                done, code, recent, logs, losses = full_then_partial(feed, table, samples, recent)
            else:
                count = tf.shape(table)[0]
                done, code, recent, logs, losses = steps(
                    count, lambda i: source.token(feed, i), feed, table, recent, count
                )
            train = logs if self.own_train_step else self._metric_results(self.train_names)
            finite = [tf.reduce_all(tf.math.is_finite(v)) for v in model.trainable_variables if v.dtype != "int32"]
            healthy = tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)
            code = tf.where((code == SOUND) & ~healthy, CODE_WEIGHTS, code)
            return losses, done, code, recent, train, evaluate(held, feed)

        capacity = self.capacity if xla else None
        feed_signature = source.feed_signature(capacity)
        row = tf.TensorSpec([2], tf.float32)
        signature = [
            feed_signature,
            tf.TensorSpec([capacity, 2], tf.float32),
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([2], tf.float32),
            source.held_signature(),
        ]

        def step_by_step(*arguments: Any) -> tuple[Any, ...]:
            """The same loop in Python around steps that are traced one by one."""
            if form["train"] is one_step:
                token = source.token_signature()
                form["train"] = tf.function(one_step, autograph=False, input_signature=[token, feed_signature, row])
                form["test"] = tf.function(one_test, autograph=False, input_signature=[token, feed_signature])
            return epoch(*arguments)

        def eagerly(*arguments: Any) -> tuple[Any, ...]:
            """The same loop in Python around steps that run as Python, as `run_eagerly` does."""
            form.update(train=one_step, test=one_test)
            return epoch(*arguments)

        in_graph = tf.function(epoch, autograph=False, input_signature=signature)
        forms = [("in one graph", in_graph), ("step by step", step_by_step), ("eagerly", eagerly)]
        chosen = forms[2:] if model.run_eagerly else forms[:1] if xla else forms[without:]
        return TracedEpoch(source, chosen, capacity, self.on_fallback, on_trace=self.on_trace)

    def _metric_results(self, names: list[str]) -> Any:
        results = scalars(self.model.get_metrics_result())
        return self.tf.stack([self.tf.cast(results[name], self.tf.float32) for name in names])


def scalars(logs: Any) -> dict[str, Any]:
    """Return the named scalars among what a step returned; those of nested dicts under their own names, as in `fit`."""
    found: dict[str, Any] = {}
    for key, value in logs.items() if isinstance(logs, dict) else ():
        if isinstance(value, dict):
            found |= scalars(value)
        else:
            while len(getattr(value, "shape", ())) and value.shape[0] == 1:
                value = value[0]  # a score of one class
            if len(getattr(value, "shape", ())) == 0:
                found[str(key)] = value
    return found
