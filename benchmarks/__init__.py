"""Measurements: each module runs as ``makeready bench NAME`` and as ``python -m makeready.benchmarks.NAME``."""
