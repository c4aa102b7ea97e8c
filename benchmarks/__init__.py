"""Measurements by hand or `make bench`: ratios, both sides interleaved in one run, median of several."""

from pipeline.training.tensorflow_import import import_tensorflow

import_tensorflow()  # quietly, before an objective imports Keras
