"""What is shown: docs/results/performance.md and its pictures, from benchmarks/results."""
