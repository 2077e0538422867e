"""Heads for models that exist, and other layouts of checkpoints."""
