"""Benchmark suites: ``python -m benchmarks.suites.<name> --device cpu [--quick] [--out FILE]``."""
