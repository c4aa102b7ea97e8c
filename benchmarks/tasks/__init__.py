"""Objectives that the benchmarks tune: small, and different in kind."""
