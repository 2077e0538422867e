"""Renders docs/results/performance.md and its plots from benchmarks/results."""
