"""Measures a model on held-out text: losses, and decoding."""
