"""Benchmarks: ``harness`` measures, ``suites`` say what, ``pages`` show the committed ``results``."""
