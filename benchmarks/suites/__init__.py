"""What is measured: ``python -m benchmarks.suites.<name> --device cpu [--quick] [--out FILE]``."""
