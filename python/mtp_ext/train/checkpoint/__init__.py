"""Checkpoints: atomic, self-contained directories, and finding them again."""
