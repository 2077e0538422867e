"""Heads on existing models, and other checkpoint layouts."""
