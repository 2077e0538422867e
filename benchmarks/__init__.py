"""Benchmarks: ``python -m benchmarks.bench_<name> --device cpu [--quick] [--out FILE]``; see ``harness``."""
