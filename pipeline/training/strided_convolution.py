"""Train strided 1×1 convolutions, as ResNets have them, on CPUs where TensorFlow's gradient for them crashes.

Seen with TensorFlow 2.21 and oneDNN on an Intel CPU with AVX-512: the gradient with respect to the
kernel of a 1×1 convolution with a stride above 1 writes outside its memory where batches differ in
size, as the last one of an epoch does (13 samples after 32 crash, 14 do not), and the process ends
with "double free or corruption", under `model.fit` too.  Such a convolution is a matrix product
with every stride-th pixel, and so is that gradient; it is made so here.  All else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.training.tensorflow_import import import_tensorflow


@contextmanager
def safe_gradients() -> Iterator[None]:
    """While this lasts, Keras's strided 1×1 convolutions are made with a gradient that does not crash."""
    tf, _ = import_tensorflow()
    from keras.src import backend

    original = backend.nn.conv

    def conv(
        inputs: Any,
        kernel: Any,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Any = 1,
    ) -> Any:
        spatial = len(kernel.shape) - 2
        steps = (strides,) * spatial if isinstance(strides, int) else tuple(strides)
        last = backend.standardize_data_format(data_format) == "channels_last"
        if max(steps) == 1 or not last or any(size != 1 for size in kernel.shape[:spatial]):
            return original(inputs, kernel, strides, padding, data_format, dilation_rate)

        def plain(x: Any, w: Any) -> Any:
            return original(x, w, strides, padding, data_format, dilation_rate)

        def safe(x: Any, w: Any) -> Any:
            def gradient(upstream: Any) -> tuple[Any, Any]:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    again = plain(x, w)  # only its form is used, so that the graph drops it
                seen = x[(slice(None), *(slice(None, None, step) for step in steps))]
                rows, errors = (tf.reshape(part, [-1, part.shape[-1]]) for part in (seen, upstream))
                kernel_gradient = tf.reshape(tf.matmul(rows, errors, transpose_a=True), w.shape)
                return tape.gradient(again, x, output_gradients=upstream), kernel_gradient

            return plain(x, w), gradient

        return tf.custom_gradient(safe)(inputs, backend.convert_to_tensor(kernel))

    backend.nn.conv = conv
    try:
        yield
    finally:
        backend.nn.conv = original
