"""Train strided 1×1 convolutions, as ResNets have them, on CPUs where TensorFlow's gradients for them crash.

Seen with TensorFlow 2.21 and oneDNN on an Intel CPU with AVX-512: both gradients of a 1×1
convolution with a stride above 1 write outside their memory for batches of some sizes, as the last
one of an epoch may have (13 samples after 32, not 14), and the process ends with "double free or
corruption", under `model.fit` too.  Such a convolution looks at every stride-th pixel only, so
taking those first and convolving them with stride 1 gives the same numbers by other kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sliced_first() -> Iterator[None]:
    """While this lasts, Keras's strided 1×1 convolutions take the pixels that they look at out first."""
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
        if max(steps) > 1 and all(size == 1 for size in kernel.shape[:spatial]):
            every = tuple(slice(None, None, step) for step in steps)
            first = backend.standardize_data_format(data_format) == "channels_first"
            inputs = inputs[(slice(None), slice(None), *every) if first else (slice(None), *every)]
            strides = 1
        return original(inputs, kernel, strides, padding, data_format, dilation_rate)

    backend.nn.conv = conv
    try:
        yield
    finally:
        backend.nn.conv = original
