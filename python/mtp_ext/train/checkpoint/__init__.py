"""Checkpoints on the disk: whole or absent, described, found again."""
