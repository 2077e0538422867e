"""Studies outside the timing suites, such as errors against float64 and training runs. Each is its own command."""
