"""The benchmark harness: cases, timing, memory, machine description, result files."""
