"""Measurements: a module each; launch/bench.py runs them, bench/results holds the tables."""
