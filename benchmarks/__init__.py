"""Measurements by hand or `make bench`: ratios, both sides interleaved in one run, median of several."""
