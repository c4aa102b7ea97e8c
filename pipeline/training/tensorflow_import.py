"""Import TensorFlow without its start-up chatter, and without hiding a real error.

TensorFlow's C++ code writes to the process's standard error before any log level applies
(CPU features, missing CUDA libraries).  Those lines are caught during the import and the first
look at the devices; lines that are not known chatter are passed on.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from pipeline.errors import KnownError

_CHATTER = re.compile(
    r"^(WARNING: All log messages before absl|[IW]\d{4} |\d{4}-\d\d-\d\d .*: [IW] "
    r"|To enable the following instructions|E\d{4} .*(cuInit|cuda_platform|register factory))"
)


@contextmanager
def _without_chatter() -> Iterator[None]:
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if line.strip() and not _CHATTER.match(line):
                    print(line, file=sys.stderr)


@cache
def import_tensorflow() -> tuple[Any, Any]:
    """Return the modules (tensorflow, keras), with Keras on the TensorFlow backend.

    Raises:
        KnownError: when TensorFlow is missing or Keras runs on another backend.
    """
    asked = os.environ.get("KERAS_BACKEND", "tensorflow")
    if asked != "tensorflow":
        raise KnownError(
            f"The environment variable KERAS_BACKEND chooses the backend of Keras and must be 'tensorflow' here, got "
            f"'{asked}'. Unset it, or run KERAS_BACKEND=tensorflow lrtune ..."
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with _without_chatter():
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()
            tf.get_logger().setLevel("ERROR")
            import keras
        except ImportError as error:
            raise KnownError(
                f"TensorFlow cannot be imported ({error}). Training needs it: pip install tensorflow."
            ) from error
    if keras.backend.backend() != "tensorflow":
        raise KnownError(
            f"Keras must run on the TensorFlow backend, got '{keras.backend.backend()}', as ~/.keras/keras.json or a "
            "call of keras.config.set_backend says. Set KERAS_BACKEND=tensorflow."
        )
    return tf, keras
