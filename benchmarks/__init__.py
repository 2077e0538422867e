"""Benchmarks: ``suites`` define the cases, ``harness`` measures them, ``pages`` render the committed ``results``."""
