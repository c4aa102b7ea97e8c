"""Make random layers fast under XLA on a CPU, with the numbers that the plain graph draws.

TensorFlow leaves the choice of generator to the device ("auto_select").  The plain graph takes
Philox on a CPU; XLA takes ThreeFry there, whose code for large tensors is a hundred times slower
(465 ms against 4.3 ms for a million uniform numbers, measured).  Asking for Philox by name removes
that.  Both then draw the same random bits, but make floats of them differently: the graph's
kernel takes the low 23 bits, XLA the high ones.  Uniform and normal float32 numbers, which is what
Dropout, noise and augmentation layers draw, are therefore made from the bits here as the kernel
does, so that a compiled Dropout drops the very units that `model.fit` drops.  Other distributions
keep XLA's own way from bits to numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SMALLEST_UNIFORM = 1.0e-7
"""The kernel's Box-Muller transform keeps the logarithm's argument above this."""


@contextmanager
def philox() -> Iterator[None]:
    """Trace stateless random operations for XLA on a CPU as above."""
    from tensorflow.python.ops import gen_stateless_random_ops_v2 as raw
    from tensorflow.python.ops import random_ops_util

    originals = (
        (random_ops_util, "get_key_counter_alg", random_ops_util.get_key_counter_alg),
        (raw, "stateless_random_uniform_v2", raw.stateless_random_uniform_v2),
        (raw, "stateless_random_normal_v2", raw.stateless_random_normal_v2),
    )
    named, uniform, normal = _replacements(raw, random_ops_util)
    try:
        for (module, name, _), replacement in zip(originals, (named, uniform, normal), strict=True):
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _replacements(raw: Any, random_ops_util: Any) -> tuple[Any, Any, Any]:
    import tensorflow as tf

    get_key_counter_alg = random_ops_util.get_key_counter_alg
    uniform_op, normal_op = raw.stateless_random_uniform_v2, raw.stateless_random_normal_v2
    automatic, philox_number = (random_ops_util.Algorithm[name].value for name in ("AUTO_SELECT", "PHILOX"))

    def named(seed: Any, alg: Any) -> Any:
        chosen = automatic if alg is None else random_ops_util.convert_alg_to_int(alg)
        return get_key_counter_alg(seed, philox_number if isinstance(chosen, int) and chosen == automatic else alg)

    def unit(shape: Any, key: Any, counter: Any) -> Any:
        """Floats in [0, 1) from the low 23 bits, as Uint32ToFloat in TensorFlow's kernels."""
        bits = raw.stateless_random_uniform_full_int_v2(shape, key, counter, philox_number, dtype=tf.uint32)
        mantissa = tf.bitwise.bitwise_or(
            tf.bitwise.bitwise_and(bits, tf.constant(0x7FFFFF, tf.uint32)), tf.constant(0x3F800000, tf.uint32)
        )
        return tf.bitcast(mantissa, tf.float32) - 1.0

    def ours(alg: Any, dtype: Any) -> bool:
        return isinstance(alg, int) and alg == philox_number and tf.as_dtype(dtype) == tf.float32

    def uniform(shape: Any, key: Any, counter: Any, alg: Any, dtype: Any = tf.float32, name: str | None = None) -> Any:
        if not ours(alg, dtype):
            return uniform_op(shape, key, counter, alg, dtype=dtype, name=name)
        return unit(shape, key, counter)

    def normal(shape: Any, key: Any, counter: Any, alg: Any, dtype: Any = tf.float32, name: str | None = None) -> Any:
        if not ours(alg, dtype):
            return normal_op(shape, key, counter, alg, dtype=dtype, name=name)
        # Box-Muller on neighbouring pairs, as BoxMullerFloat in TensorFlow's kernels.
        count = tf.reduce_prod(shape)
        pairs = tf.reshape(unit([(count + 1) // 2 * 2], key, counter), [-1, 2])
        radius = tf.sqrt(-2.0 * tf.math.log(tf.maximum(pairs[:, 0], SMALLEST_UNIFORM)))
        angle = 2.0 * 3.14159265358979323846 * pairs[:, 1]
        both = tf.stack([tf.sin(angle) * radius, tf.cos(angle) * radius], axis=1)
        return tf.reshape(tf.reshape(both, [-1])[:count], shape)

    return named, uniform, normal
